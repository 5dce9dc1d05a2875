"""How often does a validation say better or worse where nothing has changed?

  python benchmarks/verdicts.py [--reports 2000]

Both models' values are drawn alike (in the last kind they have the same mean), so every better or worse is false. A report is
seven metrics, the first its headline, and that in four languages; the verdicts follow validate_model.py's rule. Beside it, what
95 % percentile bootstrap intervals for every row, a common choice, would have said.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

METRICS, LANGUAGES = 7, 4


def normal(draw, prompts: int) -> numpy.ndarray:
    """Base and tuned (2, N): the prompt's own level, and a draw each."""
    return draw.normal(size=prompts) + draw.normal(size=(2, prompts))


def skewed(draw, prompts: int) -> numpy.ndarray:
    return draw.lognormal(sigma=1.5, size=(2, prompts))


def ended(draw, prompts: int) -> numpy.ndarray:
    """0 or 1, as one sample's `ending`."""
    return (draw.random((2, prompts)) < 0.3).astype(float)


def few_differ(draw, prompts: int) -> numpy.ndarray:
    """One prompt in twenty differs, by as much each."""
    values = numpy.zeros((2, prompts))
    which = numpy.flatnonzero(draw.random(prompts) < 0.05)
    values[draw.integers(0, 2, len(which)), which] = 1.0
    return values


def few_lose(draw, prompts: int) -> numpy.ndarray:
    """Nineteen prompts in twenty gain a little, one loses as much as all they gain: far from symmetric, and 0 on average."""
    return numpy.stack([numpy.zeros(prompts), numpy.where(draw.random(prompts) < 0.05, -0.95, 0.05)])


def false_verdicts(values: list[numpy.ndarray], interval: Callable, level: float) -> tuple[float, bool]:
    """Of a report: the share of metrics whose verdict would be false as the headline's; and whether any other row's is false"""
    languages = [values[0][:, start::LANGUAGES] for start in range(LANGUAGES)]

    def wrong(sides: numpy.ndarray, level: float) -> bool:
        ends = interval(sides[1] - sides[0], level)
        return bool(ends and not ends[0] <= 0 <= ends[1])

    return numpy.mean([wrong(sides, 0.95) for sides in values]), any(wrong(sides, level) for sides in [*values[1:], *languages])


def bootstrap(differences: numpy.ndarray, level: float) -> tuple[float, float]:
    rows = numpy.random.default_rng(0).integers(0, len(differences), (1000, len(differences)))
    low, high = numpy.quantile(differences[rows].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return low, high


def error(trials: int) -> float:
    """Standard error of a share of 5 %, in points."""
    return 100 * (0.05 * 0.95 / trials) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=2000)
    arguments = parser.parse_args()
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table
    from phi2_grpo.common.stats import sign_flip_interval, simultaneous

    rows = []
    for kind in (normal, skewed, ended, few_differ, few_lose):
        for prompts in (80, 200):
            draw = numpy.random.default_rng(0)
            reports = [[kind(draw, prompts) for _ in range(METRICS)] for _ in range(arguments.reports)]
            level = simultaneous(METRICS - 1 + LANGUAGES)
            ours = numpy.mean([false_verdicts(values, sign_flip_interval, level) for values in reports], 0)
            usual = numpy.mean([false_verdicts(values, bootstrap, 0.95) for values in reports], 0)
            rows.append([kind.__name__.replace("_", " "), str(prompts), *(f"{share:.1%}" for share in (*ours, *usual))])
    columns = ("values", "prompts", "headline", "any other row", "headline, bootstrap", "any other row, bootstrap at 95 %")
    body = "\n".join(markdown_table(columns, rows)) + (
        f"\n\nShare of {arguments.reports} reports with a false verdict, no effect in any. A report: {METRICS} metrics, and "
        f"the headline in {LANGUAGES} languages. Each metric was taken for the headline in turn. Standard errors at 5 %: "
        f"{error(arguments.reports * METRICS):.2f} points of a headline's share, {error(arguments.reports):.2f} of the rest."
    )
    write_section("False verdicts", f"python benchmarks/verdicts.py --reports {arguments.reports}", body, "numpy", "scipy")


if __name__ == "__main__":
    main()
