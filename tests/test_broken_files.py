"""Files that are there and are broken, places that are none, and readers that are gone: a message or a way on, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT
from test_bad_input import MESSAGE, lines, refused


@pytest.mark.parametrize("text", ["[]", "{}", '{"settings": null, "model": 1, "tokenizer": 1, "fingerprint": 1}'])
def test_a_funnel(call, micro, prepared, tmp_path, text):
    data_dir = shutil.copytree(prepared, tmp_path / "d")
    (data_dir / "funnel.json").write_text(text)
    done = call("inspect_data", "--preset", "tiny", "--model", micro, "--data_dir", data_dir)
    refused(done, "half-written", "--overwrite")


def test_prompts_that_were_changed(call, micro, prepared, tmp_path):
    """One letter, in the bytes of the table: neither its shape nor its ids show it."""
    data_dir = shutil.copytree(prepared, tmp_path / "d")
    file = next((data_dir / "oasst1_prompts" / "train").glob("*.arrow"))
    assert b"plant" in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(b"plant", b"plank"))
    refused(call("inspect_data", "--preset", "tiny", "--model", micro, "--data_dir", data_dir), "not what its funnel.json")


def test_a_link_in_the_place_of_prepared_data(call, micro, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.txt").write_text("x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "oasst1_prompts").symlink_to(tmp_path / "elsewhere")
    options = ("--preset", "tiny", "--model", micro, "--data_dir", tmp_path / "d")
    assert call("prepare_data", *options, "--overwrite").code == 0
    assert (tmp_path / "elsewhere" / "thesis.txt").exists()
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["funnel.json", "oasst1_preferences", "oasst1_prompts"]


@pytest.mark.parametrize(
    ("row", "flags"),
    [({"rank": 10**12}, []), ({"rank": -1}, []), ({"labels": {"name": {"toxicity": 0}, "value": [1]}}, ["--max_toxicity", "0.5"]),
     ({"detoxify": {"toxicity": "very"}}, ["--max_toxicity", "0.5"])],
)  # fmt: skip
def test_rows(call, micro, tmp_path, row, flags):
    (tmp_path / "m.jsonl").write_text(lines({**MESSAGE, **row}))
    done = call("prepare_data", "--model", micro, "--dataset", tmp_path / "m.jsonl", "--data_dir", tmp_path / "d", *flags)
    refused(done, "row 1", "not what oasst1 has")


@pytest.mark.parametrize("text", ["---\na: [\n---\n# x", "---\nlicense: {}\nbase_model: 3\n---\n", b"\xff\xfe"])
def test_a_card(call, final, tmp_path, text):
    adapter = shutil.copytree(final, tmp_path / "adapter")
    (adapter / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = call("export_model", "--adapter", adapter, "--out", tmp_path / "m")
    assert done.code == 0 or "is no model card" in done.err, done.err


LONG = "a" * 250


def test_a_path_that_datasets_cannot_have(call, micro, tmp_path):
    done = call("prepare_data", "--preset", "tiny", "--model", micro, "--data_dir", tmp_path / "a::b")
    refused(done, "has a :: in it", "Choose another folder")


@pytest.mark.parametrize("place", ["/", LONG, "nowhere-link", "\udcff"])
@pytest.mark.parametrize(
    ("name", "flag"),
    [("prepare_data", "--data_dir"), ("train_grpo", "--output_dir"), ("train_reward", "--reward_dir"),
     ("validate_model", "--validation_dir"), ("export_model", "--out")],
)  # fmt: skip
def test_places(call, quick, final, tmp_path, name, flag, place):
    if place == "nowhere-link":
        (tmp_path / place).symlink_to(tmp_path / "nowhere" / "at" / "all")
    options = {
        "prepare_data": quick[:4],
        "train_grpo": (2, *quick),
        "train_reward": quick[:6],
        "validate_model": (*quick[:6], "--adapter", final),
        "export_model": ("--adapter", final),
    }[name]
    done = call(name, *options, flag, place if place == "/" else tmp_path / place)
    refused(done, "Choose another folder")


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


# --- what is somebody's


def test_prepared_data_takes_nobody_s_place(call, micro, tmp_path):
    options = ("prepare_data", "--preset", "tiny", "--model", micro, "--data_dir", tmp_path)
    (tmp_path / "oasst1_preferences").mkdir()
    (tmp_path / "oasst1_preferences" / "thesis.txt").write_text("x")
    for more in ((), ("--overwrite",)):
        refused(call(*options, *more), "is no data set, and would be replaced")
    (tmp_path / "oasst1_preferences" / "thesis.txt").rename(tmp_path / "oasst1_prompts")
    refused(call(*options, "--overwrite"), "is no data set, and would be replaced")
    assert (tmp_path / "oasst1_prompts").read_text() == "x"


def test_a_report_takes_nobody_s_place(call, quick, final, tmp_path):
    (tmp_path / "report.md").write_text("my thesis")
    options = ("validate_model", *quick[:6], "--adapter", final, "--validation_dir", tmp_path)
    refused(call(*options, "--overwrite"), "report.md that is no validation's")
    assert (tmp_path / "report.md").read_text() == "my thesis"


def test_others_may_read_what_is_written(trained, final):
    """safetensors writes files that are their owner's alone."""
    os.umask(mask := os.umask(0))
    for path in (final / "adapter_model.safetensors", trained / "checkpoint-6" / "adapter_model.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


# --- where it runs


def test_a_path_that_libraries_take_for_a_pattern(call, micro, prepared, tmp_path):
    place = tmp_path / "[v1]" / "a*b"
    place.mkdir(parents=True)
    rows = [json.loads(line) for line in (ROOT / "tiny" / "messages.jsonl").read_text().splitlines()]
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


@pytest.mark.parametrize("values", [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}])
def test_a_part_of_what_torchrun_sets(call, monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda _: None)
    refused(call("inspect_data"), "a part of what torchrun sets")


def test_a_folder_that_is_gone(call, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refused(call("inspect_data"), "the folder that you are in is gone")


# --- rewards of one's own

ODD_REWARDS = """
import asyncio, torch

def clears(prompts, answers, **columns):
    prompts.clear()
    return [1.0] * len(answers)

def cancelled(**_):
    raise asyncio.CancelledError

def gradless(answers, **_):
    torch.set_grad_enabled(False)
    return [float(len(answer)) for answer in answers]
"""


def test_rewards_of_every_kind(call, quick, final, tmp_path):
    (tmp_path / "odd.py").write_text(ODD_REWARDS)
    options = ("train_grpo", 1, *quick, "--eval_prompts", 0, "--output_dir", tmp_path / "o", "--overwrite", "--rewards")
    try:
        for name in ("clears", "gradless"):
            done = call(*options, f"{tmp_path}/odd.py:{name}")
            assert done.code == 0, done.err
    finally:
        torch.set_grad_enabled(True)
    refused(call(*options, f"{tmp_path}/odd.py:cancelled"), "CancelledError")
    refused(call(*options, "length:1e300"), "takes -1,000,000 to 1,000,000")
    refused(call(*options, "length", "--report_to", "wandb"), "pip install wandb")
    done = call("validate_model", *quick[:6], "--adapter", final, "--validation_dir", tmp_path / "v", "--rewards",
                f"{tmp_path}/odd.py:cancelled")  # fmt: skip
    refused(done, "CancelledError")
    assert not (tmp_path / "v" / "unfinished").exists(), "before anything is drawn"
