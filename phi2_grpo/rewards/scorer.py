"""From --rewards to what TRL calls: the functions chosen, each batch trimmed once, scores checked, logged and compared."""

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from transformers import TrainerState

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, memory_ran_out, split_weight
from phi2_grpo.models.answers import trim
from phi2_grpo.rewards import collapse
from phi2_grpo.rewards.functions import BUILT_IN
from phi2_grpo.rewards.reward_model import RewardModel


class BadReward(UserError):
    """A reward that failed, or gave what is no score."""


@dataclass(frozen=True)
class Reward:
    """A reward function (a RewardModel is one too), and how much it counts."""

    name: str
    weight: float
    function: Callable

    @property
    def pays_for(self) -> str:
        """The first line of its docstring, for the model card and the app."""
        return str(self.function.__doc__ or "").strip().partition("\n")[0]


def choose_rewards(items: list[str]) -> list[Reward]:
    """The rewards that `--rewards length:1.0,my_rewards.py:polite,results/reward-model` names; a weight left out is 1.

    Reward models are looked at but not loaded (see `RewardModel.load`). Raises UserError for what cannot be found, imported or
    used, for a weight that is not finite, and where all weights are 0.
    """
    chosen = []
    for item in items:
        name, weight = split_weight(item)
        if not abs(weight) <= 1e6:  # NaN is in no range
            raise UserError(f"--rewards: the weight of {name} is {weight}, but it takes -1,000,000 to 1,000,000.")
        function = _find(name)
        own = function.__name__ if isinstance(function, RewardModel) else name.rpartition(":")[2]
        chosen.append(Reward(own, weight, function))
    names = [reward.name for reward in chosen]
    if not chosen:
        raise UserError(f"--rewards is empty. Give at least one: {', '.join(BUILT_IN)}, or your own (see README.md).")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"--rewards names {', '.join(twice)} twice. Give each once (length:2 for twice its weight), or another name."
        )
    if not any(reward.weight for reward in chosen):
        raise UserError("--rewards: all weights are 0, so nothing would be learnt. Give one another weight.")
    return chosen


def with_all_built_in(chosen: list[Reward]) -> list[Reward]:
    """`chosen`, and with weight 0 the built-in rewards that are not among them: looked at, though nothing was paid for them."""
    names = {reward.name for reward in chosen}
    return chosen + [Reward(name, 0.0, function) for name, function in BUILT_IN.items() if name not in names]


def describe_rewards(chosen: list[Reward]) -> list[dict]:
    """Names, weights, what each pays for, and a digest of what is not the project's own, as run.json has them."""
    return [{"name": reward.name, "weight": reward.weight, "pays_for": reward.pays_for, "digest": _digest(reward.function)}
            for reward in chosen]  # fmt: skip


def _digest(function: Callable) -> str | None:
    """Of a reward's file, or a reward model's weights and scale; None for a built-in."""
    if function in BUILT_IN.values():
        return None
    if isinstance(function, RewardModel):
        weights = sorted(function.folder.glob("*.safetensors"))
        return " ".join([*map(files.digest, weights), f"{function.mean:g} {function.std:g}"])
    source = inspect.getsourcefile(inspect.unwrap(function)) if inspect.isroutine(function) else None
    return source and files.digest(Path(source))


def _find(name: str) -> Callable:
    """A built-in's name, `path/to/file.py:function`, `package.module:function`, or a reward model's folder or Hub id."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    where, colon, function = name.rpartition(":")
    if colon and not Path(name).expanduser().is_dir():  # a folder's name may have a colon in it
        return _import_function(where, function)
    if name.endswith(".py"):
        raise UserError(f"--rewards: {name} is a file; name the function in it, too: {name}:FUNCTION")
    if Path(name).expanduser().is_dir() or "/" in name:
        return RewardModel(name)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    raise UserError(
        f"--rewards: there is no reward {name!r}.{f' Did you mean {near[0]}?' if near else ''} Built in are "
        f"{', '.join(BUILT_IN)}; your own is path/to/file.py:function or package.module:function; a reward model is "
        "its folder or Hub id."
    )


def _import_function(where: str, name: str) -> Callable:
    try:
        module = _import_file(Path(where).expanduser()) if where.endswith(".py") else _import_module(where)
        function = getattr(module, name, None)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == Path(where).name]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1].lineno if lines else None
        at = f" at line {line}" if line else ""
        raise UserError(f"--rewards: {where} does not import{at}: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise UserError(f"--rewards: {where} has no function {name!r}.")
    return function


def _import_file(path: Path):
    if not path.is_file():
        raise FileNotFoundError("no such file")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    module = sys.modules[f"reward_file_{path.stem}"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def _import_module(name: str):
    if "" not in sys.path:
        sys.path.insert(0, "")  # packages in the folder where the command was given
    return importlib.import_module(name)


class Scorer:
    """The rewards as TRL calls them, with each batch trimmed once, and a look at the last batch for the printed samples."""

    def __init__(self, tokenizer, target_tokens: int, chosen: list[Reward]):
        self.tokenizer, self.target_tokens, self.chosen = tokenizer, target_tokens, chosen
        self.functions = [self._for_trl(reward) for reward in chosen]
        self.last = []  # of the last batch, one dict a completion: prompt, completion_ids, answer, score, scores by name
        # What a reward that asks for `trainer_state` gets outside training: the end of it.
        self.state = TrainerState(global_step=1, max_steps=1)
        self._seen = None  # the batch that `last` is of
        self._centred: dict[str, list] = defaultdict(list)  # since `compare` was called: scores less their group's mean

    @property
    def models(self) -> list[RewardModel]:
        """The reward models among the rewards."""
        return [reward.function for reward in self.chosen if isinstance(reward.function, RewardModel)]

    def score(self, rows: list[dict], completion_ids: list[list[int]]) -> list[dict]:
        """Completions outside training, of `rows` of the data set, one each.

        A dict a completion: `answer` (see answers.py), `scores` by reward name, and `score`, their weighted sum as TRL has it:
        what a reward does not score is left out of the sum, and what none of them scores has no score (None). A reward model
        that is not loaded yet is passed over.
        """
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        columns["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
        columns |= {"trainer_state": self.state, "log_metric": _ignore, "log_extra": _ignore}  # as TRL gives them
        for reward, function in zip(self.chosen, self.functions, strict=True):
            if not isinstance(reward.function, RewardModel) or reward.function.model:
                function(prompts=[row["prompt"] for row in rows], completion_ids=completion_ids, **columns)
        return self.last

    def _for_trl(self, reward: Reward) -> Callable:
        def scored(prompts, completions, completion_ids, **columns):
            if completion_ids is not self._seen:  # the first reward of a new batch
                self._seen = completion_ids
                answers = trim(completion_ids, self.tokenizer)
                self.last = [{"prompt": p, "completion_ids": ids, "answer": a, "score": None, "scores": {}}
                             for p, ids, a in zip(prompts, completion_ids, answers, strict=True)]  # fmt: skip
                self._log_answers(columns)
            answers = [row["answer"] for row in self.last]
            try:
                with torch.set_grad_enabled(torch.is_grad_enabled()):  # a reward that switches it off does so for itself
                    scores = reward.function(
                        prompts=list(prompts),
                        completions=list(completions),
                        completion_ids=list(completion_ids),
                        answers=[answer.text for answer in answers],
                        answer_ids=[answer.ids for answer in answers],
                        answer_tokens=[answer.tokens for answer in answers],
                        ended=[answer.ended for answer in answers],
                        target_tokens=self.target_tokens,
                        **columns,
                    )
                if inspect.isawaitable(scores):
                    scores = asyncio.run(_result_of(scores))
                scores = _checked(reward.name, scores, len(answers))
            except UserError:
                raise
            except BaseException as error:  # the user's own code may raise anything
                if memory_ran_out(error) or isinstance(error, KeyboardInterrupt):
                    raise
                raise BadReward(f"the reward {reward.name!r} failed: {type(error).__name__}: {error}") from error
            for row, value in zip(self.last, scores, strict=True):
                row["scores"][reward.name] = value
                if value is not None and reward.weight:
                    row["score"] = (row["score"] or 0.0) + reward.weight * value
            self._centred[reward.name] += _less_group_mean(prompts, scores)
            self._log_languages(reward.name, scores, columns)
            return scores

        scored.__name__ = reward.name  # TRL logs a reward under it
        return scored

    def compare(self) -> dict[str, float]:
        """How the rewards have agreed since the last call; forgets what it compared.

        `same/<reward>`: share of groups in which all completions had the same reward, so that it taught nothing.
        `agreement/<one>~<other>`: their correlation within groups, from -1 (they fight) to 1 (one of them does nothing new);
        left out where one of them never differed.
        """
        found = {f"same/{name}": float(numpy.mean([not numpy.any(numpy.abs(group) > 1e-9) for group in groups]))
                 for name, groups in self._centred.items()}  # fmt: skip
        flat = {name: numpy.concatenate(groups) for name, groups in self._centred.items()}
        for i, one in enumerate(flat):
            for other in list(flat)[i + 1 :]:
                both = ~numpy.isnan(flat[one]) & ~numpy.isnan(flat[other])
                a, b = flat[one][both], flat[other][both]
                if len(a) > 2 and a.std() > 1e-9 and b.std() > 1e-9:
                    found[f"agreement/{one}~{other}"] = float(numpy.corrcoef(a, b)[0, 1])
        self._centred.clear()
        return found

    def _log_answers(self, columns: dict) -> None:
        if log := columns.get("log_metric"):  # TRL's: the mean over a step, beside its own metrics
            answers = [row["answer"] for row in self.last]
            log("answers/ended", sum(answer.ended for answer in answers) / len(answers))
            log("answers/tokens", sum(answer.tokens for answer in answers) / len(answers))
            for name, value in collapse.measure(answers, columns.get("lang") or [], self.target_tokens).items():
                log(f"collapse/{name}", value)

    def _log_languages(self, name: str, scores: list, columns: dict) -> None:
        if not (log := columns.get("log_metric")):
            return
        by_language = defaultdict(list)
        for code, value in zip(columns.get("lang") or [], scores, strict=False):
            if value is not None:
                by_language[code].append(value)
        for code, values in by_language.items():
            log(f"rewards/{name}/{code}", sum(values) / len(values))


def _ignore(*_) -> None:
    """In place of TRL's `log_metric` and `log_extra`, outside training."""


async def _result_of(awaitable):
    return await awaitable


def _checked(name: str, scores, count: int) -> list[float | None]:
    """`scores`, a list or a tensor, as plain floats; raises BadReward where one is no finite number, or too many or few."""
    scores = [value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value for value in scores]
    if len(scores) != count:
        raise BadReward(f"the reward {name!r} returned {len(scores)} rewards for {count} completions.")
    numbers = (int, float, numpy.integer, numpy.floating, numpy.bool_)
    for value in scores:
        if value is not None and not (isinstance(value, numbers) and abs(value) < 1e30):  # more overflows float32
            raise BadReward(f"the reward {name!r} returned {value!r}; it must return finite numbers, or None (not scored).")
    return [None if value is None else float(value) for value in scores]


def _less_group_mean(prompts: list, scores: list[float | None]) -> list[numpy.ndarray]:
    """Scores less their group's mean, an array a group: only differences within a group teach. None becomes NaN.

    A group's completions stand next to each other, and share their prompt.
    """
    groups: list[list] = []
    for i, value in enumerate(scores):
        if i == 0 or prompts[i] != prompts[i - 1]:
            groups.append([])
        groups[-1].append(numpy.nan if value is None else value)
    arrays = [numpy.array(group, float) for group in groups]
    return [group - (group[~numpy.isnan(group)].mean() if not numpy.isnan(group).all() else 0.0) for group in arrays]


def try_rewards(scorer: Scorer, rows: list[dict]) -> dict[str, list[float | None]]:
    """Call each reward on real rows, their human replies taken as completions; scores by reward name.

    Raises UserError naming the reward that has the wrong signature, count or type, or a value that is not finite.
    """
    texts = [row["reference"] or "I do not know." for row in rows]
    scored = scorer.score(rows, [[*ids, scorer.tokenizer.eos_token_id] for ids in scorer.tokenizer(texts)["input_ids"]])
    scorer.compare()  # forgets these rows
    return {name: [row["scores"][name] for row in scored] for name in (scored[0]["scores"] if scored else ())}
