"""Wrong input to a script: one message with the value and the remedy, exit code 2, no traceback, nothing written."""

import os
import shutil
import socket
from unittest.mock import Mock

import pytest
from conftest import refused

from phi2_grpo.common import setup
from phi2_grpo.models import embedded


def test_a_source(call, tmp_path, monkeypatch):
    """It is read before the tiny model is built, which takes minutes where it is not there yet."""
    monkeypatch.setattr(embedded, "prepare", lambda *_: pytest.fail("the model was built"))
    refused(call("prepare_data", "--preset", "tiny", "--data_dir", tmp_path / "d", "--languages", "pt"), "no pt.", "pt-BR")
    assert not (tmp_path / "d").exists()


def test_a_hub_out_of_reach(call, micro, tmp_path):
    """At once, without a minute of retries (the tests run with HF_HUB_OFFLINE)."""
    refused(call("prepare_data", "--model", micro, "--data_dir", tmp_path / "d"), "OpenAssistant/oasst1", "--preset tiny")


def test_offline_is_noticed(monkeypatch):
    monkeypatch.setattr(setup.socket, "create_connection", Mock(side_effect=socket.gaierror))
    monkeypatch.setattr(setup, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    setup.prepare("tiny", ".")
    assert "HF_HUB_OFFLINE" not in os.environ, "local names need no Hub"
    setup.prepare("some/model")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_training(call, quick, tmp_path):
    """Each check that fails is named (and tested by itself in test_checks.py and beside what it checks)."""
    wrong = ("--use_vllm", "--num_generations", 3)
    expected = ("pip install 'trl[vllm]'", "8 completions", "--per_device_train_batch_size 9")
    refused(call("train_grpo", 2, *quick, "--output_dir", tmp_path / "o", *wrong), *expected)
    refused(call("train_grpo", 2, *quick, "--model", "no/such", "--output_dir", tmp_path / "o"), "base model: ", "no/such")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_nearly_full(call, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused(call("train_grpo", 2, *quick, "--output_dir", tmp_path / "o"), "Make room")


@pytest.mark.parametrize(("script", "flag", "value"), [("validate_model", "--prompt", "  "), ("inspect_data", "--language", "xx"),
    ("inspect_data", "--search", "qqqqq"), ("inspect_data", "--samples", "-1")])  # fmt: skip
def test_a_flag_of_one_script(call, quick, script, flag, value):
    refused(call(script, *quick[:6], flag, value), flag, value.strip())
