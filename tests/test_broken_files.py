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
from safetensors.torch import load_file, save_file
from test_bad_input import refused

from phi2_grpo.training import checkpoints


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN_BASES = {
    "weights cut": lambda base: cut(base / "model.safetensors"),
    "weights gone": lambda base: (base / "model.safetensors").unlink(),
    "a shard gone": lambda base: (base / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    ),
    "config no object": lambda base: (base / "config.json").write_text("[]"),
    "no heads": lambda base: change(base / "config.json", num_attention_heads=0),
    "a wrong type": lambda base: change(base / "config.json", hidden_size="wide"),
    "tokenizer cut": lambda base: cut(base / "tokenizer.json"),
}


@pytest.mark.parametrize("how", BROKEN_BASES)
def test_a_base(call, quick, micro, tmp_path, how):
    base = shutil.copytree(micro, tmp_path / "base")
    BROKEN_BASES[how](base)
    done = call("train_grpo", "--check", *quick, "--model", base, "--output_dir", tmp_path / "o")
    refused(done, f"the model in {base} cannot be loaded", "Copy it again whole")


BROKEN_ADAPTERS = {
    "weights cut": lambda adapter: cut(adapter / "adapter_model.safetensors"),
    "another rank": lambda adapter: change(adapter / "adapter_config.json", r=3),
    "another kind": lambda adapter: change(adapter / "adapter_config.json", target_modules=["fc1"]),
    "config no object": lambda adapter: (adapter / "adapter_config.json").write_text("null"),
    "config cut": lambda adapter: cut(adapter / "adapter_config.json"),
}


@pytest.mark.parametrize("how", BROKEN_ADAPTERS)
def test_an_adapter_to_start_from(call, quick, final, tmp_path, how):
    adapter = shutil.copytree(final, tmp_path / "adapter")
    BROKEN_ADAPTERS[how](adapter)
    refused(call("train_grpo", "--check", *quick, "--init_adapter", adapter, "--output_dir", tmp_path / "o"), str(adapter))


@pytest.mark.parametrize("text", ["[]", "7", "null", "{", '{"temperature": "hot"}', '{"max_new_tokens": -3}'])
@pytest.mark.parametrize("name", ["validate_model", "export_model"])
def test_a_generation_config(call, quick, final, tmp_path, name, text):
    adapter = shutil.copytree(final, tmp_path / "adapter")
    (adapter / "generation_config.json").write_text(text)
    own = {"validate_model": (*quick[:6], "--validation_dir", tmp_path / "v"), "export_model": ("--out", tmp_path / "m")}[name]
    refused(call(name, *own, "--adapter", adapter), "generation_config.json is broken")


@pytest.mark.parametrize("values", [{"config": []}, {"config": None, "data": 3}, {"versions": None}, {"data": {"a": 1}}])
def test_a_run_json_of_other_types_is_as_good_as_none(call, quick, final, tmp_path, values):
    adapter = shutil.copytree(final, tmp_path / "adapter")
    change(adapter / "run.json", **values)
    limits = ("--max_prompts", 2, "--samples_per_prompt", 1, "--validation_dir", tmp_path / "v")
    done = call("validate_model", *quick[:6], *quick[6:10], "--adapter", adapter, *limits)
    assert done.code == 0, done.err
    done = call("deploy_space", "me/app", "--dry_run", "--adapter", adapter)
    assert done.code == 0, done.err


@pytest.mark.parametrize("values", [{"config": []}, {"seconds": "long"}, {"processes": None}, {"files": []}, {"data": [1]}])
def test_a_checkpoints_run_json_of_other_types(call, quick, trained, tmp_path, values):
    shutil.copytree(trained, tmp_path / "o")
    change(tmp_path / "o" / "checkpoint-6" / "run.json", **values)
    done = call("train_grpo", 6, *quick, "--output_dir", tmp_path / "o", "--resume")
    assert done.code == 0 or done.err.startswith("error: "), done.err


@pytest.mark.parametrize("text", ["---\na: [\n---\n# x", "---\nlicense: {}\nbase_model: 3\n---\n", b"\xff\xfe"])
def test_a_card(call, final, tmp_path, text):
    adapter = shutil.copytree(final, tmp_path / "adapter")
    (adapter / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = call("export_model", "--adapter", adapter, "--out", tmp_path / "m")
    assert done.code == 0 or "is no model card" in done.err, done.err


LONG = "a" * 250


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


# --- tokenizers, vocabularies, layers


def retokenized(base: Path, **values) -> None:
    change(base / "tokenizer_config.json", **values)


ODD_BASES = {
    "no end token": (lambda base: retokenized(base, eos_token=None), "no end token"),
    "a template that fails": (lambda base: (base / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "chat template"),
    "a template of nothing": (lambda base: (base / "chat_template.jinja").write_text("-"), "leaves out what is said"),
    "too small a vocabulary": (lambda base: smaller_vocabulary(base), "not of one model"),
}


def smaller_vocabulary(base: Path) -> None:
    rows = json.loads((base / "config.json").read_text())["vocab_size"] - 9
    change(base / "config.json", vocab_size=rows)
    weights = load_file(base / "model.safetensors")
    of_tokens = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    save_file(weights | {name: weights[name][:rows] for name in of_tokens}, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("how", ODD_BASES)
def test_an_odd_base(call, quick, micro, tmp_path, how):
    base = shutil.copytree(micro, tmp_path / "base")
    harm, expected = ODD_BASES[how]
    harm(base)
    refused(call("train_grpo", "--check", *quick, "--model", base, "--output_dir", tmp_path / "o"), expected)


def test_weights_that_are_not_all_there(call, quick, micro, tmp_path):
    """transformers would fill what is missing with random numbers."""
    base = shutil.copytree(micro, tmp_path / "base")
    change(base / "config.json", num_hidden_layers=4)
    refused(call("train_grpo", 1, *quick, "--model", base, "--output_dir", tmp_path / "o"), "are missing, like model.layers.2")


def test_weights_that_are_no_numbers(call, quick, micro, tmp_path):
    """No adapter comes of it."""
    base = shutil.copytree(micro, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    done = call("train_grpo", 2, *quick, "--model", base, "--eval_prompts", 0, "--output_dir", tmp_path / "o")
    refused(done, "the gradient of step 1 is not finite")
    assert not (tmp_path / "o-final").exists() and not checkpoints.complete_checkpoints(tmp_path / "o")


def test_what_is_no_base_and_no_adapter(call, quick, trained, final, tmp_path):
    options = ("train_grpo", "--check", *quick, "--output_dir", tmp_path / "o")
    refused(call(*options, "--model", final), "It is an adapter, of ")
    refused(call(*options, "--init_adapter", trained), "Give one of its checkpoints")
    shutil.copytree(trained, tmp_path / "o")
    refused(call(*options, "--overwrite", "--init_adapter", tmp_path / "o" / "checkpoint-4"), "lies in output_dir")


# --- what is somebody's


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
