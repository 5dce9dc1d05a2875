"""The intervals and the verdicts: right as often as they say."""

import numpy
import pytest
from scipy.stats import permutation_test

from phi2_grpo.common import stats

NONE = "no difference shown"


def test_intervals_hold_the_truth():
    """2,000 simulations of 100 prompts with a known mean, of a skewed kind: 92 to 96 % of the 95 % intervals hold it."""
    values = numpy.random.default_rng(0).exponential(1, (2000, 100)) - 0.9
    covered = sum(low <= 0.1 <= high for low, high in map(stats.interval, values))
    assert 1840 <= covered <= 1920, covered
    assert stats.interval([1.0]) is None and stats.interval([0.0] * 32) is None


def test_paired_numbers():
    pair = stats.paired([0.0, 0.0, 1.0, None], [1.0, 0.0, 0.5, 7.0])
    assert (pair.prompts, pair.base, pair.tuned) == (3, pytest.approx(1 / 3), pytest.approx(0.5))
    assert pair.difference == pytest.approx(1 / 6) and pair.win_rate == pytest.approx(0.5)
    assert stats.paired([None], [1.0]) is None
    for prompts in (1, 5):
        few = stats.paired([0.0] * prompts, [1.0] * prompts)
        assert few.low is None and stats.verdict(few) == NONE, "2 x 1/32 is more than 5 %"
    assert stats.paired([0.0] * 6, [1.0] * 6).low == 1.0, "2 x 1/64 is less"


@pytest.mark.parametrize(("differ", "expected"), [(4, NONE), (5, NONE), (7, "worse")])
def test_few_prompts_that_differ(differ, expected):
    """Of 70, all in one direction: by the sign test's arithmetic, 2 x 2^-differ against 5 %."""
    tuned = [0.0] * (70 - differ) + [-1.0] * differ
    assert stats.verdict(stats.paired([0.0] * 70, tuned)) == expected
    assert stats.verdict(stats.paired([0.0] * 70, tuned, stats.simultaneous(10))) == NONE, "2 x 2^-7 is more than 0.5 %"


def test_sign_flips_agree_with_scipy():
    """The interval leaves 0 out exactly where scipy's exact permutation test has a p of at most 5 %."""
    draw = numpy.random.default_rng(0)
    for shift in (0.2, 0.5, 0.8, 1.1):
        differences = draw.normal(shift, 1, 10)
        exact = permutation_test((differences,), numpy.mean, permutation_type="samples", n_resamples=2**10).pvalue
        low, high = stats.sign_flip_interval(differences)
        assert (low > 0 or high < 0) == (exact <= 0.05), (differences, exact)


@pytest.mark.parametrize(("low", "high", "better", "expected"), [
    (0.1, 0.2, True, "better"), (-0.2, -0.1, True, "worse"), (-0.1, 0.2, True, NONE), (None, None, True, NONE),
    (0.1, 0.2, False, "worse"), (0.1, 0.2, None, "higher"), (-0.2, -0.1, None, "lower"), (0.0, 0.2, True, NONE)])  # fmt: skip
def test_a_verdict_follows_from_the_interval(low, high, better, expected):
    assert stats.verdict(stats.Paired(9, 0, 0, 0, low, high, 0.95, 0.5), better) == expected
