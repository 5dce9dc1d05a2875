"""Before a run: what will it hold in memory, what fits, and how fast can a step be at best? By arithmetic, without weights."""

import time

import torch
from peft import PeftModel

from config import CONFIG, PRESETS
from phi2_grpo.models.lora import lora_counts
from phi2_grpo.rollout.cache import cache_bytes_per_token, round_length, rows_in

GB = 1e9


GPU_PRESETS = ("phi2", "phi2-24gb", "phi2-80gb")  # presets for one card, from small to large


NOT_TOGETHER = ("update", "KV cache")


def estimate(
    config: dict, wrapped: PeftModel, longest: int, device: torch.device, dtype: torch.dtype, free: int, judges: int = 0
) -> dict[str, int]:
    """Bytes by part, at the longest prompt (`longest` tokens) and completions of full length.

    The cache takes what is left by the update, up to all completions of a step or an evaluation. `judges`: bytes of reward
    models.
    """
    length = longest + config["max_completion_length"]
    parts = update_estimate(config, wrapped, config["per_device_train_batch_size"] * length, device, dtype)
    parts["reward model"] = judges
    per_row = round_length(length) * cache_bytes_per_token(wrapped.config, dtype)
    left = free - parts["CUDA"] - parts["weights"] - judges
    rows = config["rollout_batch_size"] or rows_in(left, per_row, reserved_bytes(parts), device)
    parts["KV cache"] = min(rows, max(completions(config), config["eval_prompts"])) * per_row
    return {name: int(size) for name, size in parts.items() if size}


def update_estimate(config: dict, wrapped: PeftModel, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by part of an update over `tokens` in one pass, padding included.

    Activations are an estimate: 100 bytes for each token, layer and hidden unit in bfloat16 (for Phi with LoRA under autocast:
    inputs of the adapters 18, attention 8, the layer norm 4, gelu in float32 56, and some for what is on its way); with
    checkpointing this for one layer, and each layer's input.
    """
    base = wrapped.config
    _, trainable, parameters = lora_counts(wrapped)
    layer = 50 * dtype.itemsize * tokens * base.hidden_size
    inputs = dtype.itemsize * tokens * base.hidden_size * base.num_hidden_layers
    return {
        "CUDA": GB // 2 if device.type == "cuda" else 0,
        "weights": parameters * dtype.itemsize,
        "adapter, gradient, Adam": trainable * 4 * 4,
        "update": inputs + layer if config["activation_checkpointing"] else layer * base.num_hidden_layers,
    }


def reserved_bytes(parts: dict[str, int]) -> int:
    """What comes after the rollout engine has taken its cache: the optimizer and the update."""
    return parts["adapter, gradient, Adam"] + parts["update"]


def completions(config: dict) -> int:
    """Completions sampled for one update by one process."""
    return config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]


def peak(parts: dict[str, int], engine: str) -> int:
    """The peak: graph keeps its cache, generate gives it back before the update."""
    both = sum(parts.values())
    return both if engine == "fast" else both - min(parts[name] for name in NOT_TOGETHER)


def largest_preset(wrapped: PeftModel, longest: int, device: torch.device, dtype: torch.dtype, free: int) -> str | None:
    """The last of CARDS whose plan is within `free` bytes, with a cache for a group of completions at least."""
    fitting = None
    for name in GPU_PRESETS:
        config = {**CONFIG, **PRESETS[name]}
        parts = estimate(config, wrapped, longest, device, dtype, free)
        per_row = round_length(longest + config["max_completion_length"]) * cache_bytes_per_token(wrapped.config, dtype)
        if peak(parts, "fast") <= free and parts["KV cache"] >= config["num_generations"] * per_row:
            fitting = name
    return fitting


def speed(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy (reading and writing) and floating-point operations a second of a matrix product, measured."""
    cuda = device.type == "cuda"
    source = torch.ones((2**28 if cuda else 2**24), device=device)
    target = torch.empty_like(source)
    square = torch.ones((8192 if cuda else 1024), (8192 if cuda else 1024), device=device, dtype=dtype)
    copy = _seconds(lambda: target.copy_(source), cuda)
    product = _seconds(lambda: square @ square, cuda)
    return 2 * source.nbytes / copy, 2 * len(square) ** 3 / product


def _seconds(work, cuda: bool) -> float:
    times = []
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def decode_seconds(weights: int, live_cache: float, bandwidth: float) -> float:
    """The least a decode step takes: the weights are read once, and each live sequence's cache."""
    return (weights + live_cache) / bandwidth


def step_seconds(
    config: dict, wrapped: PeftModel, prompt: float, parts: dict[str, int], dtype: torch.dtype, bandwidth: float, flops: float
) -> tuple[float, float]:
    """The least seconds of a step, (rollout, update and reference), for prompts of `prompt` tokens, completions of full length.

    Of a frozen base, forward and backward take 2 operations each for a parameter and token; the reference (beta > 0) and
    checkpointing are a forward more each.
    """
    new, count = config["max_completion_length"], completions(config)
    per_token = cache_bytes_per_token(wrapped.config, dtype)
    rows = max(1, min(count, round(parts["KV cache"] / per_token / (prompt + new))))
    portions = -(-count // rows)
    rollout = portions * new * decode_seconds(parts["weights"], rows * (prompt + new / 2) * per_token, bandwidth)
    _, _, parameters = lora_counts(wrapped)
    passes = 2 + (config["beta"] > 0) + config["activation_checkpointing"]
    return rollout, 2 * passes * parameters * count * (prompt + new) / flops
