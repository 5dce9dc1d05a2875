"""Rewards of tasks whose answers are right or wrong, in the same signature as functions.py."""

import re
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate

import regex

from phi2_grpo.common.cli import UserError

# A minus sign belongs to a number where nothing stands before it that could be subtracted from.
NUMBER = re.compile(r"(?<![\w.)])[-+\u2212](?=[$€£]?\d)|\d")
# 1,000 and 1 000 are a thousand; 1.5 and 1,5 are one and a half.
DIGITS = re.compile(
    r"[-+\u2212]?[$€£]?(\d{1,3}(?:([, \u00a0\u2009\u202f])\d{3})(?:\2\d{3})*(?!\d)|\d+)"
    r"([.,]\d+)?(?:\s?/\s?(\d{1,99})(?![\d.]))?"
)
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
ENDS = " .,;:!?\"'*`$()[]{}“”‘’«»"  # punctuation at the ends of a text
TIMEOUT = 1.0  # seconds for one answer: a pattern may need exponential time


def correct(answers: list[str], reference: list[str | None], **_) -> list[float | None]:
    """Rewards the right answer: the same final number, or text, as the reference. 0 or 1.

    Not scored where there is no reference. Ignores truncation (`ending` is a reward of its own). Gamed by guessing, where few
    answers are possible; and says nothing about how the answer was found.
    """
    return [
        None if right is None else float(final_answer(answer) == final_answer(right))
        for answer, right in zip(answers, reference, strict=True)
    ]


def final_answer(text: str) -> Fraction | str:
    """What of a text is compared: what stands behind GSM8K's ####, or in the last \\boxed{}, or else all of it; of that the
    last number, with thousands separators, currency and units left out; where there is no number, the text without case,
    white space and punctuation at its ends."""
    marked = text.rpartition("####")[2].strip().split("\n")[0] if "####" in text else _boxed(text)
    part = FRACTION.sub(r"\1/\2", text if marked is None else marked)
    numbers = list(_numbers(part))
    return numbers[-1] if numbers else " ".join(part.casefold().split()).strip(ENDS)


def _numbers(text: str):
    position = 0
    while start := NUMBER.search(text, position):
        match = DIGITS.match(text, start.start())
        position = match.end()
        whole, grouped, decimals, divisor = match.groups("")
        value = Fraction(Decimal(whole.replace(grouped, "") + decimals.replace(",", ".")))
        value = value / int(divisor) if divisor and int(divisor) else value
        yield -value if match[0][0] in "-\u2212" else value


def _boxed(text: str) -> str | None:
    """The content of the last \\boxed{}, whose braces may hold others; without a closing brace, the rest of the text."""
    _, box, rest = text.rpartition("\\boxed{")
    depths = accumulate({"{": 1, "}": -1}.get(character, 0) for character in rest)
    end = next((i for i, depth in enumerate(depths) if depth < 0), None)
    return rest[:end] if box else None


def format(answers: list[str], format_regex: str, **_) -> list[float | None]:  # noqa: A001, as it reads in a plot's legend
    """Rewards answers that match --format_regex from end to end. 0 or 1.

    Not scored where the pattern takes more than a second. Gamed by the form without the content.
    """
    if not format_regex:
        raise UserError("the reward format needs a pattern: --format_regex '<think>.+</think>.+'")
    pattern = regex.compile(format_regex, regex.DOTALL)
    return [_matches(pattern, answer) for answer in answers]


def _matches(pattern, answer: str) -> float | None:
    try:
        return float(pattern.fullmatch(answer, timeout=TIMEOUT) is not None)
    except TimeoutError:
        return None
