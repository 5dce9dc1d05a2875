"""Each wrong input: one clear message on stderr, exit code 2, no traceback, nothing lost."""

import json
import shutil
import socket

import pytest
from conftest import make_micro

MESSAGE = {"message_id": "a", "parent_id": None, "message_tree_id": "a", "text": "Why?", "role": "prompter", "lang": "en",
           "rank": None, "review_result": True, "deleted": False}  # fmt: skip


def lines(*rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def refused(done, *expected: str) -> None:
    assert done.code == 2, (done.code, done.out, done.err)
    assert done.err.startswith("error: ") and "Traceback" not in done.err
    flat = " ".join(done.err.split())
    for part in expected:
        assert part in flat, flat


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        ("", [], "holds no messages"),
        (lines(MESSAGE, "{broken"), [], "cannot be read past row 1"),
        (lines(MESSAGE, MESSAGE, "[1, 2]"), [], "row 3"),
        (lines({"prompt": "x"}), [], "message_id is None"),
        (lines({**MESSAGE, "text": 5}), [], "text is 5"),
        (lines({**MESSAGE, "rank": "best"}), [], "rank is 'best'"),
        (lines({**MESSAGE, "role": "user"}), [], "role is 'user', but it takes prompter or assistant"),
        (lines({**MESSAGE, "review_result": "no"}), [], "review_result is 'no'"),
        (lines({**MESSAGE, "labels": {"name": ["toxicity"], "value": []}}), [], "row 1"),
        (lines({**MESSAGE, "deleted": True}), ["--validation_fraction", "0"], "not deleted: 0"),
        (
            lines({**MESSAGE, "text": "why " * 99}),
            ["--validation_fraction", "0", "--max_prompt_tokens", "9"],
            "9 tokens at most",
        ),
        (lines(MESSAGE), ["--languages", "xx"], "no xx"),
        (lines({**MESSAGE, "lang": "pt-BR"}), ["--languages", "pt"], "It has: pt-BR"),
        (lines(MESSAGE), ["--max_toxicity", "2"], "takes 0.0 to 1.0"),
        (lines(MESSAGE), ["--max_prompt_tokens", "0"], "takes 1 to"),
    ],
)
def test_sources(call, micro, tmp_path, content, flags, expected):
    (tmp_path / "m.jsonl").write_text(content)
    options = ("--model", micro, "--dataset", tmp_path / "m.jsonl", "--data_dir", tmp_path / "d")
    refused(call("prepare_data", *options, *flags), expected)
    assert not (tmp_path / "d").exists(), "nothing half-written"


def test_sources_that_are_no_source(call, micro, tmp_path):
    (tmp_path / "m.csv").write_text("a,b")
    (tmp_path / "m.parquet").write_text("not parquet")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00abc")
    for name, expected in {
        "none.jsonl": "is no file",
        "m.csv": "cannot be read",
        "m.parquet": "cannot be read",
        "bytes.jsonl": "cannot be read",
        "short.jsonl.gz": "cannot be read",
        ".": "cannot be read",
    }.items():
        options = ("--model", micro, "--dataset", tmp_path / name, "--data_dir", tmp_path / "d")
        refused(call("prepare_data", *options), expected)


def test_hub_out_of_reach(call, micro, tmp_path):
    """Said at once, without a minute of retries (the tests run with HF_HUB_OFFLINE)."""
    (tmp_path / "m.jsonl").write_text(lines(MESSAGE))
    options = ("--dataset", tmp_path / "m.jsonl", "--data_dir", tmp_path / "d")
    refused(call("prepare_data", *options), "microsoft/phi-2", "cannot be loaded", "--preset tiny")
    options = ("--model", micro, "--data_dir", tmp_path / "d")
    refused(call("prepare_data", *options), "OpenAssistant/oasst1 cannot be read", "--preset tiny")


def test_offline_is_noticed(monkeypatch):
    import os

    from phi2_grpo.common import setup

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


@pytest.mark.parametrize("name", ["inspect_data", "train_grpo", "validate_model"])
def test_data_not_prepared(call, micro, trained, tmp_path, name):
    adapter = ("--adapter", trained.with_name("grpo-final")) if name == "validate_model" else ()
    device = () if name == "inspect_data" else ("--device", "cpu")
    done = call(name, "--model", micro, "--data_dir", tmp_path / "d", *adapter, *device)
    refused(done, "no prepared data", "python prepare_data.py")


def test_data_for_another_tokenizer(call, quick, tmp_path):
    other = make_micro(tmp_path / "other", texts=["Quite another text " * 9] * 3)
    done = call("train_grpo", "--check", *quick, "--model", other, "--output_dir", tmp_path / "o")
    refused(done, "prepared for the tokenizer of", "--overwrite")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num_generations", "3"], "Give --num_generations 2 or 4, or --per_device_train_batch_size 9"),
        (["--num_generations", "5"], "not a multiple of num_generations 5"),
        (["--max_completion_length", "500"], "more than the context of 512"),
        (["--target_tokens", "7"], "give at least --max_completion_length 14"),
        (["--lora_target_modules", "Wqkv,fc9"], "fc9 matches no linear layer"),
        (["--lora_target_modules", ""], "--lora_target_modules is empty"),
        (["--init_adapter", "nowhere"], "no adapter at nowhere"),
        (["--per_device_train_batch_size", "4000"], "prompts are sampled at once"),
        (["--output_dir", "LICENSE/x"], "cannot write"),
        (["--output_dir", "/proc/x"], "cannot write"),
        (["--model", "no/such"], "cannot be loaded"),
        (["--model", "."], "cannot be loaded"),
    ],
)
def test_training_settings(call, quick, tmp_path, flags, expected):
    done = call("train_grpo", 2, *quick, "--output_dir", tmp_path / "o", *flags)
    refused(done, expected)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o-final").exists()


def test_all_complaints_at_once(call, quick, tmp_path):
    flags = ("--num_generations", "3", "--target_tokens", "7", "--lora_target_modules", "fc9")
    done = call("train_grpo", "--check", *quick, "--output_dir", tmp_path / "o", *flags)
    refused(done, "batch: ", "settings: ", "LoRA: ")


def test_no_gpu_for_the_default_preset(call, micro, prepared, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = call("train_grpo", "--model", micro, "--data_dir", prepared, "--output_dir", tmp_path / "o")
    refused(done, "no CUDA GPU", "--preset tiny", "--device cpu")


def test_disk_full_is_seen_before_the_start(call, quick, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(call("train_grpo", 2, *quick, "--output_dir", tmp_path / "o"), "free. Make room")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--adapter", "nowhere"], "no adapter at nowhere"),
        (["--adapter", "."], "incomplete"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--max_prompts", "0"], "takes 1 to"),
        (["--validation_dir", "LICENSE/x"], "cannot write"),
    ],
)
def test_validation(call, quick, trained, tmp_path, flags, expected):
    base = [*map(str, quick[:6]), "--adapter", str(trained.with_name("grpo-final")), "--validation_dir", str(tmp_path / "v")]
    refused(call("validate_model", *base, *flags), expected)


def test_validation_without_held_out_prompts(call, micro, trained, tmp_path):
    options = ("--preset", "tiny", "--model", micro, "--data_dir", tmp_path / "d")
    assert "No validation prompt" in call("prepare_data", *options, "--validation_fraction", 0).out
    refused(call("validate_model", *options, "--adapter", trained.with_name("grpo-final")), "no validation prompt")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--language", "xx"], "'xx'"), (["--search", "qqqqq"], "qqqqq"), (["--samples", "-1"], "--samples"),
     (["--samples", "many"], "whole number")],
)  # fmt: skip
def test_inspection(call, micro, prepared, flags, expected):
    refused(call("inspect_data", "--preset", "tiny", "--model", micro, "--data_dir", prepared, *flags), expected)


@pytest.mark.parametrize("name", ["prepare_data", "inspect_data", "validate_model"])
def test_ctrl_c(call, micro, monkeypatch, name):

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("phi2_grpo.models.tokenizer.load_tokenizer", interrupt)
    monkeypatch.setattr("phi2_grpo.models.lora.check_adapter", interrupt)
    done = call(name, "--preset", "tiny", "--model", micro, "--data_dir", "nowhere")
    assert done.code == 130 and "interrupted" in done.err and "Traceback" not in done.err
