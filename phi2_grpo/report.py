"""What stands beside the weights: run.json, metrics.jsonl, the reward curve, the model card."""

import json
import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from phi2_grpo import files
from phi2_grpo.accuracy import NEAR, verdict
from phi2_grpo.checkpoints import seal
from phi2_grpo.cli import processes
from phi2_grpo.loading import commit_of
from phi2_grpo.model import generation_config

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
COLORS = {"reward": "#4c72b0", "length": "#dd8452", "ended": "#55a868", "kl": "#c44e52", "held out": "#8172b3"}
ALARMS = {"warning": "#e0a800", "collapse": "#c44e52"}


def step_rows(log_history: list[dict]) -> list[dict]:
    """The trainer's log rows that describe a training step; they survive a resume, for checkpoints hold them.

    What is not finite becomes None: JSON has no NaN.
    """
    return _finite([row for row in log_history if "reward" in row])


def evaluation_rows(log_history: list[dict]) -> list[dict]:
    """Its rows that describe an evaluation on held-out prompts (see held_out.py)."""
    return [row for row in log_history if "eval_reward" in row]


def loss_rows(log_history: list[dict]) -> list[dict]:
    """The same of a reward model's training."""
    return _finite([row for row in log_history if "loss" in row])


def _finite(rows: list[dict]) -> list[dict]:
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
        "processes": processes(),
        "hardware": hardware(device),
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


def describe_folder(
    folder: Path, tokenizer, facts: dict, log_history: list[dict], seconds: float, finished: bool, kept: int | None = None
) -> None:
    """Make an adapter folder self-describing. run.json is written last: its presence says that the folder is whole.

    Args:
        folder: holds adapter and tokenizer already.
        log_history: the trainer's.
        seconds: wall time of the training so far.
        kept: the step that the weights are of, where it is not the last one: the run collapsed after it.
    """
    rows, evaluations = step_rows(log_history), evaluation_rows(log_history)
    generation_config(tokenizer, facts["config"]).save_pretrained(folder)
    files.write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    files.write_text(folder / "evaluation.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluations))
    draw_curve(rows, facts["config"], folder / "reward.png", evaluations, kept)
    used = rows if kept is None else [row for row in rows if row["step"] <= kept]
    files.write_text(folder / "README.md", model_card(facts, used, seconds, finished, collapsed=kept is not None))
    last = used[-1] if used else {}
    ending = {"finished": finished, "steps": last.get("step", 0), "seconds": round(seconds, 1), "last_metrics": last}
    run = {**facts, **ending, "collapsed_at": rows[-1]["step"] if kept is not None else None}
    if finished:
        files.write_json(folder / "run.json", run)
    else:
        seal(folder, run)


def describe_reward_folder(
    folder: Path, facts: dict, rows: list[dict], seconds: float, scale: dict, measured: dict, left_out: int
) -> None:
    """The same for a reward model; `scale` is what its scores are centred and scaled by (see `reward_model.RewardModel`)."""
    files.write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    files.write_text(folder / "README.md", reward_card(facts, rows, seconds, measured, left_out))
    steps = {"finished": True, "steps": rows[-1]["step"] if rows else 0, "seconds": round(seconds, 1)}
    files.write_json(folder / "run.json", {**facts, **steps, "scores": scale, "validation": measured})


def draw_curve(rows: list[dict], config: dict, path: Path, evaluations: list[dict], kept: int | None = None) -> None:
    """Reward (held-out too), answer length, ended share and KL over the steps; alarms and the step `kept` are marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
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

    reward, length, ended, kl = axes.flat
    plot(reward, "reward", COLORS["reward"], "mean reward")
    scored = [row for row in rows if row["reward"] is not None and row["reward_std"] is not None]
    if scored:
        low, high = ([row["reward"] + sign * row["reward_std"] for row in scored] for sign in (-1, 1))
        reward.fill_between(
            [row["step"] for row in scored],
            low,
            high,
            color=COLORS["reward"],
            alpha=0.1,
            linewidth=0,
            label="± 1 std of completions",
        )
    measured = [row for row in evaluations if row["eval_reward"] is not None and row["eval_low"] is not None]
    if measured:
        at = [row["step"] for row in measured]
        reward.plot(
            at, [row["eval_reward"] for row in measured], "o-", color=COLORS["held out"], markersize=4, label="held out"
        )
        low, high = ([row[key] for row in measured] for key in ("eval_low", "eval_high"))
        reward.fill_between(at, low, high, color=COLORS["held out"], alpha=0.2, linewidth=0, label="its 95 % interval")
    reward.set(title="Reward (higher is better)")
    plot(length, "answers/tokens", COLORS["length"], "mean answer")
    length.axhline(config["target_tokens"], color="grey", linestyle="--", linewidth=1, label="target")
    length.set(title="Answer length (tokens)", ylim=(0, None))
    plot(ended, "answers/ended", COLORS["ended"], "ended")
    ended.set(title="Share of answers that ended by themselves", ylim=(0, 1.02), xlabel="step")
    plot(kl, "kl", COLORS["kl"], "KL")
    kl.set(title="KL from the base (nats per token)", ylim=(0, None), xlabel="step")
    marks = [(row["step"], kind, metric) for row in rows for kind, metric in row.get("alarms", [])]
    for step, kind, _ in marks:
        for each in axes.flat:
            each.axvline(step, color=ALARMS[kind], linewidth=1, linestyle=":")
    for step in {step for step, _, _ in marks}:
        names = [metric.split("/")[-1] for at, _, metric in marks if at == step]
        reward.text(step, 1.0, " " + ", ".join(names), rotation=90, va="top", ha="right", fontsize=7, color="#444444",
                    transform=reward.get_xaxis_transform())  # fmt: skip
    for each in axes.flat:
        if kept is not None:
            each.axvline(kept, color="#55a868", linewidth=1.5, label="kept")
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.2)
    for each in (reward, length):
        if each.get_legend_handles_labels()[0]:
            each.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=120)


def _card_top(facts: dict, pipeline: str, tags: list[str], title: str) -> list[str]:
    """The Hub's metadata and the title; `title` with a place for the base."""
    config, dataset = facts["config"], facts["data"]["dataset"]
    hub_base = config["model"] if config["model"] != "tiny" and not Path(config["model"]).exists() else None
    base = hub_base or ("the tiny Phi of this project, made on the spot" if config["model"] == "tiny" else config["model"])
    return [
        "---",
        *([f"base_model: {hub_base}"] if hub_base else []),
        "library_name: peft",
        f"pipeline_tag: {pipeline}",
        "license: mit",
        *([f"datasets:\n- {dataset}"] if "/" in dataset and not Path(dataset).exists() else []),
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {title.format(base=base)}",
        "",
    ]


def _card_end(facts: dict, settings: str) -> list[str]:
    config = facts["config"]
    return [
        "",
        "## How it was made",
        "",
        f"- LoRA r={config['lora_r']}, alpha={config['lora_alpha']}, on {facts['adapted']}",
        f"- {settings}, seed {config['seed']}",
        "- " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        f"- code at commit {facts['git_commit'] or 'unknown'}; all settings in `run.json`, every step in `metrics.jsonl`",
        "",
    ]


def model_card(facts: dict, rows: list[dict], seconds: float, finished: bool, collapsed: bool = False) -> str:
    """A card for the Hub. Every number in it comes from the run's own metrics."""
    config = facts["config"]
    lines = [
        *_card_top(facts, "text-generation", ["grpo", "trl", "lora"], "A LoRA adapter for {base}, trained with GRPO"),
        "| reward | weight | |",
        "|---|---|---|",
        *(f"| {reward['name']} | {reward['weight']:g} | {reward['pays_for']} |" for reward in facts["rewards"]),
        "",
        f"{rows[-1]['step'] if rows else 0} steps{'' if finished else ' (a checkpoint of a longer run)'}, "
        f"{seconds / 60:.0f} minutes on {facts['hardware']}. Target: {config['target_tokens']} tokens."
        + (" The run collapsed after it, so this earlier checkpoint was kept." if collapsed else ""),
        "",
        "| over training, first to last steps | from | to |",
        "|---|---|---|",
    ]
    each = {f"rewards/{reward['name']}/mean": reward["name"] for reward in facts["rewards"]}
    names = {"reward": "mean reward", **(each if len(each) > 1 else {}),
             "answers/ended": "ended share", "answers/tokens": "answer tokens", "kl": "KL from the base"}  # fmt: skip
    for key, name in names.items():
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
        *_card_end(
            facts,
            f"learning rate {config['learning_rate']:g}, {config['num_generations']} generations per prompt, "
            f"beta {config['beta']:g}, loss {config['loss_type']}",
        ),
    ]
    return "\n".join(lines)


def reward_card(facts: dict, rows: list[dict], seconds: float, measured: dict, left_out: int) -> str:
    """A card for a reward model: what it is worth, beside what costs nothing."""
    config = facts["config"]

    def cell(row: dict, key: str) -> str:
        low, high = row[f"{key}_interval"]
        return f"{100 * row[key]:.1f}" + (f" [{100 * low:.0f}, {100 * high:.0f}]" if low is not None else "")

    lines = [
        *_card_top(
            facts, "text-classification", ["reward-model", "trl", "lora"], "A reward model on {base}: LoRA and a scalar head"
        ),
        verdict(measured),
        "",
        "| held-out pairs | | agrees with people, % | the longer reply wins, % |",
        "|---|---|---|---|",
        *(f"| {row['group']} | {row['pairs']} | {cell(row, 'model')} | {cell(row, 'longer')} |" for row in measured["groups"]),
        "",
        f"95 % bootstrap intervals over prompts; chance is 50 %. Nearly equal length: at most {NEAR:.0%} apart, so that length "
        f"cannot help. {measured['ties']} pairs were scored alike and count half; pairs that people ranked alike are not among "
        f"them. Rank correlation of score and reply length: {measured['rank_correlation']}.",
        "",
        "![scores of preferred and other replies](scores.png)",
        "",
        "## Use",
        "",
        "```python",
        "import json",
        "",
        "from peft import AutoPeftModelForSequenceClassification",
        "from transformers import AutoTokenizer",
        "",
        'folder = "."  # this folder',
        "model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model.config.pad_token_id = tokenizer.pad_token_id",
        'messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it scatters light."}]',
        'score = model(**tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)).logits[0, 0].item()',
        'scale = json.load(open(f"{folder}/run.json"))["scores"]',
        'print((score - scale["mean"]) / scale["std"])  # 0: as good as the mean of the ranked replies',
        "```",
        *_card_end(
            facts,
            f"{rows[-1]['step'] if rows else 0} updates of {config['per_device_train_batch_size']} x "
            f"{config['gradient_accumulation_steps']} pairs ({left_out} too long), learning rate "
            f"{config['reward_learning_rate']:g}, {seconds / 60:.0f} minutes on {facts['hardware']}",
        ),
    ]
    return "\n".join(lines)
