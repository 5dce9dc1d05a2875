"""Signs that a reward is being gamed, seen in the answers themselves and not in any reward."""

from collections import Counter

from phi2_grpo.answers import Answer
from phi2_grpo.rewards import language_code, language_identifier

SHORT = 8  # tokens; a shorter answer says nothing about repetition or language


def look(answers: list[Answer], languages: list[str], target_tokens: int) -> dict[str, float]:
    """Of one batch of answers; each from 0 (no sign; for distinct_2, 1) to 1 (for distinct_2, 0). Left out where too few tell.

    repetition: mean share of an answer's token trigrams that stood in it before.
    distinct_2: different token bigrams in all answers, by their number ("distinct-2", arXiv 1510.03055).
    one_language: share of answers in the answers' commonest language, among those to prompts in other languages.
    at_target: share of answers whose length is the target's, to a token.
    empty: share of answers of fewer than two tokens.
    """
    long = [answer for answer in answers if answer.tokens >= SHORT]
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
              for answer, asked in zip(answers, languages, strict=False) if answer.tokens >= SHORT]  # fmt: skip
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
