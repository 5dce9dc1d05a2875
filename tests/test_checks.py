"""What the checks before a start find, so that nothing fails after it."""

import json
import runpy
import signal
import sys

import pytest
import torch
from conftest import ROOT
from test_bad_input import refused

from config import CONFIG, PRESETS
from phi2_grpo.common.cli import UserError
from phi2_grpo.training import memory, preflight

CPU = torch.device("cpu")


def test_a_folder_called_like_a_tracker_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert not preflight.is_installed("wandb") and preflight.is_installed("trackio")


def test_a_batch_of_one(call, quick, tmp_path):
    own = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1, "--output_dir", tmp_path / "o", "--check")
    done = call("train_grpo", 1, *quick, *own)
    refused(done, "not a multiple of num_generations 4. Give --per_device_train_batch_size 4.")


@pytest.mark.parametrize(("asked", "good"), [("no", True), ("", True), ("bf16", False), ("fp16", False), ("fp8", False)])
def test_a_launcher_s_mixed_precision(monkeypatch, asked, good):
    """Ours on a CPU is none; another would override it, and run.json would say otherwise."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    config = {**CONFIG, **PRESETS["tiny"]}
    if good:
        assert preflight._device(config)[0] == (CPU, torch.float32)
    else:
        with pytest.raises(UserError, match=f"asks for mixed precision {asked}.*trains with no"):
            preflight._device(config)


def test_what_triton_needs_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "cc")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert preflight._compiler()[0]
    (tmp_path / "Python.h").unlink()
    with pytest.raises(UserError, match="needs .*Python.h"):
        preflight._compiler()
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError, match="needs a C compiler and .*Python.h"):
        preflight._compiler()


def test_a_wrong_file_is_seen_before_the_tiny_model_is_built(call, tmp_path, monkeypatch):
    from phi2_grpo.models import embedded

    monkeypatch.setattr(embedded, "prepare", lambda *_: pytest.fail("built"))
    (tmp_path / "m.jsonl").write_text(json.dumps({"question": "Why?"}))
    done = call("prepare_data", "--preset", "tiny", "--dataset", tmp_path / "m.jsonl", "--data_dir", tmp_path / "d")
    refused(done, "lacks the columns message_id, text, role, lang; it has question")


@pytest.mark.parametrize("name", ["prepare_data", "train_grpo", "validate_model"])
def test_scripts_start_where_there_is_no_sighup(name, monkeypatch, capsys):
    """Windows has none."""
    for module in [module for module in sys.modules if module.startswith("phi2_grpo")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0 and "--preset" in capsys.readouterr().out
    from phi2_grpo.training.callbacks import GracefulStop

    assert GracefulStop._heard() == [signal.SIGINT, signal.SIGTERM]


def test_a_reward_model_s_training_says_what_memory_it_takes(call, quick, tmp_path):
    done = call("train_reward", *quick[:6], "--reward_dir", tmp_path / "r", "--report_to", "none", "--check")
    assert done.code == 0 and "memory" in done.out and "GB free" in " ".join(done.out.split()), done.err
    wrapped = preflight.model.wrap_empty({**CONFIG, "model": str(quick[3])})
    config = {"activation_checkpointing": False}
    parts = memory.update_estimate(config, wrapped, 100, CPU, torch.float32)
    assert parts["update"] == 50 * 4 * 100 * 32 * 2, "bytes x tokens x hidden x layers"


def test_texts_are_judged_by_their_tokens(monkeypatch, micro):
    """Never more in one pass than a forward pass may hold, padding included; and each score is that of the text alone."""
    from transformers import AutoModelForSequenceClassification

    from phi2_grpo.models.tokenizer import FORWARD_TOKENS, load_tokenizer
    from phi2_grpo.rewards.reward_model import score_answers

    tokenizer = load_tokenizer({**CONFIG, "model": str(micro)})
    tokenizer.padding_side = "right"
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(micro, num_labels=1).eval()
    judge.config.pad_token_id = tokenizer.pad_token_id
    sizes, forward = [], judge.forward

    def watched(input_ids, **more):
        sizes.append(input_ids.numel())
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(judge, "forward", watched)
    prompts = [[{"role": "user", "content": "Why?"}]] * 24
    answers = ["plant " * (3 * i) for i in range(24)]
    together = score_answers(judge, tokenizer, prompts, answers)
    assert max(sizes) <= FORWARD_TOKENS and 1 < len(sizes) < 24
    alone = [score_answers(judge, tokenizer, prompts[:1], [answer])[0] for answer in answers]
    assert together == pytest.approx(alone, abs=1e-4)
