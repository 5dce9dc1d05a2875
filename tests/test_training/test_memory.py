"""The memory estimate, the presets made from it, and steps that are split to fit."""

import pytest
import torch
from conftest import SHAPE, WEIGHTS, ok, rows_of
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import models
from config import CONFIG, PRESETS
from phi2_grpo.models.lora import lora_config
from phi2_grpo.rollout import cache
from phi2_grpo.rollout.cache import cache_bytes_per_token, rows_within
from phi2_grpo.training import memory

GPU, BF16, LONGEST = torch.device("cuda"), torch.bfloat16, CONFIG["max_prompt_tokens"]


@pytest.fixture(scope="module")
def phi2():
    with torch.device("meta"):
        base = models.full_size_phi2()
        return get_peft_model(base, lora_config(CONFIG, base))


def test_where_memory_is_short_a_cpu_still_decodes_some_rows_at_once():
    rows = [rows_within(5e9, 12_000_000, 4_900_000_000, torch.device(kind)) for kind in ("cpu", "mps", "cuda")]
    assert rows == [8, 8, 1]
    assert rows_within(5e9, 12_000_000, 6_000_000_000, torch.device("cpu")) == 1


@pytest.mark.parametrize(("size", "preset"), [(12e9, "phi2"), (24e9, "phi2-24gb"), (80e9, "phi2-80gb")])
def test_each_preset_fits_its_gpu(phi2, size, preset):
    free, config = 0.97 * size, {**CONFIG, **PRESETS[preset]}  # a desktop takes some
    parts = memory.estimate(config, phi2, LONGEST, GPU, BF16, free)
    assert parts["weights"] == 2_779_683_840 * 2 and parts["adapter, gradient, Adam"] == 23_592_960 * 16
    assert memory.peak(parts, "generate") < memory.peak(parts, "fast") < free
    bytes_per_row = (LONGEST + config["max_completion_length"]) * cache_bytes_per_token(phi2.config, BF16)
    assert parts["KV cache"] / bytes_per_row >= config["num_generations"]


def test_what_changes_the_estimate(phi2):
    def parts(reward_models=0, **changes):
        return memory.estimate({**CONFIG, **changes}, phi2, LONGEST, GPU, BF16, 11.5e9, reward_models)

    usual = parts()
    assert parts(per_device_train_batch_size=2)["update"] == pytest.approx(usual["update"] / 2)
    assert parts(activation_checkpointing=False)["update"] > 10 * usual["update"]
    assert parts(rollout_batch_size=3)["KV cache"] == 3 * 640 * 32 * 2 * 2560 * 2
    assert parts(reward_models=10**9)["reward model"] == 10**9


def test_an_update_in_parts_is_the_update_at_once(call, quick, tmp_path):
    """The same completions, the loss in one pass of 8 or in four of 2, the rollout at once or in batches of 3."""
    for size, passes, rollout in ((8, 1, 0), (2, 4, 3)):
        flags = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", passes, "--eval_prompts", 0)
        own = ("--rollout_batch_size", rollout, "--warmup_steps", 0, "--output_dir", tmp_path / str(size))
        ok(call("train_grpo", 2, *quick, *flags, *own))
    folders = [tmp_path / "8-final", tmp_path / "2-final"]
    for a, b in zip(*map(rows_of, folders), strict=True):
        assert a["reward"] == pytest.approx(b["reward"]) and a["completions/mean_length"] == b["completions/mean_length"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    once, parts = (load_file(folder / WEIGHTS) for folder in folders)
    for name, weight in once.items():
        # Adam divides by the gradient's size: where that is rounding alone, so is the step (at most the learning rate each).
        assert (weight - parts[name]).abs().mean() < 2e-5, name


def test_another_architecture_trains(call, quick, micro, tmp_path):
    tokenizer, folder = AutoTokenizer.from_pretrained(micro), tmp_path / "llama"
    ids = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    LlamaForCausalLM(LlamaConfig(**SHAPE, **ids, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ("--model", folder, "--lora_target_modules", "all-linear", "--output_dir", tmp_path / "o", "--eval_prompts", 4)
    assert "llama" in ok(call("train_grpo", 2, *quick, *flags)).out


def test_the_limit_of_a_container_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CGROUPS", tmp_path)
    monkeypatch.setattr(cache, "MY_GROUP", tmp_path / "mine")
    (tmp_path / "mine").write_text("0::/job/step\n")
    for group, limit in (("job", "3000"), ("job/step", "max")):
        (tmp_path / group).mkdir()
        for name, text in (("max", limit), ("current", "2500\n"), ("stat", "anon 1\ninactive_file 400\n")):
            (tmp_path / group / f"memory.{name}").write_text(text)
    assert cache.free_memory(torch.device("cpu")) == 900
