"""The memory estimate, the presets made from it, and steps that are split to fit."""

import pytest
import torch
from conftest import make_micro, ok, rows_of
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import models
from config import CONFIG, PRESETS
from phi2_grpo.models.lora import lora_config
from phi2_grpo.rollout.cache import cache_bytes_per_token
from phi2_grpo.training import memory

GPU, BF16, LONGEST = torch.device("cuda"), torch.bfloat16, CONFIG["max_prompt_tokens"]


@pytest.fixture(scope="module")
def phi2():
    with torch.device("meta"):
        base = models.full_size_phi2()
        return get_peft_model(base, lora_config(CONFIG, base))


@pytest.mark.parametrize(("size", "preset"), [(12e9, "phi2"), (24e9, "phi2-24gb"), (80e9, "phi2-80gb"), (6e9, None)])
def test_the_largest_preset_that_fits_a_gpu(phi2, size, preset):
    free = 0.97 * size  # a desktop takes some
    assert memory.largest_preset(phi2, LONGEST, GPU, BF16, free) == preset
    if preset:
        config = {**CONFIG, **PRESETS[preset]}
        parts = memory.estimate(config, phi2, LONGEST, GPU, BF16, free)
        assert parts["weights"] == 2_779_683_840 * 2 and parts["adapter, gradient, Adam"] == 23_592_960 * 16
        assert memory.peak(parts, "generate") < memory.peak(parts, "fast") < free
        bytes_per_row = (LONGEST + config["max_completion_length"]) * cache_bytes_per_token(phi2.config, BF16)
        assert parts["KV cache"] / bytes_per_row >= config["num_generations"]


def test_a_reward_model_leaves_less_to_a_preset(phi2):
    room = int(0.97 * 12e9)
    assert memory.largest_preset(phi2, LONGEST, GPU, BF16, 2 * room, reward_models=room) == "phi2"


def test_what_changes_the_estimate(phi2):
    def parts(reward_models=0, **changes):
        return memory.estimate({**CONFIG, **changes}, phi2, LONGEST, GPU, BF16, 11.5e9, reward_models)

    usual = parts()
    assert parts(per_device_train_batch_size=2)["update"] == pytest.approx(usual["update"] / 2)
    assert parts(activation_checkpointing=False)["update"] > 10 * usual["update"]
    assert parts(rollout_batch_size=3)["KV cache"] == 3 * 640 * 32 * 2 * 2560 * 2
    assert parts(reward_models=10**9)["reward model"] == 10**9


def test_activations_kept_by_a_layer_are_about_the_estimate(tmp_path):
    """What autograd keeps from forward to backward, in float32 on the CPU."""
    folder = make_micro(tmp_path / "base", hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()  # no dropout
    model = get_peft_model(base, lora_config({**CONFIG, "model": str(folder)}, base))
    weights, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor):
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        base.model(input_ids=torch.randint(0, 200, (4, 128))).last_hidden_state.sum().backward()
    config = {**CONFIG, "activation_checkpointing": False}
    estimate = memory.update_estimate(config, model, 4 * 128, torch.device("cpu"), torch.float32)["update"]
    assert 0.5 * estimate < sum(kept.values()) < estimate


def test_an_update_in_parts_is_the_update_at_once(call, quick, tmp_path):
    """The same completions, the loss in one pass of 8 or in four of 2, the rollout at once or in batches of 3."""
    weights, metrics = [], []
    for size, passes, rollout in ((8, 1, 0), (2, 4, 3)):
        output = tmp_path / str(size)
        flags = ("--per_device_train_batch_size", size, "--gradient_accumulation_steps", passes)
        flags = (*flags, "--rollout_batch_size", rollout)
        ok(call("train_grpo", 2, *quick, *flags, "--warmup_steps", 0, "--output_dir", output, "--eval_prompts", 0))
        final = output.with_name(f"{size}-final")
        weights.append(load_file(final / "adapter_model.safetensors"))
        metrics.append(rows_of(final))
    for a, b in zip(*metrics, strict=True):
        assert a["reward"] == pytest.approx(b["reward"]) and a["completions/mean_length"] == b["completions/mean_length"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for name, weight in weights[0].items():
        # Adam divides by the gradient's size: where that is rounding alone, so is the step (at most the learning rate each).
        assert (weight - weights[1][name]).abs().mean() < 2e-5, name


def test_another_architecture_trains_with_generate(call, quick, micro, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer, folder = AutoTokenizer.from_pretrained(micro), tmp_path / "llama"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    LlamaForCausalLM(LlamaConfig(**shape, **ids, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ("--model", folder, "--lora_target_modules", "all-linear", "--output_dir", tmp_path / "o", "--eval_prompts", 4)
    done = call("train_grpo", 2, *quick, *flags)
    assert done.code == 0 and "llama" in done.out, done.err
