"""Accuracy of tasks with a right answer, from known samples."""

from itertools import combinations

import pytest

from phi2_grpo.evaluation.accuracy import accuracy_sentence, pass_at_k, summarize_accuracy


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 2), (4, 1, 2), (4, 2, 2), (4, 4, 4), (5, 3, 3), (8, 1, 8)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c, k):
    answers = [1] * c + [0] * (n - c)
    subsets = list(combinations(answers, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def samples(side: str, right: list[list[float | None]]) -> list[dict]:
    return [{"side": side, "prompt": i, "scores": {"correct": score}} for i, of in enumerate(right) for score in of]


def test_accuracy_of_both_sides():
    base = [[0.0, 0.0], [1.0, 0.0]] * 15 + [[None, None]]
    tuned = [[1.0, 0.0], [1.0, 1.0]] * 15 + [[None, None]]
    greedy = {"base": [0.0, 1.0] * 15 + [None], "tuned": [1.0, 1.0] * 14 + [0.0, 0.0, None]}
    accuracy = summarize_accuracy(samples("base", base) + samples("tuned", tuned), greedy, 2)
    assert accuracy["pass@k"] == {1: {"base": 0.25, "tuned": 0.75}, 2: {"base": 0.5, "tuned": 1.0}}
    assert (accuracy["wrong to right"], accuracy["right to wrong"]) == (14, 1)
    assert accuracy["greedy"]["verdict"] == "better" and "Learnt" in accuracy_sentence(accuracy, "better")


def test_what_greedy_answers_do_not_show_is_sharpened():
    same = {"base": [0.0, 1.0] * 15, "tuned": [0.0, 1.0] * 15}
    accuracy = summarize_accuracy(samples("base", [[0.0]] * 30) + samples("tuned", [[1.0]] * 30), same, 1)
    assert "Sharpened" in accuracy_sentence(accuracy, "better")
    assert accuracy_sentence(accuracy, "no difference shown").endswith("0 the other way.")
