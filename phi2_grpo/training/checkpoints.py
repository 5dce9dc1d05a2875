"""Checkpoints that are whole or not there, and who may go on from them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from config import CONFIG
from phi2_grpo.common import files

# What a resumed run may change: how long it goes, what it prints and keeps, and how it is fitted into memory.
RESUMABLE_KEYS = {"max_steps", "save_steps", "save_total_limit", "sample_steps", "eval_steps", "stop_on_collapse", "report_to",
            "output_dir", "data_dir", "device", "activation_checkpointing", "rollout", "rollout_batch_size", "chat_temperature",
            "chat_top_p", "reward_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "use_vllm", "vllm_mode",
            "vllm_server_base_url", "vllm_gpu_memory_utilization"}  # fmt: skip


INCOMING = ".incoming"


ROWS = ("metrics.jsonl", "evaluation.jsonl")  # written into a run's folder as it goes, beside the checkpoints


def final_folder(config: dict) -> Path:
    """Where the finished adapter goes."""
    return files.sibling(Path(config["output_dir"]), "{}-final")


def reward_run_folder(config: dict) -> Path:
    """Where the checkpoints of a reward model's training stand until it is finished."""
    return files.sibling(Path(config["reward_dir"]), "{}-run")


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder is of."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """What has a checkpoint's name, oldest first, whole or not."""
    named = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(named, key=step_of)


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Those that nothing is missing from, by the digests in their run.json, which is written last."""
    return [path for path in list_checkpoints(output_dir) if is_complete(path)]


def elapsed_seconds(whole: list[Path]) -> float:
    """How long a run had taken up to the newest of `whole`."""
    return files.read_run(whole[-1]).get("seconds", 0.0) if whole else 0.0


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that run.json names is there, byte for byte."""
    digests = files.read_run(checkpoint).get("files", {})
    try:
        return "trainer_state.json" in digests and all(files.digest(checkpoint / name) == digests[name] for name in digests)
    except OSError:
        return False


def is_result_of(final: Path, checkpoint: Path) -> bool:
    """Whether `final` is finished and has the very weights of `checkpoint`: an earlier run's may be of the same step."""
    weights = final / "adapter_model.safetensors"
    finished = files.read_run(final).get("finished") is True and weights.is_file()
    return finished and files.digest(weights) == files.read_run(checkpoint).get("files", {}).get(weights.name)


def write_manifest(folder: Path, facts: dict) -> None:
    """Write run.json, with the digest of every other file beside it that a resumed run needs."""
    for_people = {"run.json", "README.md", "reward.png"}
    needed = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in for_people]
    digests = {str(path.relative_to(folder)): files.digest(path) for path in needed}
    files.write_json(folder / "run.json", {**facts, "files": digests})


def is_ours(rows: Path) -> bool:
    """Whether a file of ROWS is a run's, by its first line, or not there."""
    try:
        with rows.open(encoding="utf-8") as lines:
            first = lines.readline()
        return not first or "step" in json.loads(first)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, TypeError):
        return False


def remove_run(output: Path) -> None:
    """Remove what a run wrote into its folder, and nothing else: the folder may be any of the user's."""
    for checkpoint in list_checkpoints(output):
        if checkpoint.is_symlink() or checkpoint.is_file():
            checkpoint.unlink()
        else:
            shutil.rmtree(checkpoint)
    shutil.rmtree(output / INCOMING, ignore_errors=True)
    for name in ROWS:
        (output / name).unlink(missing_ok=True)


class WholeCheckpoints:
    """Mixed into a trainer: a checkpoint is written beside its place, completed, moved in; only then are old ones removed.

    `complete(folder, state)` writes what makes it whole, ending with `seal`; it runs in the main process alone.
    """

    complete: Callable[[Path, object], None]

    def _get_output_dir(self, trial) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, INCOMING) if getattr(self, "_saving", False) else run

    def _save_checkpoint(self, model, trial) -> None:
        output, kept = Path(self.args.output_dir), self.args.save_total_limit
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(output / INCOMING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True  # the trainer's own pruning sees the incoming folder alone, and finds nothing to do
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has written its random state
            if self.args.should_save:
                self.complete(output / INCOMING / name, self.state)
                files.open_to_umask(output / INCOMING / name)
                shutil.rmtree(output / name, ignore_errors=True)
                (output / INCOMING / name).rename(output / name)
        except Exception:
            if self.args.should_save:
                shutil.rmtree(output / INCOMING, ignore_errors=True)  # room for a message, and for the next try
            raise
        finally:
            self._saving = False
        if self.args.should_save:
            shutil.rmtree(output / INCOMING, ignore_errors=True)
            ours = [old for old in list_checkpoints(output) if (old / "run.json").is_file()]
            for old in [old for old in ours if step_of(old) <= self.state.global_step][:-kept]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def changed_settings(then: dict, now: dict, world: int, facts: dict | None = None) -> list[str]:
    """In what a run that is to go on differs from `then` (its run.json), in words; what is harmless apart.

    `facts` are those of its run.json that no setting says: dtype, model_commit, and rewards with their digests.
    """
    was, facts = then.get("config", {}), facts or {}
    harmless = RESUMABLE_KEYS - ({"max_steps"} if was.get("lr_scheduler_type") in ("linear", "cosine") else set())
    changed = [
        f"{key} was {was[key]}, is {now[key]}"
        for key in CONFIG
        if key in was and key in now and key not in harmless and not _same(was[key], now[key])
        if key != "rewards" or "rewards" not in facts
    ]
    changed += [f"{key} was {then[key]}, is {facts[key]}" for key in ("dtype", "model_commit")
                if facts.get(key) and then.get(key) and then[key] != facts[key]]  # fmt: skip
    changed += _other_rewards(then.get("rewards") or [], facts.get("rewards") or []) if "rewards" in facts else []
    if all(isinstance(was.get(key), int) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")):
        sizes = [
            config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * processes
            for config, processes in ((was, then.get("processes", 1)), (now, world))
        ]
        if sizes[0] != sizes[1]:
            changed.append(
                f"an update had {sizes[0]} completions ({then.get('processes', 1)} process(es)), has {sizes[1]} ({world}): "
                "per_device_train_batch_size x gradient_accumulation_steps x processes must stay the same"
            )
    return changed


def _other_rewards(was: list[dict], now: list[dict]) -> list[str]:
    """In what two lists of rewards differ, each by name, weight and digest: the same file by another path is the same."""
    lists = [{f"{reward['name']} x {reward['weight']:g}": reward.get("digest") for reward in each} for each in (was, now)]
    if list(lists[0]) != list(lists[1]):
        return [f"rewards were {', '.join(lists[0])}, are {', '.join(lists[1])}"]
    return [f"the reward {name} has another content now" for name, digest in lists[0].items() if digest != lists[1][name]]


def _same(was, now) -> bool:
    """Equal, or the same path said in another way."""
    if was == now:
        return True
    return isinstance(was, str) and isinstance(now, str) and was and now and Path(was).resolve() == Path(now).resolve()
