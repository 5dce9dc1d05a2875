"""What the line of a report says of known answers."""

import pytest

from phi2_grpo.evaluation import report
from phi2_grpo.models.answers import Answer
from phi2_grpo.rewards.scorer import Scorer, add_built_in, parse_rewards

SHORT, RIGHT = [list(range(3))] * 30, [list(range(8))] * 30


def summary(base: list[list[int]], tuned: list[list[int]], *rewards: str, lang: list[str] | None = None) -> dict:
    """Of answers with these tokens to prompts (English ones, if not `lang`); each prompt has one answer."""
    lang = lang or ["en"] * len(base)
    scorer = Scorer(None, 8, add_built_in(parse_rewards(list(rewards or ["length"]))))
    question = [{"role": "user", "content": "Q"}]
    prompts = [{"prompt": question, "lang": code, "message_id": str(i)} for i, code in enumerate(lang)]
    samples = []
    for side, answers in (("base", base), ("tuned", tuned)):
        for i, ids in enumerate(answers):
            scores = {"length": max(0.0, 1 - abs(len(ids) - 8) / 8), "repetition": -1.0 * (len(set(ids)) == 1)}
            scores |= {"ending": 1.0, "correct": 1.0}
            answer = Answer("x", tuple(ids), True, "ended by itself")
            samples.append({"side": side, "prompt": i, "answer": answer, "score": 0.0, "scores": scores})
    return report.summarize(samples, prompts, {}, scorer, ("base", "tuned"))


@pytest.mark.parametrize(("base", "tuned", "rewards", "expected"), [
    (SHORT, RIGHT, (), "Tuned beats base on the reward length: 1.00 against 0.38, +0.62 [0.62, 0.62], 30 prompts"),
    (RIGHT, SHORT, (), "Tuned is worse than base on the reward length"),
    (SHORT, SHORT, (), "Tuned shows no difference from base on the reward length"),
    (RIGHT, SHORT, ("length:-1",), "Tuned beats base on the reward length: 0.38 against 1.00"),  # less of it is better
    (SHORT[:6], RIGHT[:6], (), "Tuned beats base on the reward length: 1.00 against 0.38, +0.62 [0.62, 0.62], 6 prompt"),
    (SHORT[:3], RIGHT[:3], (), "Tuned shows no difference from base on the reward length: 1.00 against 0.38, +0.62, 3 p"),
    (SHORT, RIGHT, ("language",), "No reward could be computed on these prompts.")])  # fmt: skip
def test_the_line(base, tuned, rewards, expected):
    numbers = summary(base, tuned, *rewards)
    assert numbers["line"].startswith(expected) and {"language", "reference"} <= set(numbers["missing"])
    assert "None" not in report.levels(numbers) + str(list(report._examples(numbers, 0)))


def test_the_line_names_gaming():
    long, chanted = [list(range(i, i + 12)) for i in range(30)], [[7] * 8] * 30
    gamed = summary(long, chanted)
    assert "; repetition worse;" in gamed["line"] and "Gamed?" in gamed["line"] and "repetition" in gamed["alerts"]
    assert "Gamed?" not in summary(long, [list(range(i, i + 10)) for i in range(30)])["line"]


def test_two_languages_with_enough_prompts_have_their_own_rows():
    two = ["en"] * 20 + ["es"] * 20
    assert list(summary(SHORT[:20] * 2, RIGHT[:20] * 2, lang=two)["languages"]) == ["en", "es"]
    assert not summary(SHORT, RIGHT)["languages"]
    assert not summary(SHORT[:20] * 2, RIGHT[:20] * 2, lang=["fr", *two[1:]])["languages"]  # 19, so one alone


def test_no_interval_is_rounded_onto_0():
    measured = {"difference": 0.02, "low": 0.0029, "high": 0.0412, "base": 0.5, "tuned": 0.52, "prompts": 80, "win_rate": 0.6}
    assert report._difference(measured, 2) == "+0.020 [0.003, 0.041]"
    for low in (0.0, -0.0002):
        assert report._difference({**measured, "low": low}, 2) == "+0.02 [0.00, 0.04]", "it holds 0"
    assert report._difference({**measured, "low": None}, 2) == "+0.02"


def test_a_row_says_how_many_prompts_it_has_and_calls_good_what_was_asked_for():
    numbers = summary([[1, 1]] * 5 + SHORT[:25], RIGHT, "ending")
    numbers["metrics"]["repetition"]["prompts"] = 25
    names = [row[0] for row in report.metric_rows(numbers)]
    assert {"ending *", "repetition (25)", "length"} <= {*names}
    assert numbers["metrics"]["length"]["verdict"] == "higher", "no reward has that target"
    assert summary(SHORT, RIGHT)["metrics"]["length"]["verdict"] == "better"


def test_a_text_cannot_leave_its_block():
    assert report.fenced("a ```` b").startswith("`````text\n") and report.fenced("x").startswith("```text\n")
