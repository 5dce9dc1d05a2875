"""The built-in reward functions."""

import pytest

from phi2_grpo.rewards.functions import ending, language, length, reference, repetition
from phi2_grpo.rewards.tasks import correct


@pytest.mark.parametrize(("tokens", "ended", "reward"), [(128, True, 1.0), (64, True, 0.5), (192, True, 0.5), (0, True, 0.0),
    (256, True, 0.0), (500, True, 0.0), (128, False, 0.5), (96, False, 0.375)])  # fmt: skip
def test_length_and_ending(tokens, ended, reward):
    assert length(answer_tokens=[tokens], ended=[ended], target_tokens=128) == [reward]
    assert ending(ended=[ended]) == [1.0 if ended else 0.0]


@pytest.mark.parametrize(("ids", "penalty"), [((1, 2, 3, 4), 0.0), ((5,) * 5, -2 / 3), ((1, 2, 3, 1, 2, 3), -0.25), ((), 0.0)])
def test_repetition(ids, penalty):
    assert repetition(answer_ids=[ids]) == [pytest.approx(penalty)]


@pytest.mark.parametrize(("answer", "lang", "low", "high"), [
    ("Las plantas del jardín necesitan mucha agua en el verano.", "es", 0.9, 1.0),
    ("Las plantas del jardín necesitan mucha agua en el verano.", "en", 0.0, 0.1),
    ("As plantas do jardim não precisam de muita água no verão.", "pt-BR", 0.9, 1.0),
    ("花园里的植物在夏天需要很多水。", "zh", 0.9, 1.0),
    ("Plantene i hagen trenger mye vann om sommeren.", "nb", 0.5, 1.0),
    ("", "en", 0.0, 0.0)])  # fmt: skip
def test_language(answer, lang, low, high):
    (value,) = language(answers=[answer], lang=[lang])
    assert low <= value <= high


def test_what_cannot_be_judged_is_not_scored():
    assert language(answers=["nuqneH"], lang=["tlh"]) == [None]
    assert correct(answers=["18", "18"], reference=[None, "18"]) == [None, 1.0]
    same, other, none = reference(answers=["Water it."] * 3, reference=["Water it.", "Quick fox", None])
    assert same == pytest.approx(1.0) and other < 0.3 and none is None
    assert reference(answers=[""], reference=["Water it."]) == [0.0]
