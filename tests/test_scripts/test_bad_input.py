"""Wrong input to a script: one message with the value and the remedy, exit code 2, no traceback, nothing written."""

import json
import os
import shutil
import socket

import pytest
from conftest import refused

from phi2_grpo.common import setup
from phi2_grpo.models import embedded

MESSAGE = {"message_id": "a", "parent_id": None, "message_tree_id": "a", "text": "Why?", "role": "prompter", "lang": "en",
           "rank": None, "review_result": True, "deleted": False}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "flags", "expected"),
    [({"ask": "Why?"}, (), "--prompt_column"), ({**MESSAGE, "lang": "pt-BR"}, ("--languages", "pt"), "pt-BR")],
)
def test_a_source(call, micro, tmp_path, monkeypatch, row, flags, expected):
    """It is read before the tiny model is built, which takes minutes where it is not there yet."""
    monkeypatch.setattr(embedded, "prepare", lambda *_: pytest.fail("the model was built"))
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    options = ("--model", micro, "--dataset", tmp_path / "m.jsonl", "--data_dir", tmp_path / "d", "--validation_fraction", 0)
    refused(call("prepare_data", *options, *flags), expected)
    assert not (tmp_path / "d").exists()


def test_a_hub_out_of_reach(call, micro, tmp_path):
    """At once, without a minute of retries (the tests run with HF_HUB_OFFLINE)."""
    (tmp_path / "m.jsonl").write_text(json.dumps(MESSAGE))
    options = ("--dataset", tmp_path / "m.jsonl", "--data_dir", tmp_path / "d", "--validation_fraction", 0)
    refused(call("prepare_data", *options), "microsoft/phi-2", "--preset tiny")
    refused(call("prepare_data", "--model", micro, "--data_dir", tmp_path / "d"), "OpenAssistant/oasst1", "--preset tiny")


def test_offline_is_noticed(monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup.socket, "create_connection", unreachable)
    setup.prepare("tiny", ".")
    assert "HF_HUB_OFFLINE" not in os.environ, "local names need no Hub"
    setup.prepare("some/model")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # what the other tests expect


@pytest.mark.parametrize("name", ["inspect_data", "train_grpo", "train_reward", "validate_model"])
def test_data_that_is_not_prepared(call, quick, final, tmp_path, name):
    adapter = {"validate_model": ("--adapter", final)}.get(name, ())
    done = call(name, *quick[:4], "--data_dir", tmp_path / "d", *adapter)
    refused(done, f"python prepare_data.py --preset tiny --model {quick[3]} --data_dir {tmp_path}/d")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num_generations", "3"], ["8 completions", "--num_generations 2,", "--per_device_train_batch_size 9"]),
        (["--max_completion_length", "500"], ["500", "context of 512"]),
        (["--target_tokens", "7"], ["--max_completion_length 14"]),
        (["--lora_target_modules", "Wqkv,fc9"], ["fc9", "all-linear"]),
        (["--init_adapter", "nowhere"], ["nowhere"]),
        (["--output_dir", "LICENSE/x"], ["cannot write to LICENSE/x"]),
        (["--model", "no/such"], ["no/such"]),
        (["--use_vllm"], ["pip install trl[vllm]"]),
        (["--rewards", "lenght"], ["lenght", "length"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
    ],
)
def test_a_training(call, quick, tmp_path, flags, expected):
    refused(call("train_grpo", 2, *quick, "--output_dir", tmp_path / "o", *flags), *expected)
    assert list(tmp_path.iterdir()) == []


def test_no_gpu_for_the_default_preset(call, micro, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("phi2_grpo.models.base._parameters", lambda _: 2.7e9)
    done = call("train_grpo", "--model", micro, "--data_dir", prepared, "--output_dir", tmp_path / "o")
    refused(done, "no CUDA GPU", "--preset smollm2", "--preset tiny", "--device cpu")


def test_a_disk_that_is_nearly_full(call, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused(call("train_grpo", 2, *quick, "--output_dir", tmp_path / "o"), "Make room")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--adapter", "nowhere"], "no adapter at nowhere"),
        (["--adapter", "."], "adapter_config.json"),
        (["--prompt", "  "], "--prompt"),
        (["--max_prompts", "0"], "--max_prompts"),
        (["--validation_dir", "LICENSE/x"], "LICENSE"),
    ],
)
def test_a_validation(call, quick, final, tmp_path, flags, expected):
    refused(call("validate_model", *quick[:6], "--adapter", final, "--validation_dir", tmp_path / "v", *flags), expected)


@pytest.mark.parametrize(("flag", "value"), [("--language", "xx"), ("--search", "qqqqq"), ("--samples", "-1")])
def test_an_inspection(call, quick, flag, value):
    refused(call("inspect_data", *quick[:6], flag, value), value)
