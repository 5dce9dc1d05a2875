"""Signs that a reward is being gamed, seen in the answers themselves and not in any reward."""

from collections import Counter
from dataclasses import dataclass

from phi2_grpo.models.answers import Answer
from phi2_grpo.rewards.functions import language_code, language_identifier

# Judged on the mean of the last WINDOW steps, so that one noisy step raises no alarm.
WINDOW = 5


# metric: (lowest, highest, what it means when left). Healthy ranges of Axolotl's GRPO docs, "training stability".
HEALTHY = {
    "frac_reward_zero_std": (0, 0.8, "most groups have one reward for all their completions, so they teach nothing: "
                             "the reward is too easy, too hard, or too coarse"),
    "completions/clipped_ratio": (0, 0.3, "many completions are cut off at max_completion_length: the model does not end "
                                  "its answers (yet), or has no room for them"),
    "kl": (0, 0.5, "the policy is far from its base; above 2 it has diverged: lower learning_rate or raise beta"),
    "grad_norm": (0.001, 1, "gradients are vanishing (nothing is learnt) or exploding (lower learning_rate)"),
}  # fmt: skip


# What no reward can excuse (see signs.py), and what --stop_on_collapse ends a run at.
COLLAPSE = {
    "kl": (0, 2, "the policy has diverged from its base: lower learning_rate or raise beta"),
    "entropy": (0.01, float("inf"), "sampling has collapsed to one answer: raise temperature or beta"),
    "collapse/repetition": (0, 0.5, "answers repeat themselves: add the reward repetition, or raise beta"),
    "collapse/distinct_2": (0.2, 1, "all answers say the same: the reward pays for one phrase"),
    "collapse/one_language": (-1, 0.3, "answers drift to one language: add the reward language"),
    "collapse/at_target": (0, 0.6, "answers are padded or cut to the target length: give length a companion"),
    "collapse/empty": (0, 0.5, "most answers say nothing: the reward pays for silence"),
}


SINCE_START = {"collapse/one_language"}  # a base that answers all in English is no drift


SINCE_WINDOW = 10  # steps at the start and at the end: a batch has few prompts in other languages


MIN_TOKENS = 8  # tokens; a shorter answer says nothing about repetition or language


def measure(answers: list[Answer], languages: list[str], target_tokens: int) -> dict[str, float]:
    """Of one batch of answers; each from 0 (no sign; for distinct_2, 1) to 1 (for distinct_2, 0). Left out where too few tell.

    repetition: mean share of an answer's token trigrams that stood in it before.
    distinct_2: different token bigrams in all answers, by their number ("distinct-2", arXiv 1510.03055).
    one_language: share of answers in the answers' commonest language, among those to prompts in other languages.
    at_target: share of answers whose length is the target's, to a token.
    empty: share of answers of fewer than two tokens.
    """
    long = [answer for answer in answers if answer.tokens >= MIN_TOKENS]
    found = {
        "at_target": _mean([abs(answer.tokens - target_tokens) <= 1 for answer in answers]),
        "empty": _mean([answer.tokens < 2 for answer in answers]),
    }
    if long:
        trigrams = [ngrams(answer.ids, 3) for answer in long]
        bigrams = [pair for answer in long for pair in ngrams(answer.ids, 2)]
        found["repetition"] = _mean([1 - len(set(grams)) / len(grams) for grams in trigrams])
        found["distinct_2"] = len(set(bigrams)) / len(bigrams)
    spoken = [(language_identifier().classify(answer.text)[0], language_code(asked))
              for answer, asked in zip(answers, languages, strict=False) if answer.tokens >= MIN_TOKENS]  # fmt: skip
    if spoken:
        commonest, _ = Counter(guess for guess, _ in spoken).most_common(1)[0]
        others = [guess == commonest for guess, asked in spoken if asked != commonest]
        if len(others) >= 4:
            found["one_language"] = _mean(others)
    return found


def ngrams(ids: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(size)), strict=False))


def _mean(values: list) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Alert:
    """A metric that left its range: `kind` is "warning" or "collapse"."""

    kind: str
    metric: str
    text: str


def alerts(rows: list[dict], raised: set[tuple[str, str]]) -> list[Alert]:
    """The ranges that the last steps of `rows` have left, those already `raised` (kind, metric) apart."""
    new = []
    for kind, ranges in (("warning", HEALTHY), ("collapse", COLLAPSE)):
        for key, (low, high, meaning) in ranges.items():
            values = [row[key] for row in rows if row.get(key) is not None]
            window, grown = (SINCE_WINDOW, True) if key in SINCE_START else (WINDOW, False)
            if len(values) < window * (1 + grown) or (kind, key) in raised:
                continue
            mean = sum(values[-window:]) / window
            if grown:
                mean -= sum(values[:window]) / window
            if not low <= mean <= high:
                how = "has grown by" if grown else "is"
                over = f"from the first {window} steps to the last" if grown else f"over {window} steps"
                new.append(Alert(kind, key, f"{key} {how} {mean:.3g} {over}, healthy is {low:g} to {high:g}: {meaning}"))
    return new
