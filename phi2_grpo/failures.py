"""What is said when a training ends before its end: what ended it, what is left of it, and what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi2_grpo import files
from phi2_grpo.checkpoints import whole_checkpoints
from phi2_grpo.cli import UserError, processes


@contextmanager
def advice_when_interrupted(output: Path) -> Iterator[None]:
    """Adds to a Ctrl-C or SIGTERM what is left, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        left = whole_checkpoints(output)
        advice = f"{left[-1]} is whole: go on with --resume." if left else "No checkpoint was written yet."
        raise type(interrupt)(advice) from None


def smaller(config: dict, part: str) -> str:
    """The next smaller setting after memory ran out in `part` of a step."""
    size, passes = config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
    if part == "rollout":
        rows = config["rollout_batch_size"] or size * passes
        if rows > 1:
            return f"--rollout_batch_size {rows // 2}"
    if not config["activation_checkpointing"]:
        return "--activation_checkpointing"
    if size > 1:
        return f"--per_device_train_batch_size {size // 2} --gradient_accumulation_steps {-(-size * passes // (size // 2))}"
    length = config["max_completion_length"] // 2
    return f"--max_completion_length {length} --target_tokens {min(config['target_tokens'], length // 2)}"


def explain(error: Exception, output: Path) -> None:
    """Raise a UserError for what ended a training and is no bug: a full disk, another process that is gone."""
    left = whole_checkpoints(output)
    advice = f"{left[-1]} is whole: go on with --resume." if left else "No checkpoint was written yet: start again."
    if disk_is_full(error):
        free = shutil.disk_usage(files.nearest_existing(output)).free
        text = f"no room is left on the disk of {output} ({free / 1e9:.2f} GB free): {error}\n  Make room. {advice}"
        raise UserError(text) from None
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out", "remote process")
    if processes() > 1 and any(part in str(error) for part in lost):
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"another process of this run is gone, or its machine: {reason}\n  {advice}") from None


def disk_is_full(error: BaseException) -> bool:
    """Whether `error` means that no room is left: each library that writes says it in its own way."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return any(part in text for part in ("No space left", "os error 28", "file write failed", "unexpected pos"))
