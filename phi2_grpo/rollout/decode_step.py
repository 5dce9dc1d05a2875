"""One decode step, one token a row, of any decoder whose layers keep ordinary keys and values.

It is transformers' own forward pass, driven directly: the cache is allocated once, and each row writes at its own position,
which a 4-D mask and explicit position_ids say to the model. LoRA is applied unmerged, so the base weights never change: for
the length of a rollout PEFT's LoRA layers compute with copies of their matrices in the base's dtype, in two kernels each.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from phi2_grpo.models.base import context_length
from phi2_grpo.rollout.cache import cache_shape

CPUINFO = Path("/proc/cpuinfo")
# Up to so many rows a product has the weight on the left: faster on AMD processors, slower on Intel's (docs/rollout.md).
FEW_ROWS = 64 if CPUINFO.exists() and "AuthenticAMD" in CPUINFO.read_text() else 0


def unwrap(model):
    """The causal LM under PEFT's wrapper, which has the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def unsupported_reason(model) -> str | None:
    """Why this step cannot decode `model` (a causal LM, with or without PEFT around it); None where it can."""
    model = unwrap(model)
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        return "its layers do not keep all keys and values (sliding windows, linear attention)"
    if getattr(config, "kv_lora_rank", None):
        return "its keys and values have different sizes (latent attention)"
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return "its rotary embedding depends on the longest sequence of a batch"
    if model.config._attn_implementation != "sdpa":
        return "it lacks PyTorch's attention (SDPA)"
    if not model._supports_attention_backend or "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "its forward pass takes no position of each row"
    return None


def is_plain(linear) -> bool:
    """Whether a linear layer is unquantized, with one unmerged, ordinary LoRA at most."""
    if type(linear) is not LoraLinear:
        return type(linear) is nn.Linear
    other_kind = linear.lora_variant or any(linear.lora_bias.values()) or linear.merged or len(linear.active_adapters) > 1
    return not other_kind and type(linear.base_layer) is nn.Linear


class RowCacheLayer(DynamicLayer):
    """A cache layer whose rows stand at positions of their own.

    `stored`: keys and values (rows, 2, heads, T, head_dim), with at least as many rows as are decoded. `positions` (B,): where
    the next key and value of each row go. `length`: of the part that attention reads.
    """

    _layer_type = None  # a name would register it as the cache of all models

    def __init__(self, stored: torch.Tensor, row_index: torch.Tensor, positions: torch.Tensor, length: int):
        super().__init__()
        self.stored, self.row_index, self.positions, self.length = stored, row_index, positions, length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        for i, new in enumerate((key_states, value_states)):  # (B, heads, 1, head_dim)
            self.stored[self.row_index, i, :, self.positions] = new[:, :, 0]
        keys, values = self.stored[: len(self.row_index), :, :, : self.length].unbind(1)
        return keys, values

    def get_seq_length(self) -> int:
        return self.length - 1


class DecodeStep:
    """One decode step of `model`, which `unsupported_reason` must accept. Call `sync_adapter` before a rollout."""

    def __init__(self, model):
        self.model = unwrap(model)
        weight = self.model.get_input_embeddings().weight
        self.dtype, self.device = weight.dtype, weight.device
        self.context = context_length(self.model)
        self.layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self.linears = [module for module in self.model.modules() if type(module) is nn.Linear]
        self.lora: list[torch.Tensor] = []  # the adapter's matrices in the order in which the step multiplies by them
        self.adapters: list = []  # which adapter each layer had on at the last `sync_adapter`

    def new_cache(self, rows: int, length: int) -> torch.Tensor:
        """Keys and values, (layers, rows, 2, heads, T, head_dim); zeros, for masked values are multiplied by 0, NaN too."""
        layers, heads, head_dim = cache_shape(self.model.config)
        return torch.zeros((layers, rows, 2, heads, length, head_dim), dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def sync_adapter(self) -> bool:
        """Copy the active adapter as it is now. True where it is another one, or of other shapes: graphs are then void."""
        new = list(self._matrices())
        adapters = [(list(layer.active_adapters), layer.disable_adapters) for layer in self.layers]
        same = adapters == self.adapters and [matrix.shape for matrix in new] == [matrix.shape for matrix in self.lora]
        self.adapters = adapters
        if not same:
            self.lora = [matrix.to(self.dtype, copy=True) for matrix in new]
            return True
        for matrix, updated in zip(self.lora, new, strict=True):
            matrix.copy_(updated)
        return False

    def _plain_layers(self) -> list[LoraLinear]:
        return [layer for layer in self.layers if isinstance(layer, LoraLinear) and is_plain(layer)]

    def _matrices(self) -> Iterable[torch.Tensor]:
        return (matrix for layer in self._plain_layers() for matrix in stacked_lora([layer]))

    @contextmanager
    def lean_lora(self) -> Iterator[None]:
        """Inside, plain LoRA layers compute with the copies of `sync_adapter`; the others as PEFT has them."""
        plain = self._plain_layers()
        try:
            for linear in self.linears:
                linear.forward = partial(_linear, linear)
            for layer, lora_A, lora_B in zip(plain, self.lora[::2], self.lora[1::2], strict=True):
                layer.forward = partial(_lean_forward, layer.base_layer, lora_A, lora_B)
            yield
        finally:
            for layer in (*self.linears, *plain):
                layer.__dict__.pop("forward", None)

    def prefill(self, ids: torch.Tensor, last: list[int]) -> tuple[torch.Tensor, DynamicCache]:
        """Logits (b, V) after position `last` of each row of `ids` (b, T), which are padded on the right, and the cache.

        Causal attention never reads that padding.
        """
        cache, (kept, index) = DynamicCache(), torch.tensor(last, device=self.device).unique(return_inverse=True)
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits  # (b, U, V)
        return logits[range(len(ids)), index], cache

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor, length: int) -> torch.Tensor:
        """Logits (B, V) after `tokens` (B,), which stand at `positions` (B,) of their rows.

        `cache` (see `new_cache`, rows >= B) holds the keys and values before them and receives theirs. Attention reads its
        first `length` positions; those after a row's own are masked.
        """
        row_index = torch.arange(len(tokens), device=self.device)
        layers = [RowCacheLayer(stored, row_index, positions, length) for stored in cache]
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=position_mask(positions, length, self.dtype),
            position_ids=positions[:, None],
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        return output.logits[:, -1]


def position_mask(positions: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Added to attention's scores: 0 up to each row's own position, -inf after it; (B, 1, 1, T)."""
    mask = torch.zeros(len(positions), length, dtype=dtype, device=positions.device)
    after = torch.arange(length, device=positions.device) > positions[:, None]
    return mask.masked_fill_(after, -torch.inf)[:, None, None]


def _linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not (x.is_cpu and x.dtype == torch.float32 and len(rows) <= FEW_ROWS):
        return F.linear(x, layer.weight, layer.bias)
    out = (layer.weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
    return out if layer.bias is None else out.add_(layer.bias)


def _lean_forward(base_layer, lora_A: torch.Tensor, lora_B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = _linear(base_layer, x)
    if len(lora_A):
        out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ lora_A.T, lora_B.T)
    return out


def stacked_lora(linears: list) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (ranks, in) times alpha / r, and block-diagonal lora_B (out, ranks), of linear layers with the same input.

    A layer without LoRA, or whose adapter is off, has rank 0.
    """
    lora_A, lora_B = [], []
    for linear in linears:
        name = linear.active_adapters[0] if isinstance(linear, LoraLinear) and not linear.disable_adapters else None
        if name in getattr(linear, "lora_A", ()):
            lora_A.append(linear.lora_A[name].weight * linear.scaling[name])
            lora_B.append(linear.lora_B[name].weight)
        else:
            lora_A.append(linear.weight.new_empty(0, linear.in_features))
            lora_B.append(linear.weight.new_empty(linear.out_features, 0))
    return torch.cat(lora_A), torch.block_diag(*lora_B)
