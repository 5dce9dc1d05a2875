"""The memory plan and the presets made from it, running out of memory, and steps that are split to fit."""

import json

import pytest
import torch
from conftest import make_micro
from peft import get_peft_model
from safetensors.torch import load_file

from benchmarks import models
from config import CONFIG, PRESETS
from phi2_grpo.models import base
from phi2_grpo.models.lora import lora_config
from phi2_grpo.rollout.cache import cache_bytes_per_token
from phi2_grpo.training import memory

GPU, BF16 = torch.device("cuda"), torch.bfloat16
SIZES = {"phi2": 12e9, "phi2-24gb": 24e9, "phi2-80gb": 80e9}
LONGEST = CONFIG["max_prompt_tokens"]


@pytest.fixture(scope="module")
def phi2():
    with torch.device("meta"):
        base = models.full_size_phi2()
        return get_peft_model(base, lora_config(CONFIG, base))


@pytest.mark.parametrize(("preset", "size"), SIZES.items())
def test_each_preset_fits_its_gpu_and_no_smaller_one_takes_it(phi2, preset, size):
    config = {**CONFIG, **PRESETS[preset]}
    free = 0.97 * size  # a desktop takes some
    parts = memory.estimate(config, phi2, LONGEST, GPU, BF16, free)
    assert memory.peak(parts, "fast") < free
    assert parts["weights"] == 2_779_683_840 * 2 and parts["adapter, gradient, Adam"] == 23_592_960 * 16
    per_row = (LONGEST + config["max_completion_length"]) * cache_bytes_per_token(phi2.config, BF16)
    assert parts["KV cache"] / per_row >= config["num_generations"], "room for a group at once"
    assert memory.largest_preset(phi2, LONGEST, GPU, BF16, free) == preset
    assert memory.peak(parts, "generate") < memory.peak(parts, "fast")


def test_a_gpu_too_small_for_any(phi2):
    assert memory.largest_preset(phi2, LONGEST, GPU, BF16, 6e9) is None


def test_the_estimate_moves_the_right_way(phi2):
    def parts(**changes):
        return memory.estimate({**CONFIG, **changes}, phi2, LONGEST, GPU, BF16, 11.5e9)

    usual = parts()
    assert parts(per_device_train_batch_size=2)["update"] == pytest.approx(usual["update"] / 2)
    assert parts(activation_checkpointing=False)["update"] > 10 * usual["update"]
    assert parts(rollout_batch_size=3)["KV cache"] == 3 * 640 * 32 * 2 * 2560 * 2
    assert parts(max_completion_length=64)["KV cache"] < usual["KV cache"] * 1.5
    assert memory.estimate(CONFIG, phi2, LONGEST, GPU, BF16, 11.5e9, reward_models=10**9)["reward model"] == 10**9


def test_activations_kept_by_a_layer_are_about_what_is_estimated(tmp_path):
    """Counted: what autograd keeps from forward to backward, in float32 on the CPU (2 x the estimate's half-precision bytes)."""
    from transformers import AutoModelForCausalLM

    folder = make_micro(tmp_path / "base", hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    base.config.resid_pdrop = 0.0
    policy = get_peft_model(base, lora_config({**CONFIG, "model": str(folder)}, base))
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(0, 200, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = policy.get_base_model().model(input_ids=tokens).last_hidden_state
    hidden.sum().backward()
    config = {**CONFIG, "per_device_train_batch_size": 4, "max_completion_length": 28, "activation_checkpointing": False}
    estimated = memory.estimate(config, policy, 100, torch.device("cpu"), torch.float32, 1e12)["update"]
    assert 0.5 * estimated < sum(kept.values()) < estimated


def test_an_update_in_parts_is_the_update_in_one(call, quick, tmp_path):
    """The same completions, the loss in one pass of 8 or in four of 2, the rollout in one portion or in many."""
    sides = {"whole": (8, 1, 0), "parts": (2, 4, 3)}
    weights, rows = {}, {}
    for side, (size, passes, portion) in sides.items():
        how = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", passes, "--rollout_batch_size", portion)
        done = call("train_grpo", 2, *quick, *how, "--warmup_steps", 0, "--output_dir", tmp_path / side, "--eval_prompts", 0)
        assert done.code == 0, done.err
        final = tmp_path / f"{side}-final"
        weights[side] = load_file(final / "adapter_model.safetensors")
        rows[side] = [json.loads(line) for line in (final / "metrics.jsonl").read_text().splitlines()]
    for a, b in zip(*rows.values(), strict=True):
        assert a["reward"] == pytest.approx(b["reward"]) and a["completions/mean_length"] == b["completions/mean_length"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for name, weight in weights["whole"].items():
        # Adam divides by the gradient's size: where that is rounding alone, so is the step (at most the learning rate each).
        assert (weight - weights["parts"][name]).abs().mean() < 2e-5, name


def test_out_of_memory_while_loading(call, quick, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(base, "load_base", full)
    done = call("train_grpo", 1, *quick, "--output_dir", tmp_path / "o")
    assert done.code == 2 and "CUDA out of memory" in done.err and "Traceback" not in done.err


def test_vllm_that_is_not_there(call, quick, tmp_path):
    done = call("train_grpo", 1, *quick, "--use_vllm", "--output_dir", tmp_path / "o")
    assert done.code == 2 and "pip install trl[vllm]" in done.err and not (tmp_path / "o").exists()


def test_another_architecture_trains_with_generate(call, quick, micro, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(micro)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {key: tokenizer.eos_token_id for key in ("eos_token_id", "bos_token_id", "pad_token_id")}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), **ids)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    how = ("--model", tmp_path / "llama", "--lora_target_modules", "all-linear", "--output_dir", tmp_path / "o")
    done = call("train_grpo", 2, *quick, *how)
    assert done.code == 0, done.err
    said = " ".join(done.out.replace("│", " ").split())
    assert "generate: transformers' generate" in said and "this is llama" in said
