"""Odd folders, paths and rewards: they work, or are refused with one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, refused


@pytest.mark.parametrize(
    ("name", "flag", "place"),
    [("prepare_data", "--data_dir", "a" * 250), ("train_grpo", "--output_dir", "/"), ("train_reward", "--reward_dir", "/"),
     ("validate_model", "--validation_dir", "a" * 250), ("export_model", "--out", "a" * 250)],
)  # fmt: skip
def test_a_folder_that_cannot_be_made(call, quick, final, tmp_path, name, flag, place):
    flags = {"train_grpo": quick, "export_model": ("--adapter", final), "validate_model": (*quick[:6], "--adapter", final)}
    refused(call(name, *flags.get(name, quick[:4]), flag, tmp_path / place), "another folder")


def test_a_path_is_printed_as_it_stands(call, quick, tmp_path):
    """Square brackets are rich's markup, a word between colons is its emoji."""
    output = tmp_path / "[bold]" / "[" / "a:heart:]"
    done = call("train_grpo", "--check", *quick, "--output_dir", output)
    assert done.code == 0 and "[bold]/[/a:heart:]" in "".join(done.out.replace("│", "").split()), done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is Linux's")
def test_a_full_disk_behind_stdout(micro, prepared):
    command = [sys.executable, "inspect_data.py", "--preset", "tiny", "--model", str(micro), "--data_dir", str(prepared)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0 and "no room is left" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_others_may_read_what_is_written(trained, final):
    """safetensors writes files that are their owner's alone."""
    os.umask(mask := os.umask(0))
    for path in (final / "adapter_model.safetensors", trained / "checkpoint-6" / "adapter_model.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


def test_a_path_that_is_also_a_pattern(call, micro, prepared, tmp_path):
    place = tmp_path / "[v1]" / "a*b"
    place.mkdir(parents=True)
    rows = [json.loads(line) for line in (ROOT / "sample" / "tiny.jsonl").read_text().splitlines()]
    datasets.Dataset.from_list([{**row, "labels": None, "detoxify": None} for row in rows]).to_parquet(tmp_path / "m.parquet")
    (tmp_path / "m.parquet").rename(place / "[m].parquet")
    options = ("--preset", "tiny", "--model", micro, "--max_prompt_tokens", 100, "--data_dir", place / "$HOME")
    done = call("prepare_data", *options, "--dataset", place / "[m].parquet")
    assert done.code == 0, done.err
    first, second = (json.loads((folder / "funnel.json").read_text()) for folder in (prepared, place / "$HOME"))
    assert first["fingerprint"] == second["fingerprint"]


def test_the_tiny_sample_is_found_from_elsewhere(call, micro, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("prepare_data", "--preset", "tiny", "--model", micro, "--data_dir", "d").code == 0


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
            done = call(*options, f"{tmp_path}/odd.py:{name}")
            assert done.code == 0, done.err
    refused(call(*options, f"{tmp_path}/odd.py:cancelled"), "CancelledError")
