"""What stands beside the weights: run.json, metrics.jsonl, the reward curve, the model card."""

import json
import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from phi2_grpo import files
from phi2_grpo.model import generation_config

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
COLORS = {"reward": "#4c72b0", "length": "#dd8452", "ended": "#55a868", "kl": "#c44e52"}


def step_rows(log_history: list[dict]) -> list[dict]:
    """The trainer's log rows that describe a training step; they survive a resume, for checkpoints hold them.

    What is not finite becomes None: JSON has no NaN.
    """
    rows = [row for row in log_history if "reward" in row]
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]


def window(rows: list[dict], key: str, count: int = 10) -> tuple[float, float] | None:
    """Means of `key` over the first and the last `count` steps; over half of the steps each where there are fewer."""
    values = [row[key] for row in rows if row.get(key) is not None]
    count = min(count, len(values) // 2) or len(values)
    return (sum(values[:count]) / count, sum(values[-count:]) / count) if values else None


def git_commit() -> str | None:
    """The commit of this repo, with "-dirty" where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def hardware(device: torch.device) -> str:
    """The card, or the kind of processor and the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def run_facts(config: dict, preset: str, device: torch.device, dtype: torch.dtype, funnel: dict, adapted: str) -> dict:
    """What is known when a run starts."""
    return {
        "preset": preset,
        "config": config,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "git_commit": git_commit(),
        "hardware": hardware(device),
        "dtype": str(dtype).removeprefix("torch."),
        "adapted": adapted,
        "data": {"fingerprint": funnel["fingerprint"], "dataset": funnel["settings"]["dataset"], "funnel": funnel["funnel"]},
    }


def describe_folder(folder: Path, tokenizer, facts: dict, rows: list[dict], seconds: float, finished: bool) -> None:
    """Make an adapter folder self-describing. run.json is written last: its presence says that the folder is whole.

    Args:
        folder: holds adapter and tokenizer already.
        rows: one per step (see `step_rows`).
        seconds: wall time of the training so far.
    """
    generation_config(tokenizer, facts["config"]).save_pretrained(folder)
    files.write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    draw_curve(rows, facts["config"], folder / "reward.png")
    files.write_text(folder / "README.md", model_card(facts, rows, seconds, finished))
    last = rows[-1] if rows else {}
    files.write_json(
        folder / "run.json",
        {**facts, "finished": finished, "steps": last.get("step", 0), "seconds": round(seconds, 1), "last_metrics": last},
    )


def draw_curve(rows: list[dict], config: dict, path: Path) -> None:
    """Reward, answer length, ended share and KL over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    steps = [row["step"] for row in rows]

    def plot(where, key: str, color: str, label: str) -> None:
        values = [row.get(key) for row in rows]
        if not rows or any(value is None for value in values):
            where.text(0.5, 0.5, "not measured", ha="center", transform=where.transAxes)
            return
        where.plot(steps, values, color=color, alpha=0.35, linewidth=1)
        span = max(1, len(values) // 15)  # a centred running mean; the thin line is what was measured
        smooth = [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - span) : i + span + 1])]
        where.plot(steps, smooth, color=color, linewidth=2.2, label=label)

    reward, length, ended, kl = axes.flat
    plot(reward, "reward", COLORS["reward"], "mean reward")
    if rows:
        low, high = ([row["reward"] + sign * row["reward_std"] for row in rows] for sign in (-1, 1))
        reward.fill_between(steps, low, high, color=COLORS["reward"], alpha=0.1, linewidth=0, label="± 1 std of completions")
    reward.set(title="Reward (higher is better)", ylim=(0, None))
    plot(length, "answers/tokens", COLORS["length"], "mean answer")
    length.axhline(config["target_tokens"], color="grey", linestyle="--", linewidth=1, label="target")
    length.set(title="Answer length (tokens)", ylim=(0, None))
    for each in (reward, length):
        if rows:
            each.legend(frameon=False, loc="lower right")
    plot(ended, "answers/ended", COLORS["ended"], "ended")
    ended.set(title="Share of answers that ended by themselves", ylim=(0, 1.02), xlabel="step")
    plot(kl, "kl", COLORS["kl"], "KL")
    kl.set(title="KL from the base (nats per token)", ylim=(0, None), xlabel="step")
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.2)
    figure.savefig(path, dpi=120)


def model_card(facts: dict, rows: list[dict], seconds: float, finished: bool) -> str:
    """A card for the Hub. Every number in it comes from the run's own metrics."""
    config, dataset = facts["config"], facts["data"]["dataset"]
    hub_base = config["model"] if config["model"] != "tiny" and not Path(config["model"]).exists() else None
    base = hub_base or ("the tiny Phi of this project, made on the spot" if config["model"] == "tiny" else config["model"])
    lines = [
        "---",
        *([f"base_model: {hub_base}"] if hub_base else []),
        "library_name: peft",
        "pipeline_tag: text-generation",
        "license: mit",
        *([f"datasets:\n- {dataset}"] if "/" in dataset and not Path(dataset).exists() else []),
        "tags:\n- grpo\n- trl\n- lora",
        "---",
        "",
        f"# A LoRA adapter for {base}, trained with GRPO",
        "",
        f"Reward: an answer near {config['target_tokens']} tokens that ends by itself. "
        f"{rows[-1]['step'] if rows else 0} steps{'' if finished else ' (a checkpoint of a longer run)'}, "
        f"{seconds / 60:.0f} minutes on {facts['hardware']}.",
        "",
        "| over training, first to last steps | from | to |",
        "|---|---|---|",
    ]
    table = {"reward": "mean reward", "answers/ended": "ended share", "answers/tokens": "answer tokens",
             "kl": "KL from the base"}  # fmt: skip
    for key, name in table.items():
        if means := window(rows, key):
            lines.append(f"| {name} | {means[0]:.3g} | {means[1]:.3g} |")
    lines += [
        "",
        "These are the rewards of sampled training completions. Whether held-out answers are better is what "
        "`validate_model.py` says.",
        "",
        "![reward curve](reward.png)",
        "",
        "## Use",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer, GenerationConfig",
        "",
        'folder = "."  # this folder, or its id on the Hub',
        "model = AutoPeftModelForCausalLM.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'messages = [{"role": "user", "content": "What are the benefits of exercise?"}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        "config = GenerationConfig.from_pretrained(folder)  # sampling, end token and stop strings",
        "output = model.generate(**inputs, generation_config=config, tokenizer=tokenizer)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        "```",
        "",
        "## How it was made",
        "",
        f"- LoRA r={config['lora_r']}, alpha={config['lora_alpha']}, on {facts['adapted']}",
        f"- learning rate {config['learning_rate']:g}, {config['num_generations']} generations per prompt, "
        f"beta {config['beta']:g}, loss {config['loss_type']}, seed {config['seed']}",
        "- " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        f"- code at commit {facts['git_commit'] or 'unknown'}; all settings in `run.json`, every step in `metrics.jsonl`",
        "",
    ]
    return "\n".join(lines)
