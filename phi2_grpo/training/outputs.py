"""What stands beside the weights: run.json, the rows of every step, the curve; the model card is in model_card.py."""

import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel

from phi2_grpo.common import files
from phi2_grpo.common.cli import num_processes, split_weight
from phi2_grpo.common.console import BLUE, GREEN, ORANGE, PURPLE, RED, make_figure
from phi2_grpo.models.answers import chat_generation_config
from phi2_grpo.models.base import commit_of, context_length
from phi2_grpo.models.lora import lora_summary
from phi2_grpo.training import model_card

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
CURVES = (
    ("reward", BLUE, "Reward (higher is better)"),
    ("answers/tokens", ORANGE, "Answer length (tokens)"),
    ("answers/ended", GREEN, "Share of answers that ended by themselves"),
    ("kl", RED, "KL to the base (nats per token)"),
)


def log_rows(log_history: list[dict], key: str) -> list[dict]:
    """The trainer's log rows that have `key`: "reward" a GRPO step's, "loss" a reward model's, "eval_reward" an evaluation's.

    They survive a resume, for checkpoints hold them. What is not finite becomes None: JSON has no NaN.
    """
    rows = [row for row in log_history if key in row]
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]


def first_and_last(rows: list[dict], key: str, count: int = 10) -> tuple[float, float] | None:
    """Means of `key` over the first and the last `count` steps; over half of the steps each where there are fewer."""
    _, values = _points(rows, key)
    count = max(1, min(count, len(values) // 2))
    return (fmean(values[:count]), fmean(values[-count:])) if values else None


def git_commit() -> str | None:
    """The commit of this repo, with "-dirty" where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:  # no git
        return None


def hardware_name(device: torch.device) -> str:
    """The GPU, or the kind of processor and the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU, MPS ({platform.machine()})"
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def run_metadata(config: dict, preset: str, device: torch.device, dtype: torch.dtype, funnel: dict, model: PeftModel) -> dict:
    """What is known when a run starts. LoRA is the model's, which `init_adapter` may have given."""
    lora = model.peft_config["default"]
    lora_settings = {"lora_r": lora.r, "lora_alpha": lora.lora_alpha}
    if config.get("init_adapter"):
        modules = lora.target_modules  # a string is a pattern
        lora_settings["lora_target_modules"] = [modules] if isinstance(modules, str) else sorted(modules)
    start = files.read_run(Path(config["init_adapter"])).get("data", {}) if config.get("init_adapter") else {}
    earlier = [*start.get("earlier", []), *([start["fingerprint"]] if "fingerprint" in start else [])]
    return {
        "preset": preset,
        "config": {**config, **lora_settings},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "git_commit": git_commit(),
        "processes": num_processes(),
        "hardware": hardware_name(device),
        "model_commit": commit_of(config),
        "dtype": str(dtype).removeprefix("torch."),
        "adapted": lora_summary(model),
        "context": context_length(model),
        "data": {
            "fingerprint": funnel["fingerprint"],
            "earlier": earlier,
            "dataset": funnel["settings"]["dataset"],
            "commit": funnel.get("dataset_commit"),
            "funnel": funnel["funnel"],
        },
    }


def write_adapter_files(folder: Path, tokenizer, facts: dict, log_history: list[dict], seconds: float, finished: bool) -> None:
    """Make an adapter folder self-describing. run.json is written last: it says that the folder is complete.

    `folder` holds adapter and tokenizer already. `facts`: of `run_metadata`, with `rewards`. `seconds`: wall time of the
    training so far.
    """
    rows, evaluations = log_rows(log_history, "reward"), log_rows(log_history, "eval_reward")
    last = rows[-1] if rows else {"step": 0}
    names = {"reward": "mean reward", "answers/ended": "ended share", "answers/tokens": "answer tokens", "kl": "KL to the base"}
    if len(facts["rewards"]) > 1:
        names |= {f"rewards/{reward['name']}/mean": reward["name"] for reward in facts["rewards"]}
    changes = {name: means for key, name in names.items() if (means := first_and_last(rows, key))}
    chat_generation_config(tokenizer, facts["config"], facts["context"]).save_pretrained(folder)
    files.write_rows(folder / "metrics.jsonl", rows)
    files.write_rows(folder / "evaluation.jsonl", evaluations)
    draw_curve(rows, facts["config"], folder / "reward.png", evaluations)
    files.write_text(folder / "README.md", model_card.adapter_card(facts, last["step"], seconds, changes, finished))
    ending = {"finished": finished, "steps": last["step"], "seconds": round(seconds, 1), "last_metrics": last}
    files.write_json(folder / "run.json", facts | ending)


def draw_curve(rows: list[dict], config: dict, path: Path, evaluations: list[dict]) -> None:
    """Reward (held-out too), answer length, ended share and KL over the steps; alerts are dotted lines."""
    figure, axes = make_figure(2, 2, 11, 6.5, sharex=True)
    reward, length = axes[:2]
    for each, (key, color, title) in zip(axes, CURVES, strict=True):
        steps, values = _points(rows, key)
        span = max(1, len(values) // 15)  # a centred running mean; the thin line is what was measured
        smooth = [fmean(values[max(0, i - span) : i + span + 1]) for i in range(len(values))]
        each.plot(steps, values, color=color, alpha=0.35, linewidth=1, label="each step")
        each.plot(steps, smooth, color=color, linewidth=2.2, label="running mean")
        each.set(title=title if values else f"{title}: not measured", xlabel="step")
        each.xaxis.get_major_locator().set_params(integer=True)
        each.grid(alpha=0.2)
        if each is not reward:
            each.set_ylim(bottom=0)
    for row in rows:
        for kind, metric in row.get("alerts", []):
            color = RED if kind == "collapse" else ORANGE
            name = metric.removesuffix("/std").rpartition("/")[2].replace("_", " ")
            reward.axvline(row["step"], color=color, linewidth=1, linestyle=":", label=f"{kind}: {name}")
    measured = [{key: math.nan if value is None else value for key, value in row.items()} for row in evaluations]
    steps, means, *ends = ([row[key] for row in measured] for key in ("step", "eval_reward", "eval_low", "eval_high"))
    reward.plot(steps, means, "o-", color=PURPLE, markersize=4, label="held out, 95 % interval")
    reward.fill_between(steps, *ends, color=PURPLE, alpha=0.2, linewidth=0)
    reward.legend(frameon=False, fontsize=8)
    if any(split_weight(item)[0] == "length" for item in config["rewards"]):
        length.axhline(config["target_tokens"], color="grey", linestyle="--", linewidth=1, label="target")
        length.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _points(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values, where `key` was measured."""
    known = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in known], [row[key] for row in known]
