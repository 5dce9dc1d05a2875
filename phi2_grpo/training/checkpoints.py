"""The folders of a run: which checkpoints are complete, what is removed, and which settings a resumed run may change.

A checkpoint is complete when its run.json is there, which is written last (see `callbacks.CheckpointCallback`).
"""

import filecmp
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import CONFIG
from phi2_grpo.common import files
from phi2_grpo.common.cli import num_processes, script_command

# What a resumed run may change: how long it goes, what it prints and keeps, and how it is fitted into memory.
RESUMABLE_KEYS = {"max_steps", "save_steps", "save_total_limit", "sample_steps", "eval_steps", "stop_on_collapse", "report_to",
                  "output_dir", "data_dir", "device", "activation_checkpointing", "rollout", "rollout_batch_size",
                  "chat_temperature", "chat_top_p", "reward_dir", "per_device_train_batch_size", "gradient_accumulation_steps",
                  "use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization"}  # fmt: skip
ROWS = ("metrics.jsonl", "evaluation.jsonl")  # written into a run's folder during the run, beside the checkpoints


def final_folder(config: dict) -> Path:
    return files.sibling(Path(config["output_dir"]), "{}-final")


def reward_run_folder(config: dict) -> Path:
    """Where the checkpoints of a reward model's training stand until it is finished."""
    return files.sibling(Path(config["reward_dir"]), "{}-run")


def step_of(checkpoint: Path | None) -> int:
    """The step that a checkpoint folder is of; 0 without one."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def list_checkpoints(output: Path) -> list[Path]:
    """Oldest first, complete or not."""
    named = (path for path in Path(output).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal())
    return sorted(named, key=step_of)


def is_complete(checkpoint: Path) -> bool:
    return (checkpoint / "run.json").is_file()


def complete_checkpoints(output: Path) -> list[Path]:
    return [path for path in list_checkpoints(output) if is_complete(path)]


def newest_complete(output: Path) -> Path | None:
    return next(reversed(complete_checkpoints(output)), None)


@contextmanager
def add_resume_hint(output: Path) -> Iterator[None]:
    """Adds to a Ctrl-C or SIGTERM what is left, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(resume_hint(output)) from None


def resume_hint(output: Path) -> str:
    newest = newest_complete(output)
    if not newest:
        return "No checkpoint was written yet."
    given = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
    command = " ".join([script_command(Path(sys.argv[0]).name), *map(shlex.quote, given), "--resume"])
    return f"{newest} is complete. Go on: {command if num_processes() == 1 else 'the same command, with --resume'}"


def is_result_of(final: Path, checkpoint: Path) -> bool:
    """Whether `final` has the very weights of `checkpoint`: an earlier run's may be of the same step."""
    weights = [folder / "adapter_model.safetensors" for folder in (final, checkpoint)]
    return weights[0].is_file() and filecmp.cmp(*weights, shallow=False)


def is_run_folder(output: Path) -> bool:
    """Whether what a run would replace in `output` is a run's: each begins its metrics.jsonl before its first checkpoint."""
    rows, evaluations = (output / name for name in ROWS)
    if not rows.exists():
        return not evaluations.exists() and all(map(is_complete, list_checkpoints(output)))
    with rows.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline()
    return not first or '"step"' in first


def remove(checkpoint: Path) -> None:
    """run.json goes first, so that a removal that is killed leaves an incomplete checkpoint."""
    (checkpoint / "run.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def remove_incomplete(output: Path) -> None:
    """Remove what a save that was killed or failed has left."""
    for checkpoint in list_checkpoints(output):
        if not is_complete(checkpoint):
            remove(checkpoint)


def remove_run(output: Path) -> None:
    """Remove what a run wrote into its folder, and nothing else: the folder may hold the user's own files."""
    for checkpoint in list_checkpoints(output):
        remove(checkpoint)
    for name in ROWS:
        (output / name).unlink(missing_ok=True)


def changed_settings(then: dict, now: dict, facts: dict) -> list[str]:
    """Where a run that is to go on differs from `then` (its run.json) in what it may not change, in words.

    `now` are the settings; `facts` what else run.json holds: dtype, model_commit, and rewards with their digests.
    """
    was, may_change = then.get("config", {}), RESUMABLE_KEYS | {"rewards"}  # rewards are compared by their digests
    if was.get("lr_scheduler_type") in ("linear", "cosine"):
        may_change -= {"max_steps"}  # the learning rate goes by it
    if now.get("init_adapter"):
        may_change |= {key for key in CONFIG if key.startswith("lora_")}  # the adapter's hold
    pairs = {key: (was[key], now[key]) for key in CONFIG if key in was and key in now and key not in may_change}
    pairs |= {key: (then[key], facts[key]) for key in ("dtype", "model_commit") if then.get(key) and facts.get(key)}
    same = " and ".join(_other_content(then, facts))
    pairs["rewards"] = (same, f"{same} with another content") if same else (reward_list(then), reward_list(facts))
    pairs["completions of an update"] = (_update_size(was, then.get("processes", 1)), _update_size(now, num_processes()))
    return [f"{key}: was {old}, is {new}" for key, (old, new) in pairs.items() if old != new]


def reward_list(facts: dict) -> str:
    """The rewards of a run.json by name, weight and digest."""
    rewards = sorted(facts.get("rewards") or [], key=lambda reward: reward["name"])
    return ", ".join(f"{reward['name']} x {reward['weight']:g} {reward.get('digest') or ''}".strip() for reward in rewards)


def _other_content(then: dict, facts: dict) -> list[str]:
    """The rewards whose digests alone differ, where nothing else of them does."""
    rewards = (facts.get("rewards") or [] for facts in (then, facts))
    was, now = ({(each["name"], each["weight"]): each.get("digest") for each in of} for of in rewards)
    return [name for name, weight in was if was[name, weight] != now[name, weight]] if was.keys() == now.keys() else []


def _update_size(config: dict, processes: int) -> int:
    return config.get("per_device_train_batch_size", 1) * config.get("gradient_accumulation_steps", 1) * processes
