"""Odd paths and rewards: they work, or are refused with one message."""

import os

import torch
from conftest import ok, refused


def test_a_path_is_printed_as_it_stands(call, quick, tmp_path):
    """Square brackets are rich's markup, a word between colons is its emoji."""
    output = tmp_path / "[bold]" / "[" / "a:heart:]"
    done = call("train_grpo", "--check", *quick, "--output_dir", output)
    assert done.code == 0 and "[bold]/[/a:heart:]" in "".join(done.out.replace("│", "").split()), done.err


def test_others_may_read_what_is_written(trained, final):
    """safetensors writes files that are their owner's alone."""
    os.umask(mask := os.umask(0))
    for path in (final / "adapter_model.safetensors", trained / "checkpoint-6" / "adapter_model.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


ODD_REWARDS = """
import asyncio, torch
def clears(prompts, answers, **_):
    prompts.clear()
    return [1.0] * len(answers)
def cancelled(**_):
    raise asyncio.CancelledError
def gradless(answers, **_):
    torch.set_grad_enabled(False)
    return [float(len(answer)) for answer in answers]
"""


def test_odd_rewards(call, quick, tmp_path):
    (tmp_path / "odd.py").write_text(ODD_REWARDS)
    options = ("train_grpo", 1, *quick, "--eval_prompts", 0, "--output_dir", tmp_path / "o", "--overwrite", "--rewards")
    with torch.enable_grad():  # which restores the mode at its end
        for name in ("clears", "gradless"):
            ok(call(*options, f"{tmp_path}/odd.py:{name}"))
    refused(call(*options, f"{tmp_path}/odd.py:cancelled"), "CancelledError")
