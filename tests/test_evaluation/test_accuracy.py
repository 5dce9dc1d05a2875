"""Accuracy of tasks with a right answer, and how often a reward model agrees with people, with its intervals."""

from itertools import combinations

import numpy
import pytest

from phi2_grpo.evaluation import reward_accuracy
from phi2_grpo.evaluation.accuracy import accuracy_sentence, pass_at_k, summarize_accuracy


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 2), (4, 1, 2), (4, 2, 2), (4, 4, 4), (5, 3, 3), (8, 1, 8)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c, k):
    answers = [1] * c + [0] * (n - c)
    subsets = list(combinations(answers, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def samples(side: str, right: list[list[float | None]]) -> list[dict]:
    return [{"side": side, "prompt": i, "scores": {"correct": score}} for i, of in enumerate(right) for score in of]


def test_accuracy_of_both_sides_and_what_it_says():
    base = [[0.0, 0.0], [1.0, 0.0]] * 15 + [[None, None]]
    tuned = [[1.0, 0.0], [1.0, 1.0]] * 15 + [[None, None]]
    greedy = {"base": [0.0, 1.0] * 15 + [None], "tuned": [1.0, 1.0] * 14 + [0.0, 0.0, None]}
    accuracy = summarize_accuracy(samples("base", base) + samples("tuned", tuned), greedy, 2)
    assert accuracy["pass@k"] == {1: {"base": 0.25, "tuned": 0.75}, 2: {"base": 0.5, "tuned": 1.0}}
    assert (accuracy["wrong to right"], accuracy["right to wrong"]) == (14, 1)
    assert accuracy["greedy"]["verdict"] == "better" and accuracy_sentence(accuracy, "better").endswith(
        "They are right more often."
    )
    same = {"base": [0.0, 1.0] * 15, "tuned": [0.0, 1.0] * 15}
    accuracy = summarize_accuracy(samples("base", [[0.0]] * 30) + samples("tuned", [[1.0]] * 30), same, 1)
    assert "is not shown" in accuracy_sentence(accuracy, "better")
    assert accuracy_sentence(accuracy, "no difference shown").endswith("0 the other way.")


def pair(prompt: str, chosen: str, rejected: str, lang: str = "en") -> dict:
    sides = {"chosen": [{"role": "assistant", "content": chosen}], "rejected": [{"role": "assistant", "content": rejected}]}
    return {"message_id": prompt, "lang": lang, **sides}


def test_accuracies_of_known_pairs():
    pairs = [pair(str(i), "long reply", "short") for i in range(30)]
    pairs += [pair(str(i), "x" * 99, "y" * 100, "es") for i in range(30, 50)]
    accuracy = reward_accuracy.measure_accuracy(pairs, [1.0] * 20 + [0.0] * 10 + [2.0] * 20, [0.0] * 50)
    rows = {row["group"]: row for row in accuracy["groups"]}
    assert rows["all"]["model"] == 0.9 and accuracy["ties"] == 10, "20 right, 10 ties counted half, 20 right"
    near = rows["nearly equal length"]
    assert rows["all"]["longer"] == 0.6 and (near["pairs"], near["longer"]) == (20, 0.0)
    assert rows["language es"]["model"] == 1.0 and rows["language en"]["model"] == pytest.approx(25 / 30, abs=1e-4)
    low, high = rows["all"]["model_interval"]
    assert 0.8 < low < 0.9 < high < 1.0 and "better than" in reward_accuracy.verdict(accuracy)
    alone = reward_accuracy.measure_accuracy(pairs[:30], [1.0] * 30, [0.0] * 30)
    assert [row["group"] for row in alone["groups"]] == ["all"], "one language alone would say the same again"


@pytest.mark.parametrize(("model_right", "words"), [
    (50, ["better than \"the longer", "better than chance"]), (2, ["worse than", "not shown"]),
    (25, ["no difference shown", "not shown to be better than chance"])])  # fmt: skip
def test_the_verdict_s_words_are_fixed_by_the_intervals(model_right, words):
    pairs = [pair(str(i), *(("long one", "short") if i % 2 else ("short", "long one"))) for i in range(50)]
    accuracy = reward_accuracy.measure_accuracy(pairs, [float(i < model_right) for i in range(50)], [0.5] * 50)
    assert all(word in reward_accuracy.verdict(accuracy) for word in words), reward_accuracy.verdict(accuracy)


def test_intervals_cover_the_truth():
    """Pairs of one prompt stand and fall together; the interval knows, where one over pairs would be far too narrow."""
    generator = numpy.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = numpy.repeat((generator.random(60) < 0.65).astype(float), 4)
        low, high = reward_accuracy.clustered_interval(values, numpy.repeat(numpy.arange(60), 4), seed=trial)
        covered += low <= 0.65 <= high
    assert 180 <= covered <= 200, "95 % of 200, give or take"
    assert reward_accuracy.clustered_interval(numpy.ones(9), list("aaabbbccc")) == (float("-inf"), float("inf"))
