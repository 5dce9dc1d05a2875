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


def test_a_text_cannot_leave_its_block():
    assert report.fenced("a ```` b").startswith("`````text\n") and report.fenced("x").startswith("```text\n")
