"""Phi's decode step, one token a row, over the live weights of a base with or without a LoRA.

It computes what transformers' PhiForCausalLM computes, in fewer kernels: launching them is what takes a small step's time.
LoRA is applied unmerged, so the base weights never change. The step keeps a copy of the adapter in the base's dtype,
refreshed before each rollout (`sync_adapter`). q, k, v and fc1 read the same input, so their lora_A are stacked into one
matrix and their lora_B into a block-diagonal one. No operation waits for the device, so that a CUDA graph can hold the step.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

QKV_FC1 = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
LINEARS = (QKV_FC1, ("self_attn.dense",), ("mlp.fc2",))  # of a layer, those with the same input together


def unsupported_reason(model) -> str | None:
    """Why this step cannot decode `model` (a causal LM, with or without PEFT around it); None where it can."""
    model = _unwrap(model)
    config = model.config
    if config.model_type != "phi":
        return f"it is written for Phi, and this is {config.model_type}"
    if config.qk_layernorm or config.num_key_value_heads != config.num_attention_heads or config.hidden_act != "gelu_new":
        return "its attention or its activation differs from Phi-2's"
    linears = {layer.get_submodule(name) for layer in model.model.layers for names in LINEARS for name in names}
    adapted = {module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    if not adapted <= linears or not all(map(_is_plain, linears)):
        return "it needs a single, plain, unmerged LoRA on unquantized linear layers of attention and MLP, and nothing else"
    return None


def _is_plain(linear) -> bool:
    if type(linear) is not LoraLinear:
        return type(linear) is nn.Linear
    other_kind = linear.lora_variant or any(linear.lora_bias.values()) or linear.merged or len(linear.active_adapters) > 1
    return not other_kind and type(linear.base_layer) is nn.Linear


def _unwrap(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class PhiDecodeStep:
    """One decode step of `model`, which `unsupported_reason` must accept. Call `sync_adapter` before a rollout."""

    @torch.no_grad()
    def __init__(self, model):
        self.model = _unwrap(model)
        config, weight = self.model.config, self.model.lm_head.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.heads, self.hidden_size = config.num_attention_heads, config.hidden_size
        self.sizes = [self.hidden_size] * 3 + [config.intermediate_size]  # of q, k, v, fc1
        self.context = config.max_position_embeddings
        cos, sin = self.model.model.rotary_emb(weight, torch.arange(self.context, device=self.device)[None])  # (1, T, rotary)
        self.cos = cos[0, :, None].contiguous()  # (T, 1, rotary)
        # rotate_half(x) * sin is roll(x) * sin with the sign of sin's first half flipped: one kernel fewer.
        first, second = sin[0, :, None].chunk(2, -1)
        self.sin = torch.cat((-first, second), -1)
        self.layers = self.model.model.layers
        self.weights = [_weights(layer) for layer in self.layers]
        self.lora: list[torch.Tensor] = []  # the adapter's matrices in the order in which the step multiplies by them

    def new_cache(self, rows: int, length: int) -> torch.Tensor:
        """Keys and values, (layers, rows, 2, heads, T, head_dim); zeros, for masked values are multiplied by 0, NaN too."""
        shape = (len(self.layers), rows, 2, self.heads, length, self.hidden_size // self.heads)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def sync_adapter(self) -> bool:
        """Copy the active adapter as it is now. True where its copy has new addresses, so that captured graphs are void."""
        new = [matrix for layer in self.layers for names in LINEARS for matrix in _stacked_lora(layer, names)]
        if [matrix.shape for matrix in new] != [matrix.shape for matrix in self.lora]:
            self.lora = [matrix.to(self.dtype) for matrix in new]
            return True
        for matrix, updated in zip(self.lora, new, strict=True):
            matrix.copy_(updated)
        return False

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor, length: int) -> torch.Tensor:
        """Logits (B, V) after `tokens` (B,), which stand at `positions` (B,) of their rows.

        `cache` (see `new_cache`, rows >= B) holds the keys and values before them and receives theirs. Attention reads its
        first `length` positions; those after a row's own are masked.
        """
        model, rows, heads, hidden_size = self.model.model, len(tokens), self.heads, self.hidden_size
        row_index, rotary = torch.arange(rows, device=self.device), self.cos.shape[-1]
        mask = torch.zeros(rows, length, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(torch.arange(length, device=self.device) > positions[:, None], -torch.inf)[:, None, None]
        cos, sin = self.cos[positions], self.sin[positions]  # (B, 1, rotary)
        x = F.embedding(tokens, model.embed_tokens.weight)  # (B, H)
        lora = iter(self.lora)
        for (norm, linears, dense, fc2, bias), layer_cache in zip(self.weights, cache, strict=True):
            h = norm(x)
            qkv_fc1 = torch.empty(rows, sum(self.sizes), dtype=self.dtype, device=self.device)
            q, _, _, fc1 = outputs = qkv_fc1.split(self.sizes, 1)
            for (weight, offset), out in zip(linears, outputs, strict=True):
                torch.addmm(offset, h, weight, out=out)
            _add_lora(qkv_fc1, h, lora)
            rotated_qk = qkv_fc1[:, : 2 * hidden_size].view(rows, 2 * heads, -1)[..., :rotary]
            rotated_qk.copy_(torch.addcmul(rotated_qk * cos, rotated_qk.roll(rotary // 2, -1), sin))
            layer_cache[row_index, :, :, positions] = qkv_fc1[:, hidden_size : 3 * hidden_size].view(rows, 2, heads, -1)
            keys, values = layer_cache[:rows, :, :, :length].unbind(1)
            attn_out = F.scaled_dot_product_attention(q.view(rows, heads, 1, -1), keys, values, attn_mask=mask)
            attn_out, mlp_hidden = attn_out.view(rows, hidden_size), F.gelu(fc1, approximate="tanh")
            x = torch.addmm(x, attn_out, dense).addmm_(mlp_hidden, fc2)
            _add_lora(x, attn_out, lora)
            _add_lora(x, mlp_hidden, lora)
            x += bias
        return self.model.lm_head(model.final_layernorm(x))


def _weights(layer) -> tuple:
    """Of one layer: its norm; weight (in, out) and bias of q, k, v, fc1; weights of dense and fc2, and their biases' sum."""
    linears = [(linear.weight.T, linear.bias) for linear in map(layer.get_submodule, QKV_FC1)]
    dense, fc2 = layer.self_attn.dense, layer.mlp.fc2
    return layer.input_layernorm, linears, dense.weight.T, fc2.weight.T, dense.bias + fc2.bias


def _add_lora(out: torch.Tensor, x: torch.Tensor, lora: Iterator[torch.Tensor]) -> None:
    lora_A, lora_B = next(lora), next(lora)
    out.addmm_(x @ lora_A.T, lora_B.T)


def _stacked_lora(layer, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (ranks, in) times alpha / r, and block-diagonal lora_B (out, ranks). A linear layer without LoRA has rank 0."""
    lora_A, lora_B = [], []
    for linear in map(layer.get_submodule, names):
        name = linear.active_adapters[0] if isinstance(linear, LoraLinear) and not linear.disable_adapters else None
        if name in getattr(linear, "lora_A", ()):
            lora_A.append(linear.lora_A[name].weight * linear.scaling[name])
            lora_B.append(linear.lora_B[name].weight)
        else:
            lora_A.append(linear.weight.new_empty(0, linear.in_features))
            lora_B.append(linear.weight.new_empty(linear.out_features, 0))
    return torch.cat(lora_A), torch.block_diag(*lora_B)
