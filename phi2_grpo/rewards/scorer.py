"""From --rewards to what TRL calls: the functions chosen, each batch trimmed once, scores checked and logged."""

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from transformers import TrainerState

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, memory_ran_out, split_weight
from phi2_grpo.models.answers import Answer, trim
from phi2_grpo.rewards import collapse
from phi2_grpo.rewards.functions import ALWAYS_MEASURED, BUILT_IN
from phi2_grpo.rewards.reward_model import RewardModel

LOOP = asyncio.Runner()  # one for the whole run, as TRL has it: a client or a semaphore belongs to its event loop


class BadReward(UserError):
    """A reward that failed, or returned what is not a score."""


@dataclass(frozen=True)
class Reward:
    """A reward function or model, and how much it counts."""

    name: str
    weight: float
    function: Callable


def parse_rewards(items: list[str]) -> list[Reward]:
    """The rewards that `--rewards length:1.0,my_rewards.py:polite,results/reward-model` names; a weight left out is 1.

    Reward models are read but not loaded (see `RewardModel.load`). Raises UserError for what cannot be found, imported or
    used, and for weights with which nothing would be learnt.
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
    if len(set(names)) < len(names):
        remedy = "Give each once (length:2 for twice its weight); a reward model is called as its folder"
        raise UserError(f"--rewards names one twice: {', '.join(names)}. {remedy}.")
    if not any(reward.weight for reward in chosen):
        raise UserError("--rewards: no reward has a weight, so nothing would be learnt. Give at least one.")
    return sorted(chosen, key=lambda reward: not reward.weight)  # `_wrap_for_trl` needs the weighted ones first


def add_built_in(chosen: list[Reward]) -> list[Reward]:
    """`chosen`, and with weight 0 each of ALWAYS_MEASURED that is not among them."""
    names = {reward.name for reward in chosen}
    return chosen + [Reward(name, 0.0, function) for name, function in ALWAYS_MEASURED.items() if name not in names]


def describe_rewards(chosen: list[Reward]) -> list[dict]:
    """Names, weights, docstrings' first lines, and a digest of what is not the project's own, as run.json has them."""
    return [{"name": reward.name, "weight": reward.weight, "summary": summary_of(reward), "digest": _digest(reward.function)}
            for reward in chosen]  # fmt: skip


def summary_of(reward: Reward) -> str:
    """The first line of its docstring, or ""."""
    return (inspect.getdoc(reward.function) or "").partition("\n")[0]


def _digest(function: Callable) -> str | None:
    """Of a reward's file, or a reward model's weights and scale; None for a built-in."""
    if function in BUILT_IN.values():
        return None
    if isinstance(function, RewardModel):
        weights = sorted(function.folder.glob("*.safetensors"))
        return " ".join([*map(files.digest, weights), f"{function.mean:g} {function.std:g}"])
    source = _source(function)
    return source and files.digest(Path(source))


def _source(function: Callable) -> str | None:
    """The file of a function's code; None for what is no function of Python."""
    return inspect.getsourcefile(inspect.unwrap(function)) if inspect.isroutine(function) else None


def _find(name: str) -> Callable:
    """A built-in's name, `path/to/file.py:function`, `package.module:function`, or a reward model's folder or Hub id."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    is_folder = Path(name).expanduser().is_dir()
    where, colon, function = name.rpartition(":")
    if colon and not is_folder:  # a folder's name may have a colon in it
        return _import_function(where, function)
    if is_folder or ("/" in name and not name.endswith(".py")):
        return RewardModel(name)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    raise UserError(
        f"--rewards: there is no reward {name!r}.{f' Did you mean {near[0]}?' if near else ''} Built in are "
        f"{', '.join(BUILT_IN)}; your own is path/to/file.py:FUNCTION or package.module:FUNCTION; a reward model is its "
        "folder or Hub id."
    )


def _import_function(where: str, name: str) -> Callable:
    if where in BUILT_IN:
        raise UserError(f"--rewards: the weight of {where} is {name!r}, but it takes a number.")
    if where.endswith(".py") and not Path(where).expanduser().is_file():
        raise UserError(f"--rewards: there is no file {where}.")
    if "" not in sys.path and not where.endswith(".py"):
        sys.path.insert(0, "")  # packages in the folder where the command was given
    try:
        module = _import_file(Path(where).expanduser()) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(f"--rewards: {where} does not import: {type(error).__name__}: {error}") from None
    if not callable(function := getattr(module, name, None)):
        raise UserError(f"--rewards: {where} has no function {name!r}.")
    return function


def _import_file(path: Path):
    """The module of a file, once for all of its functions; what stands beside the file can be imported by it."""
    name = f"reward_file_{path.stem}_{files.digest(path)}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
        sys.path.append(str(path.resolve().parent))
        spec.loader.exec_module(module)
    return sys.modules[name]


class Scorer:
    """The rewards as TRL calls them: `functions`. Each batch is trimmed once; `last_batch` keeps the last batch, one dict a
    completion: `prompt`, `completion_ids`, `answer`, `scores` by reward name, and `score`, their weighted sum."""

    def __init__(self, tokenizer, target_tokens: int, chosen: list[Reward], format_regex: str = ""):
        self.tokenizer, self.target_tokens, self.format_regex, self.chosen = tokenizer, target_tokens, format_regex, chosen
        self.functions = [self._wrap_for_trl(reward) for reward in chosen]
        self.last_batch: list[dict] = []
        self.state = TrainerState(global_step=1, max_steps=1)  # outside training, rewards see step 1 of 1

    @property
    def models(self) -> list[RewardModel]:
        return [reward.function for reward in self.chosen if isinstance(reward.function, RewardModel)]

    @property
    def weighted(self) -> list[Callable]:
        """The rewards that have a weight: those that are trained for."""
        return [reward.function for reward in self.chosen if reward.weight]

    @property
    def has_target(self) -> bool:
        """Whether one of them asks for `target_tokens`."""
        return any("target_tokens" in inspect.signature(function).parameters for function in self.weighted)

    def collapse_metrics(self, answers: list[Answer], languages: list[str]) -> dict[str, float]:
        """`collapse.measure`, of what says something under the rewards that are trained for."""
        target = self.target_tokens if self.has_target else None
        return collapse.measure(answers, languages, target, BUILT_IN["correct"] in self.weighted)

    def score(self, rows: list[dict], completion_ids: list[list[int]]) -> list[dict]:
        """Completions outside training, of `rows` of the data set, one each; returns `last_batch`.

        What a reward does not score adds nothing to the sum, as in TRL; what none of them scores has no score (None). A reward
        model that is not loaded yet is passed over.
        """
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        columns["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
        columns |= {"trainer_state": self.state, "log_metric": _ignore, "log_extra": _ignore}  # as TRL gives them
        for reward, function in zip(self.chosen, self.functions, strict=True):
            if not isinstance(reward.function, RewardModel) or reward.function.model:
                function(prompts=[row["prompt"] for row in rows], completion_ids=completion_ids, **columns)
        return self.last_batch

    def _wrap_for_trl(self, reward: Reward) -> Callable:
        def scored(prompts, completions, completion_ids, **columns):
            self._start_batch(prompts, completion_ids, columns)
            answers = [row["answer"] for row in self.last_batch]
            arguments = {
                "prompts": list(prompts),
                "completions": list(completions),
                "completion_ids": list(completion_ids),
                "answers": [answer.text for answer in answers],
                "answer_ids": [answer.ids for answer in answers],
                "answer_tokens": [answer.tokens for answer in answers],
                "ended": [answer.ended for answer in answers],
                "target_tokens": self.target_tokens,
                "format_regex": self.format_regex,
                **columns,
            }
            scores = _call(reward, arguments, len(answers))
            for row, value in zip(self.last_batch, scores, strict=True):
                row["scores"][reward.name] = value
                parts = [(each.weight, row["scores"].get(each.name)) for each in self.chosen if each.weight]
                known = [weight * score for weight, score in parts if score is not None]
                row["score"] = sum(known) if known else None
            self._log_languages(reward.name, scores, columns)
            if reward is self.chosen[-1]:
                scored_rows = [row["score"] is not None for row in self.last_batch]
                columns.get("log_metric", _ignore)("answers/scored", sum(scored_rows) / len(scored_rows))
            if reward.weight:
                return scores
            # What no weighted reward scores stays unscored: TRL would take 0 for its sum once any reward scores it.
            return [None if row["score"] is None else value for row, value in zip(self.last_batch, scores, strict=True)]

        scored.__name__ = reward.name  # TRL logs a reward under it
        return scored

    def _start_batch(self, prompts: list, completion_ids: list[list[int]], columns: dict) -> None:
        """Trim a batch and log its answers, at the first of the rewards that see it."""
        batch = list(zip(prompts, completion_ids, strict=True))
        if batch == [(row["prompt"], row["completion_ids"]) for row in self.last_batch]:
            return
        answers = trim(completion_ids, self.tokenizer)
        self.last_batch = [{"prompt": prompt, "completion_ids": ids, "answer": answer, "score": None, "scores": {}}
                     for (prompt, ids), answer in zip(batch, answers, strict=True)]  # fmt: skip
        if log := columns.get("log_metric"):  # TRL's: the mean over a step, beside its own metrics
            log("answers/ended", sum(answer.ended for answer in answers) / len(answers))
            log("answers/tokens", sum(answer.tokens for answer in answers) / len(answers))
            for name, value in self.collapse_metrics(answers, columns.get("lang") or []).items():
                log(f"collapse/{name}", value)

    def _log_languages(self, name: str, scores: list, columns: dict) -> None:
        by_language = defaultdict(list)
        for code, value in zip(columns.get("lang") or [], scores, strict=False):
            if value is not None:
                by_language[code].append(value)
        for code, values in by_language.items():
            columns.get("log_metric", _ignore)(f"rewards/{name}/{code}", sum(values) / len(values))


def _ignore(*_) -> None:
    """In place of TRL's `log_metric` and `log_extra`, outside training."""


def _call(reward: Reward, arguments: dict, count: int) -> list[float | None]:
    """Call a reward, which may be async; `count` plain floats or None. Raises BadReward for what fails or is not a score."""
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # a reward that switches it off does so for itself
            scores = reward.function(**arguments)
        scores = LOOP.run(scores) if inspect.iscoroutine(scores) else scores
        if not isinstance(scores, Iterable):
            raise TypeError(f"it returned {scores!r}. Return a list, one number per completion")
        scores = [value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value for value in scores]
    except BaseException as error:  # the user's own code may raise anything
        if memory_ran_out(error) or isinstance(error, (KeyboardInterrupt, UserError)):
            raise
        text = f"the reward {reward.name!r} failed: {type(error).__name__}: {error}"
        source = _source(reward.function)
        if lines := [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]:
            text += f" ({source}, line {lines[-1]})"
        elif isinstance(error, TypeError) and "argument" in str(error):  # of the call itself
            text += f". A reward is given: {', '.join(arguments)}."
        raise BadReward(text) from error
    if len(scores) != count:
        raise BadReward(f"the reward {reward.name!r} returned {len(scores)} rewards for {count} completions.")
    numbers = (int, float, numpy.integer, numpy.floating, numpy.bool_)
    for value in scores:
        if value is not None and not (isinstance(value, numbers) and abs(value) < 1e30):  # more overflows float32
            raise BadReward(f"the reward {reward.name!r} returned {value!r}; it takes finite numbers, or None (not scored).")
    return [None if value is None else float(value) for value in scores]


def try_rewards(scorer: Scorer, rows: list[dict]) -> dict[str, list[float | None]]:
    """Call each reward on some of the rows, their references taken as completions; scores by reward name.

    Raises BadReward, and UserError where all rewards that count read a reference, and no row has one.
    """
    rows = sorted(rows, key=lambda row: row["reference"] is None)[:6]
    others = ["I do not know.", ""]  # no right answers: a reward may treat them otherwise
    texts = [row["reference"] or others[0] for row in rows] + others
    ids = [[*ids, scorer.tokenizer.eos_token_id] for ids in scorer.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    scored = scorer.score([*rows, *rows[:1] * 2], ids)[: len(rows)]
    counting = [reward for reward in scorer.chosen if reward.weight]
    need = all("reference" in inspect.signature(reward.function).parameters for reward in counting)
    if need and rows[0]["reference"] is None and all(row["score"] is None for row in scored):
        raise UserError(
            f"no prompt has a reference, so {', '.join(reward.name for reward in counting)} scores nothing, and nothing can be "
            "learnt or measured. Prepare the data with references: prepare_data.py --reference_column COLUMN."
        )
    return {name: [row["scores"][name] for row in scored] for name in (scored[0]["scores"] if scored else ())}
