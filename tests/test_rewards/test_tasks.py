"""Right or wrong: what counts as the same answer, and which form."""

import json
from fractions import Fraction

import pytest
from conftest import SHARED

from phi2_grpo.common.cli import UserError
from phi2_grpo.rewards import tasks
from phi2_grpo.rewards.tasks import correct, final_answer, format

GSM8K = SHARED / "gsm8k"
CASES = [  # answer, reference, right
    ("She has 16 - 3 - 4 = 9 eggs, so 9 * 2 = $18", "reasoning\n#### 18", 1),  # the last one counts
    ("1,234,567 people", "1234567", 1), ("Das macht 12,5 €.", "12,50 €", 1), ("12,50", "7,50", 0),
    ("10,000", "10 000", 1), ("#### 3,50", "So: #### 12,50", 0), ("Es sind 3,50 €", "Es sind 12,50 €", 0),
    ("9,14159", "3,14159", 0), ("345", "So we get 12\n345", 1), ("<think>\nIt is 345, but", "345", 0), ("5 000", "Es sind 10 000", 0), ("13,50", "Antwort: 12,50", 0), ("25", "25 miles^2", 1), ("2xy^3", "2xy^2", 0), ("The area is 30 cm^2.", "25 cm^2", 0),
    ("9.8", "9.8 m/s^2", 1), ("3x^2", "3x^3", 0), ("9.8m/s^2", "9.8 m/s^2", 1), ("6", "10^6", 0), ("6.02 x 10^23atoms", "6.02e23", 1), ("6 x 10^8", "3 x 10^8", 0), (r"5 \times 10^{3}", "5000", 1),
    ("0.00005", "5e-05", 1), ("10\u202f000,5", "10.000,50", 1), ("25 000", "10 000", 0), ("$1,000.50", "1000.5", 1),
    ("5 km", "5 miles", 1),  # units are not compared
    ("x = -5", "-5", 1), ("\u22125", "-5", 1), ("8-5", "5", 1),  # a difference, or a range
    ("6 / 8", "3/4", 1), (r"\boxed{\frac{3}{4}}", "3/4", 1), (r"So \boxed{42} is it, after 7 steps.", "42", 1),
    (r"\boxed{{1}2", "12", 0), ("5/0", "5", 1),  # no number is divided by zero
    ("#### 42\nand 7 more", "42", 1), ("", "18", 0), ("Paris.", "paris", 1), ("北京。", "北京", 1),
    ("cafe\u0301", "caf\u00e9", 1), ("<think>Rome has 3 letters more</think>\nParis", "Paris", 1), ("(B)", "b", 1),
    ("“Paris”", "Paris", 1), ("", "[]", 0), (r"\boxed{(3, 4)}", r"\boxed{(3,4)}", 1),
    (r"\boxed{\text{Paris}}", "Paris", 0),
    ("1/" + "3" * 9999, "3", 0),  # Python reads no whole number of so many digits
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference", "right"), CASES)
def test_correct(answer, reference, right):
    assert correct(answers=[answer], reference=[reference]) == [right]


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K's rows")
def test_gsm8k_s_own_answers():
    answers = [json.loads(line)["answer"] for path in GSM8K.rglob("*.jsonl") for line in path.open()]
    numbers = [Fraction(answer.split("####")[1].replace(",", "")) for answer in answers]
    assert len(answers) > 1000 and list(map(final_answer, answers)) == numbers


def test_format():
    pattern = r"<think>.+</think>\s*<answer>.+</answer>"
    good, bad = "<think>a\nb</think>\n<answer>18</answer>", "It is <think>a</think><answer>18</answer>"
    assert format(answers=[good, bad, ""], format_regex=pattern) == [1.0, 0.0, 0.0]
    with pytest.raises(UserError, match="--format_regex"):
        format(answers=[good], format_regex="")


def test_a_pattern_without_end_scores_nothing(monkeypatch):
    monkeypatch.setattr(tasks, "TIMEOUT", 0.01)
    assert format(answers=["ab" * 30 + "c"], format_regex="(((ab)*)*)*d") in ([None], [0.0])  # newer engines may see it at once
