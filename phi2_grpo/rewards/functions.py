"""Reward functions: small pure functions in TRL's signature.

Keyword arguments in, one float (or None: not scored) for each completion out
(https://huggingface.co/docs/trl/grpo_trainer, "Using a custom reward function"). Beside TRL's `prompts`, `completions`,
`completion_ids` and every column of the data set (`lang`, `reference`, ...), a reward gets the answers already trimmed:
`answers` (texts), `answer_ids`, `answer_tokens` (counts), `ended`; and `target_tokens`. Choose, weigh and add your own with
--rewards (see docs/rewards.md). The first line of a docstring is what the model card says of it.
"""

from pathlib import Path

from phi2_grpo.common.cli import split_weight
from phi2_grpo.common.languages import language_code, language_identifier
from phi2_grpo.rewards import tasks


def length(answer_tokens: list[int], ended: list[bool], target_tokens: int, **_) -> list[float]:
    """Rewards answers of about `target_tokens` tokens that end by themselves. In [0, 1].

    Half for the same length without an end, so that a group in which nothing ended still teaches. Gamed by padding: it
    says nothing about sense, so give it a companion.
    """
    near = [max(0.0, 1.0 - abs(tokens - target_tokens) / target_tokens) for tokens in answer_tokens]
    return [score if done else score / 2 for score, done in zip(near, ended, strict=True)]


def ending(ended: list[bool], **_) -> list[float]:
    """Rewards ending by itself. 0 or 1.

    Gamed by ending at once: give it a companion that wants something said.
    """
    return [float(done) for done in ended]


def repetition(answer_ids: list[tuple[int, ...]], **_) -> list[float]:
    """Penalises repeated runs of three tokens, by their share. In [-1, 0].

    TRL's, from arXiv 2502.03373, C.2. Gamed by saying little: fewer than three tokens repeat nothing.
    """
    from trl.rewards import get_repetition_penalty_reward

    return get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0)(completion_ids=answer_ids)


def language(answers: list[str], lang: list[str], **_) -> list[float | None]:
    """Rewards answering in the prompt's language, by py3langid's probability of it. In [0, 1].

    An empty answer earns 0; a language unknown to py3langid is not scored. Gamed by a few very common words of it.
    """
    codes = [language_code(name) for name in lang]
    known = language_identifier().labels
    ranks = [dict(language_identifier().rank(answer)) if answer else {} for answer in answers]
    return [float(rank.get(code, 0.0)) if code in known else None for rank, code in zip(ranks, codes, strict=True)]


def reference(answers: list[str], reference: list[str | None], **_) -> list[float | None]:
    """Rewards closeness to the best human reply, by sacrebleu's chrF. In [0, 1].

    Not scored where there is no reply. Gamed by common letters and words; and an answer may be good and far from the one
    reply that somebody happened to write.
    """
    from sacrebleu import sentence_chrf

    return [sentence_chrf(text, [best]).score / 100 if best else None for text, best in zip(answers, reference, strict=True)]


ALWAYS_MEASURED = {function.__name__: function for function in (length, ending, repetition, language, reference)}
BUILT_IN = ALWAYS_MEASURED | {"correct": tasks.correct, "format": tasks.format}


def untrusted_rewards(items: list[str]) -> list[str]:
    """Those of --rewards that run only where the command line names them: code, and models that are not on this machine."""
    names = [split_weight(item)[0] for item in items]
    return [name for name in names if name not in BUILT_IN and not Path(name).expanduser().is_dir()]
