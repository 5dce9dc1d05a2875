"""An estimate of a run's memory, by arithmetic and without weights."""

import torch
from peft import PeftModel

from config import CONFIG, PRESETS
from phi2_grpo.models.lora import lora_counts
from phi2_grpo.rollout.cache import cache_bytes_per_token, round_length, rows_in

GB = 1e9
GPU_PRESETS = ("phi2", "phi2-24gb", "phi2-80gb")  # for one GPU, from small to large


def estimate(
    config: dict, policy: PeftModel, longest: int, device: torch.device, dtype: torch.dtype, free: int, reward_models: int = 0
) -> dict[str, int]:
    """Bytes by part, at the longest prompt (`longest` tokens) and completions of full length.

    The cache takes what is left by the update, up to all completions of a step or an evaluation. `reward_models`:
    their bytes.
    """
    length = longest + config["max_completion_length"]
    parts = update_estimate(config, policy, config["per_device_train_batch_size"] * length, device, dtype)
    parts["reward model"] = reward_models
    per_row = round_length(length) * cache_bytes_per_token(policy.config, dtype)
    left = free - parts["CUDA"] - parts["weights"] - reward_models
    rows = config["rollout_batch_size"] or rows_in(left, per_row, reserved_bytes(parts), device)
    parts["KV cache"] = min(rows, max(completions(config), config["eval_prompts"])) * per_row
    return {name: int(size) for name, size in parts.items() if size}


def update_estimate(config: dict, policy: PeftModel, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by part of an update over `tokens` in one pass, padding included.

    Activations are an estimate: 100 bytes for each token, layer and hidden unit in bfloat16 (for Phi with LoRA under autocast:
    inputs of the adapters 18, attention 8, the layer norm 4, gelu in float32 56, and temporaries); with
    checkpointing this for one layer, and each layer's input.
    """
    base = policy.config
    _, trainable, parameters = lora_counts(policy)
    layer = 50 * dtype.itemsize * tokens * base.hidden_size
    inputs = dtype.itemsize * tokens * base.hidden_size * base.num_hidden_layers
    return {
        "CUDA": GB // 2 if device.type == "cuda" else 0,
        "weights": parameters * dtype.itemsize,
        "adapter, gradient, Adam": trainable * 4 * 4,
        "update": inputs + layer if config["activation_checkpointing"] else layer * base.num_hidden_layers,
    }


def reserved_bytes(parts: dict[str, int]) -> int:
    """Bytes that the rollout engine must leave free: the optimizer and the update come after it has taken its cache."""
    return parts["adapter, gradient, Adam"] + parts["update"]


def completions(config: dict) -> int:
    """Completions sampled for one update by one process."""
    return config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]


def peak(parts: dict[str, int], engine: str) -> int:
    """The fast engine keeps its cache during the update; generate frees it before."""
    return sum(parts.values()) - (0 if engine == "fast" else min(parts["update"], parts["KV cache"]))


def largest_preset(policy: PeftModel, longest: int, device: torch.device, dtype: torch.dtype, free: int) -> str | None:
    """The largest of GPU_PRESETS that fits `free` bytes, with a cache for at least one group of completions."""
    fitting = None
    for name in GPU_PRESETS:
        config = {**CONFIG, **PRESETS[name]}
        parts = estimate(config, policy, longest, device, dtype, free)
        per_row = round_length(longest + config["max_completion_length"]) * cache_bytes_per_token(policy.config, dtype)
        if peak(parts, "fast") <= free and parts["KV cache"] >= config["num_generations"] * per_row:
            fitting = name
    return fitting
