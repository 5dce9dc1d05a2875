"""A training from its start, or from its last whole checkpoint, to its end; and what is said where something else ends it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import load_peft_weights, set_peft_model_state_dict
from transformers import TrainerState

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, disk_is_full, first_line, memory_ran_out, num_processes
from phi2_grpo.models.base import is_sharded
from phi2_grpo.rewards.collapse import WINDOW
from phi2_grpo.rewards.scorer import BadReward
from phi2_grpo.training import checkpoints
from phi2_grpo.training.callbacks import GracefulStop


def train(trainer, config: dict, output: Path, whole: list[Path], steps: int) -> None:
    """Train up to `steps`, on from the newest of `whole`, the checkpoints in `output`.

    Raises UserError for what ends it and is no bug, KeyboardInterrupt or Terminated after a signal: what the last whole step
    left is saved, and the message says how to go on.
    """
    asked = GracefulStop()
    trainer.add_callback(asked)
    if whole and checkpoints.step_of(whole[-1]) >= steps:
        if is_sharded():
            raise UserError(
                f"nothing is left to train, and with FSDP or ZeRO the result is not written again: take {whole[-1]}."
            )
        take_up(trainer, whole[-1])  # nothing is left to train, and the trainer would do one step more
        return
    if not whole and trainer.accelerator.is_main_process:
        checkpoints.remove_run(output)  # as late as can be: loading the model may still fail
    try:
        with asked.listening():
            trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
    except BadReward as error:
        raise UserError(
            f"{error}\n  {_save_now(trainer, output)}\n  A mended reward is another run: start it from those weights, "
            "--init_adapter CHECKPOINT and another --output_dir."
        ) from None
    except Exception as error:
        if memory_ran_out(error):
            part = trainer.failed_in or "update"
            raise UserError(
                f"memory ran out in the {part} of step {trainer.state.global_step + 1}: {first_line(error).split('. ')[0]}.\n"
                f"  {_save_now(trainer, output)}\n  The next smaller setting: {smaller(config, part)}"
            ) from None
        if isinstance(error, UserError):
            raise UserError(f"{error}\n  {_what_is_left(output)}") from None
        _explain(error, output)
        raise
    finally:
        trainer.watch.progress.stop()  # or a failure leaves a terminal without its cursor
    if trainer.state.global_step < steps:
        asked.raise_if_asked()


def take_up(trainer, checkpoint: Path) -> None:
    """Put the trainer where the checkpoint left it, without training: its weights and its state."""
    weights = load_peft_weights(str(checkpoint), device=str(trainer.accelerator.device))
    set_peft_model_state_dict(trainer.accelerator.unwrap_model(trainer.model), weights)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def take_last_good(trainer, output: Path, collapsed_at: int) -> int:
    """Put the trainer back to the last checkpoint before the collapse, and return its step. Raises UserError without one."""
    good = [path for path in checkpoints.complete_checkpoints(output) if checkpoints.step_of(path) <= collapsed_at - WINDOW]
    if not good:
        raise UserError(
            f"it collapsed at step {collapsed_at}, before there was a good checkpoint, so there is no result. Mend the reward, "
            "lower --learning_rate or --save_steps, or raise --beta; then --overwrite."
        )
    take_up(trainer, good[-1])
    return checkpoints.step_of(good[-1])


@contextmanager
def advice_when_interrupted(output: Path) -> Iterator[None]:
    """Adds to a Ctrl-C or SIGTERM what is left, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(_what_is_left(output)) from None


def _what_is_left(output: Path) -> str:
    left = checkpoints.complete_checkpoints(output)
    return f"{left[-1]} is whole: go on with --resume." if left else "No checkpoint was written yet."


def _save_now(trainer, output: Path) -> str:
    """Save what the last whole step left, where no checkpoint has it yet; says what there is."""
    step = trainer.state.global_step
    # Of several processes one alone cannot save: the others wait for it elsewhere.
    if step and trainer.accelerator.num_processes == 1 and not checkpoints.is_complete(output / f"checkpoint-{step}"):
        trainer._save_checkpoint(trainer.model, trial=None)  # private; a test holds it
    return _what_is_left(output)


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
        less = max(n for n in range(1, size) if size * passes % n == 0)  # the completions of an update stay as many
        return f"--per_device_train_batch_size {less} --gradient_accumulation_steps {size * passes // less}"
    if part == "reward update":
        return f"--reward_max_length {config['reward_max_length'] // 2}, and start anew"
    length = config["max_completion_length"] // 2
    return f"--max_completion_length {length} --target_tokens {min(config['target_tokens'], length // 2)}, and start anew"


def _explain(error: Exception, output: Path) -> None:
    """Raise a UserError for what ended a training and is no bug: a full disk, another process that is gone."""
    if disk_is_full(error):
        free = shutil.disk_usage(files.nearest_existing(output)).free
        text = f"no room is left on the disk of {output} ({free / 1e9:.2f} GB free): {error}\n  Make room."
        raise UserError(f"{text} {_what_is_left(output)}") from None
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out", "remote process")
    if num_processes() > 1 and any(part in str(error) for part in lost):
        reason = first_line(error)[:200]
        text = f"another process of this run is gone, or its machine: {reason}\n  {_what_is_left(output)}"
        raise UserError(text) from None
