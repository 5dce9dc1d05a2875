"""Where a run is to write: what stands there, may it be gone on with or replaced, and is there room?

Each returns (value, what was found, in words), and raises UserError.
"""

import shutil
from pathlib import Path

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError
from phi2_grpo.training import checkpoints
from phi2_grpo.training.checkpoints import complete_checkpoints


def for_a_run(output: Path, final: Path, key: str, resume: bool, overwrite: bool):
    """`output` is for the checkpoints, `final` for what a finished run leaves, with `key` in its run.json."""
    files.check_writable(output)
    files.check_writable(final)
    finished = files.check_replaceable(final, key)
    if not checkpoints.is_ours(output):
        raise UserError(f"{output} holds metrics or checkpoints of another program, and they stay. Choose another folder.")
    if (output / "adapter_config.json").exists():
        raise UserError(f"{output} is a finished adapter, not a place for checkpoints. Choose another folder.")
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it. Give one of them.")
    whole = complete_checkpoints(output)
    run = whole[-1] if whole else final if finished else None
    if resume and not whole and finished:
        raise UserError(f"{final} is finished, and there is no checkpoint to go on from. Replace it: --overwrite.")
    if resume:
        return output, f"resuming at {whole[-1].name}" if whole else "no complete checkpoint: starting at step 0"
    if run and not overwrite:
        raise UserError(f"{run} holds a run. Go on with it: --resume; replace it: --overwrite; or choose another folder.")
    return output, f"{output}{', replacing the run there' if run else ''}"


def same_run(config: dict, output: Path, funnel: dict, steps: int, facts: dict):
    """Would the newest checkpoint go on as it began?"""
    whole = complete_checkpoints(output)
    if not whole:
        return True, "nothing to go on from"
    then = files.read_run(whole[-1])
    changed = checkpoints.changed_settings(then, config, facts)
    if then.get("data", {}).get("fingerprint") != funnel["fingerprint"]:
        changed.append(f"the prompts in {config['data_dir']} are others than those it was trained on")
    if changed:
        raise UserError(
            f"{whole[-1]} is of a run with other settings, and would not go on as it began:\n  "
            + "\n  ".join(changed)
            + "\n  Give those settings again, or start anew: --overwrite, or another folder."
        )
    found = f"settings and data are those of {whole[-1].name}"
    if (step := checkpoints.step_of(whole[-1])) >= steps:
        found += f"; nothing is left to train: it is at step {step} of {steps}"
    return True, found


def room(config: dict, trainable: int, output: Path):
    """For the checkpoints of `trainable` parameters."""
    # A checkpoint is adapter and two Adam moments in float32; one more is written before the oldest goes.
    need = trainable * 4 * 3 * (config["save_total_limit"] + 1) + trainable * 4
    path = files.nearest_existing(output)
    free = shutil.disk_usage(path).free
    if need > free:
        raise UserError(f"checkpoints need {need / 1e9:.2f} GB, {path} has {free / 1e9:.2f} GB free. Make room there.")
    return True, f"{need / 1e9:.2f} GB for checkpoints, of {free / 1e9:.1f} GB free"
