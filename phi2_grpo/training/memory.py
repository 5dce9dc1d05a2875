"""What a training will hold in memory: estimates, computed on a model without weights."""

import torch
from peft import PeftModel

from phi2_grpo.models.lora import lora_counts
from phi2_grpo.rollout.cache import cache_bytes_per_token, round_length, rows_within


def estimate(
    config: dict, model: PeftModel, longest: int, device: torch.device, dtype: torch.dtype, free: int, reward_models: int = 0
) -> dict[str, int]:
    """Bytes by part, for prompts of `longest` tokens and completions of full length.

    The KV cache takes what the update leaves of `free`, up to all completions of a step or an evaluation. `reward_models`:
    bytes of the reward models.
    """
    rows = config["per_device_train_batch_size"]
    # A prompt is computed once for those of its completions that are in one pass; TRL scatters them over several passes.
    group = config["num_generations"]
    parts_of_groups = -(-rows // group) + bool(rows % group and group % rows)  # a group may begin in the middle of the rows
    prompts = min(rows, parts_of_groups) if config["gradient_accumulation_steps"] == 1 else rows
    tokens = rows * config["max_completion_length"]  # of completions
    parts = update_estimate(config, model, tokens + prompts * longest, device, dtype)
    if device.type != "cuda":  # log-probs without TRL's Triton kernel hold the logits, in float32, and their gradient
        parts["update"] += 2 * 4 * tokens * model.config.get_text_config().vocab_size
    parts["reward model"] = reward_models
    bytes_per_row = round_length(longest + config["max_completion_length"]) * cache_bytes_per_token(model.config, dtype)
    available = free - parts["CUDA"] - parts["weights"] - reward_models
    most_rows = config["rollout_batch_size"] or rows_within(available, bytes_per_row, reserved_bytes(parts), device)
    wanted = max(config["per_device_train_batch_size"] * config["gradient_accumulation_steps"], config["eval_prompts"])
    parts["KV cache"] = min(most_rows, wanted) * bytes_per_row
    return {name: int(size) for name, size in parts.items() if size}


def update_estimate(config: dict, model: PeftModel, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by part of an update over `tokens` that go through the model before one backward pass.

    Activations take about 100 bytes for each token, layer and hidden unit in bfloat16 (Phi with LoRA under autocast: 18 for
    the inputs of the adapters, 8 for attention, 4 for the layer norm, 56 for gelu in float32, the rest temporary). With
    checkpointing they are those of one layer, and the input of each.
    """
    base = model.config.get_text_config()
    _, trainable, parameters = lora_counts(model)
    layer = 50 * dtype.itemsize * tokens * base.hidden_size
    inputs = dtype.itemsize * tokens * base.hidden_size * base.num_hidden_layers
    return {
        "CUDA": 500_000_000 if device.type == "cuda" else 0,
        "weights": parameters * dtype.itemsize,
        "adapter, gradient, Adam": trainable * 4 * 4,
        "update": inputs + layer if config["activation_checkpointing"] else layer * base.num_hidden_layers,
    }


def reserved_bytes(parts: dict[str, int]) -> int:
    """What the rollout engine leaves free, as it is allocated later: the optimizer and the update."""
    return parts["adapter, gradient, Adam"] + parts["update"]


def peak(parts: dict[str, int], engine: str) -> int:
    """The most held at once. "fast" keeps its cache during the update; generate frees it before."""
    return sum(parts.values()) - (0 if engine == "fast" else min(parts["update"], parts["KV cache"]))
