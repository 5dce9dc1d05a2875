"""Rewards of tasks whose answers are right or wrong, in the same signature as functions.py."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate

import regex

from phi2_grpo.common.cli import UserError

# A minus sign belongs to a number where nothing stands before it that could be subtracted from.
NUMBER = re.compile(r"(?<![\w.)])[-+](?=[$€£]?\d)|\d")
DIGITS = re.compile(
    r"[-+]?[$€£]?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(\.\d+)?(?:[eE]([-+]?\d{1,3})(?!\w))?(?:\s?/\s?(\d{1,99})(?![\d.]))?"
)
# A right answer that is a number with a decimal comma (12,50 € or 1.000,5; also behind words), or with spaces in it.
SPACE = "[ \u00a0\u2009\u202f]"
WORDS = r"(?s:.*[^\d\s,;]\s)?"
WHOLE = rf"[-+$€£]*\s?(?:\d{{1,3}}(?:(?:\.|{SPACE})\d{{3}})+|\d+)"
COMMA = re.compile(rf"{WORDS}{WHOLE},\d\d[^\d,]*|{WHOLE},(?:\d|\d{{4,}})[^\d,]*")
SPACED = re.compile(rf"{WORDS}[-+$€£]*\s?\d{{1,3}}(?:{SPACE}\d{{3}})+[^\d,]*")
GROUPS = {
    COMMA: re.compile(rf"(?<=\d)(?:\.|{SPACE})(?=\d{{3}}(?!\d))"),
    SPACED: re.compile(rf"(?<=\d){SPACE}(?=\d{{3}}(?!\d))"),
}
TEXT = r"\\(?:text|mathrm)\{[^{}]*\}"
WORD = rf"(?:[A-Za-z]+(?:\s*/\s*|\s))*(?:[A-Za-z]{{2,}}|[ms]|{TEXT})"  # behind a space; without one only these:
UNIT = rf"(?:(?:\s|\\[ ,;])+{WORD}|(?:[A-Za-z]+/)?(?:[kcdm]?m|s|ft|in|yd|mi|feet)|{TEXT})"
POWER = r"10(?:\^|\*\*)[{(]?(-?\d{1,3})(?!\d)[})]?"
# LaTeX's fractions, powers of ten (3 x 10^8), and the exponent of a unit at the end (9.8 m/s^2), which is no number.
REWRITTEN = (
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(rf"(?<=\d)\s*(?:x|×|·|\*|\\times|\\cdot)\s*{POWER}"), r"e\1 "),
    (re.compile(rf"(?<![\w.]){POWER}"), r"1e\1 "),
    (re.compile(rf"(?<=\d)({UNIT})\^\{{?-?\d\}}?(?=\D*$)"), r"\1"),
)
ENDS = " .,;:!?¿¡\"'*`$“”‘’«»。，、！？；：「」（）"  # punctuation at the ends of a text
TIMEOUT = 1.0  # seconds for one answer: a pattern may need exponential time


def correct(answers: list[str], reference: list[str | None], **_) -> list[float | None]:
    """Rewards the right answer: the same final number, or text, as the reference. 0 or 1.

    Not scored where there is no reference. Ignores truncation (`ending` is a reward of its own). Gamed by guessing, where few
    answers are possible; and says nothing about how the answer was found.
    """
    return [
        None if right is None else float(_read(answer, right) == _read(right, right))
        for answer, right in zip(answers, reference, strict=True)
    ]


def _read(text: str, right: str) -> Fraction | str:
    """The final answer; where the right answer is a number with a decimal comma or spaces, with numbers in that form."""
    form = next((form for form in GROUPS if form.fullmatch(_marked(right))), None)
    text = GROUPS[form].sub("", text) if form else text
    return final_answer(text.replace(",", ".") if form is COMMA else text)


def final_answer(text: str) -> Fraction | str:
    """What of a text is compared: of what is marked as its answer (GSM8K's ####, \\boxed{}), or else of all of it, the
    last number, with thousands separators, currency and units left out; where there is no number, the text without case,
    white space and punctuation at its ends."""
    part = _marked(text)
    for pattern, shorter in REWRITTEN:
        part = pattern.sub(shorter, part)
    numbers = list(_numbers(part))
    if numbers:
        return numbers[-1]
    text = " ".join(part.casefold().split())
    bare = text.strip(ENDS)
    return (bare[1:-1] if len(bare) > 2 and bare[0] + bare[-1] in ("()", "[]", "{}") else bare) or text


def _marked(text: str) -> str:
    """What stands behind ####, or in the last \\boxed{}, or else all; without what was thought before the answer."""
    text = unicodedata.normalize("NFC", text.rpartition("</think>")[2]).replace("\u2212", "-").strip()
    if "<think>" in text:  # the thought was cut off
        return ""
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0]
    return text if (boxed := _boxed(text)) is None else boxed.strip()


def _numbers(text: str):
    position = 0
    while start := NUMBER.search(text, position):
        match = DIGITS.match(text, start.start())
        position = match.end()
        value = Fraction(Decimal(f"{match[1].replace(',', '')}{match[2] or ''}e{match[3] or 0}"))
        value = value / int(match[4]) if match[4] and int(match[4]) else value
        yield -value if match[0][0] == "-" else value


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
