"""The picture of an evaluation report."""

from pathlib import Path

import numpy

from phi2_grpo.common.console import BLUE, GREY, ORANGE, make_figure, plot_interval, save_figure
from phi2_grpo.common.stats import FEW, interval

COLORS = {"base": GREY, "tuned": BLUE}
# Metrics that are not rewards: whether more is better (None: neither); they have no win rate.
DIRECTION = {"answer tokens": None, "KL to base": None, "reference NLL": False}


def draw(report: dict, samples: list[dict], path: Path) -> None:
    """Paired differences, answer lengths, win rates by metric, and differences by language."""
    base, tuned = report["names"]
    headline, metrics = report["headline"], report["metrics"]
    figure, (differences, lengths, wins, languages) = make_figure(2, 2, 11, 8)
    if m := metrics.get(headline):
        differences.hist([t - b for b, t in _pairs(report, headline)], bins=20, color=BLUE, alpha=0.7)
        if m["low"] is not None:
            differences.axvspan(m["low"], m["high"], color=ORANGE, alpha=0.4, label="mean, 95 % interval")
            differences.legend(frameon=False)
        differences.axvline(m["difference"], color=ORANGE)
        differences.axvline(0, color="grey", linestyle="--", linewidth=1)
    differences.set(title=f"{headline}: {tuned} less {base}", xlabel="difference on a prompt", ylabel="prompts")
    tokens = {side: [s["answer"].tokens for s in samples if s["side"] == side] for side in COLORS}
    edges = numpy.linspace(0, max(map(max, tokens.values())) + 1, 31)
    for side, name in zip(COLORS, report["names"], strict=True):
        lengths.hist(tokens[side], edges, color=COLORS[side], alpha=0.6, label=name)
    lengths.legend(frameon=False)
    lengths.set(title="Answer lengths", xlabel="tokens", ylabel="answers")
    rated = [name for name in metrics if name not in DIRECTION][::-1]
    for i, name in enumerate(rated):
        won = [(t > b) + 0.5 * (t == b) for b, t in _pairs(report, name)]
        plot_interval(wins, i, metrics[name]["win_rate"], interval(won), BLUE)
    wins.axvline(0.5, color="grey", linestyle="--", linewidth=1)
    wins.set_yticks(range(len(rated)), rated)
    wins.set(title=f"Share of prompts that {tuned} wins (ties half)", xlim=(0, 1), ylim=(-0.6, len(rated) - 0.4))
    shown = list(report["languages"].items())[::-1]
    for i, (_, m) in enumerate(shown):
        plot_interval(languages, i, m["difference"], (m["low"], m["high"]), BLUE)
    if shown:
        languages.axvline(0, color="grey", linestyle="--", linewidth=1)
        languages.set_yticks(range(len(shown)), [f"{code} ({m['prompts']})" for code, m in shown])
        title = f"{headline}: difference by language, {report['level']:.1%} intervals"
        languages.set(title=title, ylim=(-0.6, len(shown) - 0.4))
    else:
        languages.text(0.5, 0.5, f"no language has {FEW} prompts", ha="center", transform=languages.transAxes)
        languages.set_axis_off()
    save_figure(figure, path)


def _pairs(report: dict, metric: str | None) -> list[tuple[float, float]]:
    """(base, tuned) of the prompts that have both."""
    sides = report["values"].get(metric) or {"base": [], "tuned": []}
    return [pair for pair in zip(sides["base"], sides["tuned"], strict=True) if None not in pair]
