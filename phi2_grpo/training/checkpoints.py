"""The folders of a run: which checkpoints are complete, what may be removed, and which settings a resumed run may change.

A checkpoint is complete when its run.json is there, which is written last (see `callbacks.CheckpointCallback`).
"""

import filecmp
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import CONFIG
from phi2_grpo.common import files

# What a resumed run may change: how long it goes, what it prints and keeps, and how it is fitted into memory.
RESUMABLE_KEYS = {"max_steps", "save_steps", "save_total_limit", "sample_steps", "eval_steps", "stop_on_collapse", "report_to",
                  "output_dir", "data_dir", "device", "activation_checkpointing", "rollout", "rollout_batch_size",
                  "chat_temperature", "chat_top_p", "reward_dir", "per_device_train_batch_size", "gradient_accumulation_steps",
                  "use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization"}  # fmt: skip
ROWS = ("metrics.jsonl", "evaluation.jsonl")  # written into a run's folder during the run, beside the checkpoints


def final_folder(config: dict) -> Path:
    """Where the finished adapter goes."""
    return files.sibling(Path(config["output_dir"]), "{}-final")


def reward_run_folder(config: dict) -> Path:
    """Where the checkpoints of a reward model's training stand until it is finished."""
    return files.sibling(Path(config["reward_dir"]), "{}-run")


def step_of(checkpoint: Path | None) -> int:
    """The step that a checkpoint folder is of; 0 without one."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def list_checkpoints(output: str | Path) -> list[Path]:
    """What has a checkpoint's name, oldest first, complete or not."""
    named = [path for path in Path(output).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(named, key=step_of)


def complete_checkpoints(output: str | Path) -> list[Path]:
    """The complete ones, oldest first."""
    return [path for path in list_checkpoints(output) if (path / "run.json").is_file()]


def newest_complete(output: Path) -> Path | None:
    return next(reversed(complete_checkpoints(output)), None)


def what_is_left(output: Path) -> str:
    """For a message about a run that ended early."""
    newest = newest_complete(output)
    return f"{newest} is complete: go on with --resume." if newest else "No checkpoint was written yet."


@contextmanager
def advice_when_interrupted(output: Path) -> Iterator[None]:
    """Adds to a Ctrl-C or SIGTERM what is left, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(what_is_left(output)) from None


def is_result_of(final: Path, checkpoint: Path) -> bool:
    """Whether `final` has the very weights of `checkpoint`: an earlier run's may be of the same step."""
    weights = [folder / "adapter_model.safetensors" for folder in (final, checkpoint)]
    return weights[0].is_file() and filecmp.cmp(*weights, shallow=False)


def is_ours(output: Path) -> bool:
    """Whether what a run would replace in `output` is a run's: each begins its metrics.jsonl before its first checkpoint."""
    rows, evaluations = (output / name for name in ROWS)
    if not rows.exists():
        return not evaluations.exists() and list_checkpoints(output) == complete_checkpoints(output)
    with rows.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline()
    return not first or '"step"' in first


def remove(checkpoint: Path) -> None:
    """run.json goes first, so that a removal that is killed leaves an incomplete checkpoint."""
    if checkpoint.is_symlink() or checkpoint.is_file():
        return checkpoint.unlink()
    (checkpoint / "run.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def remove_incomplete(output: Path) -> None:
    """Remove what a save that was killed or failed left behind."""
    for checkpoint in list_checkpoints(output):
        if not (checkpoint / "run.json").is_file():
            remove(checkpoint)


def remove_run(output: Path) -> None:
    """Remove what a run wrote into its folder, and nothing else: the folder may hold the user's own files."""
    for checkpoint in list_checkpoints(output):
        remove(checkpoint)
    for name in ROWS:
        (output / name).unlink(missing_ok=True)


def changed_settings(then: dict, now: dict, world: int, facts: dict) -> list[str]:
    """Where a run that is to go on differs from `then` (its run.json) in what it may not change, in words.

    Args:
        now: the settings.
        world: processes of the run.
        facts: what else run.json holds: dtype, model_commit, and rewards with their digests.
    """
    was, may_change = then.get("config", {}), set(RESUMABLE_KEYS)
    if was.get("lr_scheduler_type") in ("linear", "cosine"):
        may_change.remove("max_steps")  # the rate goes by the number of steps
    if now.get("init_adapter"):
        may_change |= {key for key in CONFIG if key.startswith("lora_")}  # the adapter's hold, not the settings'
    if facts.get("rewards"):
        may_change.add("rewards")  # compared by digest, below
    pairs = {key: (was[key], now[key]) for key in CONFIG if key in was and key in now and key not in may_change}
    pairs |= {key: (then[key], facts[key]) for key in ("dtype", "model_commit") if then.get(key) and facts.get(key)}
    rewards = [{(r["name"], r["weight"]): r.get("digest") for r in each.get("rewards") or []} for each in (then, facts)]
    if facts.get("rewards"):
        names = [", ".join(f"{name} x {weight:g}" for name, weight in each) for each in rewards]
        pairs["rewards"] = tuple(names)
    changed = [f"{key} was {old}, is {new}" for key, (old, new) in pairs.items() if not _same(old, new)]
    if rewards[0].keys() == rewards[1].keys():
        changed += [f"the reward {name} has another content now" for (name, _), digest in rewards[1].items()
                    if digest != rewards[0][name, _]]  # fmt: skip
    sizes = [
        settings.get("per_device_train_batch_size", 1) * settings.get("gradient_accumulation_steps", 1) * processes
        for settings, processes in ((was, then.get("processes", 1)), (now, world))
    ]
    if sizes[0] != sizes[1]:
        changed.append(
            f"an update had {sizes[0]} completions, has {sizes[1]}: per_device_train_batch_size x "
            "gradient_accumulation_steps x processes must stay the same"
        )
    return changed


def _same(was, now) -> bool:
    """Equal, or the same path in another form."""
    paths = isinstance(was, str) and isinstance(now, str) and was and now
    return was == now or bool(paths and Path(was).resolve() == Path(now).resolve())
