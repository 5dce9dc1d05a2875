"""Rewards: what a good answer is paid for. Write your own as a function like `length` and name it in REWARDS.

A reward has TRL's signature (https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"): keyword
arguments in, one float (or None: not scored) for each completion out. Beside TRL's `prompts`, `completions`,
`completion_ids` and every column of the data set it gets, already trimmed, `answers` (texts), `answer_tokens`, `ended`,
and `target_tokens`.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable

from phi2_grpo.answers import trim
from phi2_grpo.cli import UserError


def length(answer_tokens: list[int], ended: list[bool], target_tokens: int, **_) -> list[float]:
    """Pays for an answer near `target_tokens` tokens that ends by itself. In [0, 1]. Gamed by padding to the target.

    Half pay for what did not end is what lets a model learn to end at all: with an ending probability of 0.05, two
    groups in three have no ended completion, and a reward of 0 for them all would teach nothing.
    """
    near = [max(0.0, 1 - abs(tokens - target_tokens) / target_tokens) for tokens in answer_tokens]
    return [score if done else score / 2 for score, done in zip(near, ended, strict=True)]


REWARDS = [length]  # all are summed; a reward model of your own can stand here too, as a function


class Scorer:
    """The rewards as TRL calls them, with each batch trimmed once, and a look at the last batch for the printed samples."""

    def __init__(self, tokenizer, target_tokens: int, rewards: list[Callable] | None = None):
        self.tokenizer, self.target_tokens = tokenizer, target_tokens
        self.functions = [self._for_trl(function) for function in (REWARDS if rewards is None else rewards)]
        self.last = []  # of the last batch, one dict a completion: prompt, completion_ids, answer, score
        self._seen = None  # the batch that `last` is of

    def score(self, prompts: list, completion_ids: list[list[int]], columns: dict) -> list[float]:
        """Summed rewards of completions outside training. `columns`: the data set's other columns, repeated likewise."""
        for function in self.functions:
            function(prompts=prompts, completions=completion_ids, completion_ids=completion_ids, **columns)
        return [row["score"] for row in self.last]

    def _for_trl(self, reward: Callable) -> Callable:
        @functools.wraps(reward)  # TRL logs a reward under its name
        def scored(prompts, completions, completion_ids, **columns):
            if completion_ids is not self._seen:  # the first reward of a new batch
                self._seen = completion_ids
                answers = trim(completion_ids, self.tokenizer)
                self.last = [{"prompt": p, "completion_ids": ids, "answer": a, "score": 0.0}
                             for p, ids, a in zip(prompts, completion_ids, answers, strict=True)]  # fmt: skip
                self._log_answers(columns)
            answers = [row["answer"] for row in self.last]
            scores = reward(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids,
                answers=[answer.text for answer in answers],
                answer_tokens=[answer.tokens for answer in answers],
                ended=[answer.ended for answer in answers],
                target_tokens=self.target_tokens,
                **columns,
            )
            if len(scores) != len(self.last):
                raise ValueError(f"it returned {len(scores)} rewards for {len(self.last)} completions")
            for row, value in zip(self.last, scores, strict=True):
                row["score"] += value if isinstance(value, int | float) else 0.0
            self._log_languages(reward.__name__, scores, columns)
            return scores

        return scored

    def _log_answers(self, columns: dict) -> None:
        if log := columns.get("log_metric"):  # TRL's: the mean over a step, beside its own metrics
            log("answers/ended", sum(row["answer"].ended for row in self.last) / len(self.last))
            log("answers/tokens", sum(row["answer"].tokens for row in self.last) / len(self.last))

    def _log_languages(self, name: str, scores: list, columns: dict) -> None:
        by_language = defaultdict(list)
        for language, value in zip(columns.get("lang") or [], scores, strict=False):
            if value is not None:
                by_language[language].append(value)
        if (log := columns.get("log_metric")) and by_language:
            for language, values in by_language.items():
                log(f"rewards/{name}/{language}", sum(values) / len(values))


def try_rewards(scorer: Scorer, rows: list[dict]) -> dict[str, list[float]]:
    """Call each reward on real rows, their human replies taken as completions; scores by reward name.

    Raises UserError naming the reward that has the wrong signature, count, type or a value that is not finite.
    """
    texts = [row["reference"] or "I do not know." for row in rows]
    completion_ids = [[*ids, scorer.tokenizer.eos_token_id] for ids in scorer.tokenizer(texts)["input_ids"]]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    prompts = [row["prompt"] for row in rows]
    found = {}
    for function in scorer.functions:
        name = function.__name__
        try:
            scores = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        except Exception as error:  # the user's own code may raise anything
            raise UserError(f"the reward {name!r} failed on a real row: {type(error).__name__}: {error}") from error
        bad = [v for v in scores if v is not None and not (isinstance(v, int | float) and math.isfinite(v))]
        if bad:
            raise UserError(f"the reward {name!r} returned {bad[0]!r}; it must return finite numbers, or None.")
        found[name] = scores
    return found
