"""How a token is sampled, where a completion ends, and a guard for the state of the random number generators."""

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

# What of a GenerationConfig the fast engine can follow, or may ignore.
SUPPORTED_FIELDS = {"do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "eos_token_id", "bos_token_id",
                    "pad_token_id", "stop_strings", "use_cache", "disable_compile", "transformers_version"}  # fmt: skip


def rollout_generation_config(config: dict, tokenizer) -> GenerationConfig:
    """Sampling as in the rollouts of the training."""
    return GenerationConfig(
        do_sample=True,
        **{key: config[key] for key in ("temperature", "top_p", "top_k")},
        max_new_tokens=config["max_completion_length"],
        eos_token_id=tokenizer.all_eos_ids,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """What is drawn inside leaves Python's, numpy's and torch's generators as they were."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng does not know it
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


@dataclass(frozen=True)
class Sampling:
    """What of a GenerationConfig decides about a token."""

    greedy: bool
    temperature: float
    top_k: int  # 0: off
    top_p: float
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, config: GenerationConfig) -> "Sampling | None":
        """None where another setting would change the completions, such as a repetition penalty."""
        others = [value for key, value in config.to_diff_dict().items() if key not in SUPPORTED_FIELDS]
        # None, 0 and 1 switch a number's setting off (min_p 0, repetition_penalty 1); True switches another one on.
        if any(value is True or value not in (None, 0, 1) for value in others):
            return None
        top_k = 50 if config.top_k is None else config.top_k  # generate's own default
        return cls(not config.do_sample, config.temperature or 1.0, top_k, config.top_p or 1.0, generation_eos_ids(config))

    def sample(self, logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B,) for `logits` (B, V) and `uniforms` (B, 1) in [0, 1), by inversion of the cumulative distribution.

        The same number gives the same token whatever else is in the batch. With the tokens come their log-probs (B,) at this
        temperature, before top-k and top-p: what the update computes for them.
        """
        logits = logits.float() / self.temperature
        if self.greedy:
            tokens = logits.argmax(-1)
        else:
            kept = TopKLogitsWarper(self.top_k)(None, logits) if self.top_k else logits
            kept = TopPLogitsWarper(self.top_p)(None, kept) if self.top_p < 1 else kept
            cdf = kept.softmax(-1).cumsum(-1, dtype=torch.float64)  # float32 loses the rare tokens
            tokens = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def generation_eos_ids(config: GenerationConfig) -> tuple[int, ...]:
    ids = config.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def truncate_at_eos(ids: list[int], eos_ids: Collection[int]) -> list[int]:
    """`ids` up to the first end token, which is kept."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in eos_ids), None)]
