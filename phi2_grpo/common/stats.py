"""Is a difference real? Sign-flip intervals over prompts, win rates, and the verdicts that intervals fix."""

import functools
from dataclasses import asdict, dataclass

import numpy

FLIPS = 9999  # random subsets; 1 / (FLIPS + 1) is the least p that they can show
FEW = 20  # prompts; a result on fewer is called weak


def mean(values: list[float | None]) -> float | None:
    """Their mean; None where there are no values, or where one is None."""
    return None if None in values or not values else sum(values) / len(values)


@dataclass(frozen=True)
class Paired:
    """One metric of two models on the same prompts."""

    prompts: int  # that both have a value for
    base: float
    tuned: float
    difference: float  # mean over prompts of tuned less base
    low: float | None  # interval of the difference at `level`; None where the prompts are too few for one
    high: float | None
    level: float  # 0.95: at no effect, 95 of 100 such intervals hold 0
    win_rate: float  # share of prompts on which tuned has more, ties half

    def to_json(self) -> dict:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def interval(values) -> tuple[float, float] | None:
    """95 % interval of the mean of independent values, Student's t; None for fewer than two, or where all are equal."""
    from scipy import stats  # a second to import, which prepare_data.py has no need of

    if len(set(values)) < 2:
        return None
    centre, margin = numpy.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(centre - margin), float(centre + margin)


def sign_flip_interval(differences, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Interval of the mean of paired differences: every value that a sign-flip permutation test does not reject.

    Under no effect the sign of each difference is a coin's throw, so the test is right at any number of prompts, also where
    few of them differ. For other values than 0 it supposes that differences are symmetric about their mean: of 0/1 rewards near
    their limit, or of equal differences, the interval is too narrow. Flipping a subset's signs changes the mean's sign about c
    where the subset's own mean is above c: so the ends are quantiles of the means of random subsets (Hartigan, "Using subsample
    values as typical values", 1969).
    None where the level asks for more than so few values can show.
    """
    values = numpy.asarray(differences, float)
    subsets, sizes = _subsets(len(values), seed)
    # (FLIPS,); rounded, or what cancels out leaves a trace.
    means = numpy.round((subsets @ values) / numpy.maximum(sizes, 1), 12)
    tail = (1 - level) / 2
    # Less one standard error, for the subsets are drawn: so the level is at least what it says.
    rank = int(tail * (FLIPS + 1) - (FLIPS * tail * (1 - tail)) ** 0.5) - 1
    if rank < 0:
        return None
    # The mean of an empty subset may be anything.
    low = numpy.sort(numpy.where(sizes, means, -numpy.inf))[rank]
    high = numpy.sort(numpy.where(sizes, means, numpy.inf))[-1 - rank]
    return (float(low), float(high)) if numpy.isfinite([low, high]).all() else None


@functools.lru_cache(maxsize=2)  # the metrics of a report have as many prompts, and its languages fewer
def _subsets(count: int, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """FLIPS random subsets of `count` values, as rows of 0 and 1 (FLIPS, N), and their sizes (FLIPS,)."""
    subsets = numpy.random.default_rng(seed).random((FLIPS, count)) < 0.5
    return subsets.astype(float), subsets.sum(1)


def simultaneous(rows: int) -> float:
    """The level for each of `rows` intervals at which all hold together in 95 of 100 reports (Bonferroni)."""
    return 1 - 0.05 / max(1, rows)


def paired(base: list[float | None], tuned: list[float | None], level: float = 0.95) -> Paired | None:
    """Compare two models prompt by prompt. Prompts that one of them has no value for are left out; None if all are."""
    both = numpy.array([(b, t) for b, t in zip(base, tuned, strict=True) if b is not None and t is not None], float)
    if not len(both):
        return None
    differences = both[:, 1] - both[:, 0]
    wins = (differences > 0) + 0.5 * (differences == 0)
    low, high = sign_flip_interval(differences, level) or (None, None)
    means = (float(both[:, 0].mean()), float(both[:, 1].mean()), float(differences.mean()))
    return Paired(len(both), *means, low, high, level, float(wins.mean()))


def verdict(comparison: Paired, higher_is_better: bool | None = True) -> str:
    """better, worse or no difference shown (higher or lower, for what is neither good nor bad), as the interval says."""
    if comparison.low is None or round(comparison.low, 4) <= 0 <= round(comparison.high, 4):  # as `to_json`
        return "no difference shown"
    higher = comparison.low > 0
    if higher_is_better is None:
        return "higher" if higher else "lower"
    return "better" if higher == higher_is_better else "worse"
