"""The picture of an evaluation report."""

from pathlib import Path
from statistics import pstdev

from phi2_grpo.common.console import BLUE, GREEN, GREY, RED, make_figure, plot_interval

COLORS = {"base": GREY, "tuned": BLUE}
VERDICTS = {"better": GREEN, "worse": RED}  # others are grey
# Metrics that are not rewards: whether more is better (None: neither).
DIRECTION = {"answer tokens": None, "distinct-2": None, "KL to base": None, "reference NLL": False}


def draw(report: dict, samples: list[dict], path: Path) -> None:
    """All metrics of the table with their intervals, the answer lengths, and the headline by language where there are two."""
    languages, (base, tuned) = report["languages"], report["names"]
    figure, (metrics, lengths, *more) = make_figure(1, 3 if languages else 2, 16 if languages else 12, 5)
    names = []
    for i, (name, m) in enumerate(reversed(report["metrics"].items())):
        # In standard deviations over prompts, so that nats, tokens and shares stand on one axis.
        pairs = [pair for pair in zip(*report["values"][name].values(), strict=True) if None not in pair]
        unit = pstdev(t - b for b, t in pairs) or 1.0
        _plot_difference(metrics, i, m, unit)
        names.append(f"{name}   {format_number(m['base'])} → {format_number(m['tuned'])}")
    _finish_differences(metrics, names, f"{tuned} minus {base}, by metric: green better, red worse")
    metrics.set_xlabel("mean and interval, in standard deviations over prompts")
    tokens = {side: [s["answer"].tokens for s in samples if s["side"] == side] for side in COLORS}
    longest = max(map(max, tokens.values()))
    width = 1 + longest // 40  # whole tokens, or the bars would have gaps
    edges = range(0, longest + 2 * width, width)
    for side, name in zip(COLORS, report["names"], strict=True):
        lengths.hist(tokens[side], edges, color=COLORS[side], alpha=0.6, label=name)
    lengths.legend(frameon=False)
    lengths.set(title="Answer lengths", xlabel="tokens", ylabel="answers")
    for each in more:
        names = []
        for i, (code, m) in enumerate(reversed(languages.items())):
            _plot_difference(each, i, m, 1.0)
            names.append(f"{code} ({m['prompts']})")
        _finish_differences(each, names, f"{report['headline']}: {tuned} minus {base}, by language (prompts)")
    figure.savefig(path)


def _plot_difference(axes, y: int, m: dict, unit: float) -> None:
    ends = m["low"] is not None and (m["low"] / unit, m["high"] / unit)
    plot_interval(axes, y, m["difference"] / unit, ends, VERDICTS.get(m["verdict"], GREY))


def _finish_differences(axes, names: list[str], title: str) -> None:
    axes.axvline(0, color="grey", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set(title=title, ylim=(-0.6, len(names) - 0.4))


def format_number(value: float | None, places: int = 2, sign: str = "") -> str:
    return "?" if value is None else f"{round(value, places) + 0.0:{sign}.{places}f}"  # + 0.0: no -0.00
