"""How often a reward model agrees with people, with intervals, beside the rule that the longer reply wins."""

import numpy
from scipy import stats

from phi2_grpo.common.console import BLUE, GREEN, GREY, RED, make_figure, markdown_table, plot_interval
from phi2_grpo.common.progress import progress_bar
from phi2_grpo.rewards.reward_model import score_answers

NEAR = 0.15  # two replies are of nearly equal length where they differ by at most this share of the longer
FEW = 20  # pairs; a language with fewer, or from fewer prompts, is not shown by itself
FEW_PROMPTS = 10  # and has no interval: too few to redraw
LABELS = {"model": "reward model", "longer": "the longer reply wins"}


def agreement(chosen: list[float], rejected: list[float]) -> numpy.ndarray:
    """1 where the reward model scores the reply that people ranked higher above the other, 0 where below, 1/2 where it ties."""
    difference = numpy.subtract(chosen, rejected)
    return (difference > 0) + 0.5 * (difference == 0)


def clustered_interval(values: numpy.ndarray, prompts: list, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean. Prompts are redrawn, with all their pairs: pairs of one prompt are not independent.

    scipy's percentile bootstrap. Infinite ends where there are fewer than FEW_PROMPTS.
    """
    _, group = numpy.unique(prompts, return_inverse=True)
    sums, counts = numpy.bincount(group, weights=values), numpy.bincount(group)
    if len(sums) < FEW_PROMPTS:
        return (float("-inf"), float("inf"))
    accuracy = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=5000,
        method="percentile",
        rng=numpy.random.default_rng(seed),
    ).confidence_interval
    return float(accuracy.low), float(accuracy.high)


def measure_accuracy(pairs: list[dict], chosen: list[float], rejected: list[float]) -> dict:
    """The reward model's accuracy on `pairs` (rows of NAME_preferences) beside that of "the longer reply wins".

    Returns `groups`, a list of {"group", "pairs", "model", "model_interval", "longer", "longer_interval", "difference",
    "difference_interval"} with all pairs first, then those of nearly equal length and of each of several
    languages that has enough; `ties`, how many pairs it scored alike; and `rank_correlation`, Spearman's, of score and length.
    """
    lengths = [(len(pair["chosen"][0]["content"]), len(pair["rejected"][0]["content"])) for pair in pairs]  # characters
    right = agreement(chosen, rejected)
    longer = agreement([length[0] for length in lengths], [length[1] for length in lengths])
    prompts = numpy.array([pair["message_id"] for pair in pairs])
    near = numpy.array([abs(a - b) <= NEAR * max(a, b) for a, b in lengths])
    groups: list[tuple[str, numpy.ndarray]] = [("all", numpy.ones(len(pairs), bool)), ("nearly equal length", near)]
    languages = numpy.array([pair["lang"] for pair in pairs])
    codes = sorted(set(languages.tolist()))
    groups += [(f"language {code}", languages == code) for code in codes if len(codes) > 1]  # one alone says the same again
    measured = []
    for name, mask in groups:
        enough = mask.sum() >= FEW and len(set(prompts[mask])) >= FEW_PROMPTS
        if mask.any() and (enough or name in ("all", "nearly equal length")):
            row = {"group": name, "pairs": int(mask.sum())}
            for key, values in (("model", right), ("longer", longer), ("difference", right - longer)):
                row[key] = round(float(values[mask].mean()), 4)
                row[f"{key}_interval"] = [_finite(end) for end in clustered_interval(values[mask], prompts[mask])]
            measured.append(row)
    every_length = [length[0] for length in lengths] + [length[1] for length in lengths]
    correlation = stats.spearmanr([*chosen, *rejected], every_length).statistic if len(set(every_length)) > 1 else 0.0
    ties = int(sum(a == b for a, b in zip(chosen, rejected, strict=True)))
    return {"groups": measured, "ties": ties, "rank_correlation": _finite(correlation)}


def _finite(value: float) -> float | None:
    return round(float(value), 4) if numpy.isfinite(value) else None


def scale(chosen: list[float], rejected: list[float]) -> dict[str, float]:
    """Mean and standard deviation of raw scores: what a reward model's scores are standardised by."""
    scores = numpy.array([*chosen, *rejected])
    return {"mean": float(scores.mean()), "std": float(scores.std()) or 1.0}


COLUMNS = ("held-out pairs", "number", LABELS["model"], LABELS["longer"], "difference")


def rows(accuracy: dict) -> list[list[str]]:
    """The accuracies for people, in per cent, by COLUMNS."""

    def cell(row: dict, key: str, sign: str) -> str:
        low, high = row[f"{key}_interval"]
        ends = "?" if low is None else f"{100 * low:{sign}.0f}, {100 * high:{sign}.0f}"
        return f"{100 * row[key]:{sign}.1f} [{ends}]"

    formats = {"model": "", "longer": "", "difference": "+"}
    return [[row["group"], str(row["pairs"]), *(cell(row, key, sign) for key, sign in formats.items())]
            for row in accuracy["groups"]]  # fmt: skip


def verdict(accuracy: dict) -> str:
    """What the numbers say, in words that the intervals fix."""
    everything = accuracy["groups"][0]
    low, high = everything["difference_interval"]
    unclear = low is None or round(low, 2) <= 0 <= round(high, 2)  # as `rows` prints them
    comparison = "no difference shown from" if unclear else "better than" if low > 0 else "worse than"
    lowest = everything["model_interval"][0]
    chance = "better than chance" if lowest is not None and round(lowest, 2) > 0.5 else "not shown to be better than chance"
    return (
        f"It agrees with people on {everything['model']:.1%} of {everything['pairs']} held-out pairs: {comparison} "
        f'"the longer reply wins" ({everything["longer"]:.1%}), and {chance}.'
    )


def markdown(accuracy: dict) -> list[str]:
    """The lines of the model card: verdict, table, and what its intervals are."""
    return [
        verdict(accuracy),
        "",
        *markdown_table(COLUMNS, rows(accuracy)),
        "",
        f"In %, 95 % bootstrap intervals over prompts; chance is 50. Nearly equal length: at most {NEAR:.0%} apart, so that "
        f"length cannot help. {accuracy['ties']} pairs were scored alike and count half; pairs that people ranked alike are "
        f"left out. Rank correlation of score and reply length: {accuracy['rank_correlation']}.",
    ]


def draw(accuracy: dict, chosen: list[float], rejected: list[float], path) -> None:
    """Histograms of the scores of preferred and other replies; accuracies with their intervals."""
    figure, (left, right) = make_figure(1, 2, 11, 4.6)
    edges = numpy.histogram_bin_edges([*chosen, *rejected], bins=30)
    left.hist(chosen, edges, alpha=0.6, color=GREEN, label="preferred by people")
    left.hist(rejected, edges, alpha=0.6, color=RED, label="the other reply")
    left.set(title="Scores of held-out human replies", xlabel="score (0: mean, 1: one standard deviation)", ylabel="replies")
    left.legend(frameon=False)
    groups = accuracy["groups"][::-1]
    for i, row in enumerate(groups):
        for key, shift, color in (("model", 0.14, BLUE), ("longer", -0.14, GREY)):
            plot_interval(right, i + shift, row[key], row[f"{key}_interval"], color, LABELS[key] if i == 0 else None)
    right.axvline(0.5, color="grey", linestyle="--", linewidth=1)
    right.text(0.49, -0.5, "chance", color="grey", ha="right", fontsize=8)
    right.set_yticks(range(len(groups)), [f"{row['group']} ({row['pairs']})" for row in groups])
    right.set(title="Agreement with people, 95 % interval", xlim=(0, 1), ylim=(-0.6, len(groups) - 0.4))
    right.legend(frameon=False, loc="upper left")
    figure.savefig(path)


def score_pairs(console, model, tokenizer, pairs: list[dict]) -> tuple[list[float], list[float]]:
    """Raw scores of the chosen and of the rejected replies of `pairs`."""
    prompts = [pair["prompt"] for pair in pairs] * 2
    replies = [pair[side][0]["content"] for side in ("chosen", "rejected") for pair in pairs]
    scores: list[float] = []
    with progress_bar(console, "scoring held-out replies", len(replies)) as advance:
        for start in range(0, len(replies), 64):
            scores += score_answers(model, tokenizer, prompts[start : start + 64], replies[start : start + 64])
            advance(len(replies[start : start + 64]))
    return scores[: len(pairs)], scores[len(pairs) :]
