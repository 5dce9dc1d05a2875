"""How a token is drawn: what of a GenerationConfig our engine understands, and where a completion ends."""

from collections.abc import Container
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

UNDERSTOOD = {"do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "eos_token_id", "bos_token_id", "pad_token_id",
              "stop_strings", "use_cache", "disable_compile", "transformers_version"}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """What of a GenerationConfig decides about a token."""

    greedy: bool
    temperature: float
    top_k: int
    top_p: float
    ends: tuple[int, ...]

    @classmethod
    def of(cls, generation: GenerationConfig) -> "Sampling":
        """Raises ValueError for a setting that would change the answer and is none of these."""
        strange = {key: value for key, value in generation.to_diff_dict().items()
                   if key not in UNDERSTOOD and (value is True or value not in (None, 0, 1))}  # fmt: skip
        if strange:
            raise ValueError(f"only generate understands {strange}")
        top_k = 50 if generation.top_k is None else generation.top_k  # generate's own default
        return cls(not generation.do_sample, generation.temperature or 1.0, top_k, generation.top_p or 1.0, ends_of(generation))

    def pick(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Tokens (B,) for logits (B, V) and numbers (B, 1) from 0 to 1: the same number picks the same token in any batch."""
        if self.greedy:
            return logits.argmax(-1)
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        heights = warpers(None, logits.float()).softmax(-1).cumsum(-1, dtype=torch.float64)  # float32 loses the rare tokens
        picked = torch.searchsorted(heights, noise * heights[:, -1:], right=True)[:, 0]
        return picked.clamp_(max=logits.shape[-1] - 1)


def ends_of(generation: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a completion."""
    ends = generation.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)


def up_to_end(ids: list[int], ends: Container[int]) -> list[int]:
    """`ids` up to the first end token, which is kept."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids
