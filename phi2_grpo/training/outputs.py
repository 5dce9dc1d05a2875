"""What stands beside the weights: run.json, the rows of every step, the curve; the card is in cards.py."""

import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from phi2_grpo.common import files
from phi2_grpo.common.cli import num_processes, split_weight
from phi2_grpo.common.console import BLUE, GREEN, ORANGE, PURPLE, RED, make_figure, save_figure
from phi2_grpo.models.answers import chat_generation_config
from phi2_grpo.models.base import commit_of
from phi2_grpo.training import model_card
from phi2_grpo.training.checkpoints import write_manifest

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


ALERT_COLORS = {"warning": "#e0a800", "collapse": RED}


def log_rows(log_history: list[dict], key: str) -> list[dict]:
    """The trainer's log rows that have `key`: "reward" a GRPO step's, "loss" a reward model's, "eval_reward" an evaluation's.

    They survive a resume, for checkpoints hold them. What is not finite becomes None: JSON has no NaN.
    """
    rows = [row for row in log_history if key in row]
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]


def first_and_last(rows: list[dict], key: str, count: int = 10) -> tuple[float, float] | None:
    """Means of `key` over the first and the last `count` steps; over half of the steps each where there are fewer."""
    values = [row[key] for row in rows if row.get(key) is not None]
    count = min(count, len(values) // 2) or len(values)
    return (sum(values[:count]) / count, sum(values[-count:]) / count) if values else None


def git_commit() -> str | None:
    """The commit of this repo, with "-dirty" where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def hardware_name(device: torch.device) -> str:
    """The card, or the kind of processor and the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def run_metadata(config: dict, preset: str, device: torch.device, dtype: torch.dtype, funnel: dict, adapted: str) -> dict:
    """What is known when a run starts."""
    return {
        "preset": preset,
        "config": config,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "git_commit": git_commit(),
        "processes": num_processes(),
        "hardware": hardware_name(device),
        "model_commit": commit_of(config),
        "dtype": str(dtype).removeprefix("torch."),
        "adapted": adapted,
        "data": {
            "fingerprint": funnel["fingerprint"],
            "dataset": funnel["settings"]["dataset"],
            "commit": funnel.get("dataset_commit"),
            "funnel": funnel["funnel"],
        },
    }


def write_adapter_files(
    folder: Path, tokenizer, facts: dict, log_history: list[dict], seconds: float, finished: bool, kept: int | None = None
) -> None:
    """Make an adapter folder self-describing. run.json is written last: its presence says that the folder is whole.

    Args:
        folder: holds adapter and tokenizer already.
        log_history: the trainer's.
        seconds: wall time of the training so far.
        kept: the step that the weights are of, where it is not the last one: the run collapsed after it.
    """
    rows, evaluations = log_rows(log_history, "reward"), log_rows(log_history, "eval_reward")
    chat_generation_config(tokenizer, facts["config"], facts["context"]).save_pretrained(folder)
    files.write_rows(folder / "metrics.jsonl", rows)
    files.write_rows(folder / "evaluation.jsonl", evaluations)
    draw_curve(rows, facts["config"], folder / "reward.png", evaluations, kept)
    used = rows if kept is None else [row for row in rows if row["step"] <= kept]
    last = used[-1] if used else {}
    each = {f"rewards/{reward['name']}/mean": reward["name"] for reward in facts["rewards"]}
    names = {"reward": "mean reward", **(each if len(each) > 1 else {}),
             "answers/ended": "ended share", "answers/tokens": "answer tokens", "kl": "KL from the base"}  # fmt: skip
    changes = {name: means for key, name in names.items() if (means := first_and_last(used, key))}
    card = model_card.adapter_card(facts, last.get("step", 0), seconds, changes, finished, collapsed=kept is not None)
    files.write_text(folder / "README.md", card)
    ending = {"finished": finished, "steps": last.get("step", 0), "seconds": round(seconds, 1), "last_metrics": last}
    run = {**facts, **ending, "collapsed_at": rows[-1]["step"] if kept is not None else None}
    if finished:
        files.write_json(folder / "run.json", run)
    else:
        write_manifest(folder, run)


def write_reward_model_files(
    folder: Path, facts: dict, rows: list[dict], seconds: float, scale: dict, measured: dict, accuracy: list[str], left_out: int
) -> None:
    """The same for a reward model; `scale` is what its scores are centred and scaled by (see `reward_model.RewardModel`)."""
    files.write_rows(folder / "metrics.jsonl", rows)
    steps = rows[-1]["step"] if rows else 0
    files.write_text(folder / "README.md", model_card.reward_model_card(facts, steps, seconds, accuracy, left_out))
    ending = {"finished": True, "steps": steps, "seconds": round(seconds, 1)}
    files.write_json(folder / "run.json", {**facts, **ending, "scores": scale, "validation": measured})


def draw_curve(rows: list[dict], config: dict, path: Path, evaluations: list[dict], kept: int | None = None) -> None:
    """Reward (held-out too), answer length, ended share and KL over the steps; alarms and the step `kept` are marked."""
    figure, axes = make_figure(2, 2, 11, 6.5, sharex=True)
    reward, length, ended, kl = axes
    steps = [row["step"] for row in rows]

    def plot(where, key: str, color: str, label: str) -> None:
        values = [math.nan if row.get(key) is None else row[key] for row in rows]
        if all(map(math.isnan, values)):
            where.text(0.5, 0.5, "not measured", ha="center", transform=where.transAxes)
            return
        where.plot(steps, values, color=color, alpha=0.35, linewidth=1)
        span = max(1, len(values) // 15)  # a centred running mean; the thin line is what was measured
        known = [[v for v in values[max(0, i - span) : i + span + 1] if not math.isnan(v)] for i in range(len(values))]
        smooth = [sum(part) / len(part) if part else math.nan for part in known]
        where.plot(steps, smooth, color=color, linewidth=2.2, label=label)

    def band(at: list[int], low: list[float], high: list[float], color: str, alpha: float, label: str) -> None:
        reward.fill_between(at, low, high, color=color, alpha=alpha, linewidth=0, label=label)

    plot(reward, "reward", BLUE, "mean reward")
    if scored := [row for row in rows if row["reward"] is not None and row["reward_std"] is not None]:
        low, high = ([row["reward"] + sign * row["reward_std"] for row in scored] for sign in (-1, 1))
        band([row["step"] for row in scored], low, high, BLUE, 0.1, "± 1 std of completions")
    if measured := [row for row in evaluations if row["eval_reward"] is not None and row["eval_low"] is not None]:
        at, mean, low, high = ([row[key] for row in measured] for key in ("step", "eval_reward", "eval_low", "eval_high"))
        reward.plot(at, mean, "o-", color=PURPLE, markersize=4, label="held out")
        band(at, low, high, PURPLE, 0.2, "its 95 % interval")
    reward.set(title="Reward (higher is better)")
    plot(length, "answers/tokens", ORANGE, "mean answer")
    if any(split_weight(item)[0] == "length" for item in config["rewards"]):
        length.axhline(config["target_tokens"], color="grey", linestyle="--", linewidth=1, label="target")
    length.set(title="Answer length (tokens)", ylim=(0, None))
    plot(ended, "answers/ended", GREEN, "ended")
    ended.set(title="Share of answers that ended by themselves", ylim=(0, 1.02), xlabel="step")
    plot(kl, "kl", RED, "KL")
    kl.set(title="KL from the base (nats per token)", ylim=(0, None), xlabel="step")
    for row in rows:
        alarms = row.get("alarms", [])
        names = " " + ", ".join(metric.split("/")[-1] for _, metric in alarms)
        for kind, _ in alarms:
            for each in axes:
                each.axvline(row["step"], color=ALERT_COLORS[kind], linewidth=1, linestyle=":")
        if alarms:
            where = reward.get_xaxis_transform()
            reward.text(
                row["step"], 1.0, names, rotation=90, va="top", ha="right", fontsize=7, color="#444444", transform=where
            )
    for each in axes:
        if kept is not None:
            each.axvline(kept, color=GREEN, linewidth=1.5, label="kept")
        each.grid(alpha=0.2)
    for each in (reward, length):
        if each.get_legend_handles_labels()[0]:
            each.legend(frameon=False, loc="best")
    save_figure(figure, path)
