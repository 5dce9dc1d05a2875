"""How a token is sampled: what of a GenerationConfig the fast engine supports, and where a completion ends."""

import random
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phi2_grpo.models.tokenizer import eos_token_ids


def rollout_generation_config(config: dict, tokenizer) -> GenerationConfig:
    """How rollouts and evaluations are sampled."""
    return GenerationConfig(
        do_sample=True,
        **{key: config[key] for key in ("temperature", "top_p", "top_k")},
        max_new_tokens=config["max_completion_length"],
        eos_token_id=eos_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """What is sampled inside leaves Python's, numpy's and torch's generators as they were."""
    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)


SUPPORTED_FIELDS = {"do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "eos_token_id", "bos_token_id",
                    "pad_token_id", "stop_strings", "use_cache", "disable_compile", "transformers_version"}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """The fields of a GenerationConfig that decide about a token."""

    greedy: bool
    temperature: float
    top_k: int
    top_p: float
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, generation: GenerationConfig) -> "Sampling":
        """Raises ValueError for another field that would change the answer."""
        unsupported = {key: value for key, value in generation.to_diff_dict().items()
                   if key not in SUPPORTED_FIELDS and (value is True or value not in (None, 0, 1))}  # fmt: skip
        if unsupported:
            raise ValueError(f"only generate supports {unsupported}")
        top_k = 50 if generation.top_k is None else generation.top_k  # generate's own default
        return cls(
            not generation.do_sample,
            generation.temperature or 1.0,
            top_k,
            generation.top_p or 1.0,
            generation_eos_ids(generation),
        )

    def sample(self, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """Tokens (B,) for logits (B, V) and uniforms (B, 1) in [0, 1): the same number gives the same token in any batch."""
        if self.greedy:
            return logits.argmax(-1)
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        cdf = warpers(None, logits.float()).softmax(-1).cumsum(-1, dtype=torch.float64)  # float32 loses the rare tokens
        tokens = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)[:, 0]
        return tokens.clamp_(max=logits.shape[-1] - 1)


def generation_eos_ids(generation: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a completion."""
    ids = generation.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)


def truncate_at_eos(ids: list[int], eos_ids: Container[int]) -> list[int]:
    """`ids` up to the first end token, which is kept."""
    for i, token in enumerate(ids):
        if token in eos_ids:
            return ids[: i + 1]
    return ids
