"""Phi's decode step, one token a row, over the live weights of a base with or without a LoRA.

A special case of decode_step.py. It computes what transformers' PhiForCausalLM computes, in fewer kernels: launching them is
what takes a small step's time. q, k, v and fc1 read the same input, so their lora_A are stacked into one matrix and their
lora_B into a block-diagonal one. No operation waits for the device, so that a CUDA graph can hold the step.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from phi2_grpo.rollout.decode_step import DecodeStep, is_plain, position_mask, stacked_lora, unwrap

QKV_FC1 = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
LINEARS = (QKV_FC1, ("self_attn.dense",), ("mlp.fc2",))  # of a layer, those with the same input together


def is_phi(model) -> bool:
    """Whether this step can decode `model` (a causal LM, with or without PEFT around it): a Phi, with a plain LoRA at most."""
    model = unwrap(model)
    config = model.config
    if config.model_type != "phi" or config.qk_layernorm or config.num_key_value_heads != config.num_attention_heads:
        return False
    linears = {layer.get_submodule(name) for layer in model.model.layers for names in LINEARS for name in names}
    adapted = {module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    return config.hidden_act == "gelu_new" and adapted <= linears and all(map(is_plain, linears))


class PhiDecodeStep(DecodeStep):
    """One decode step of `model`, which `is_phi` must accept. Call `sync_adapter` before a rollout."""

    @torch.no_grad()
    def __init__(self, model):
        super().__init__(model)
        config, weight = self.model.config, self.model.lm_head.weight
        self.heads, self.hidden_size = config.num_attention_heads, config.hidden_size
        self.sizes = [self.hidden_size] * 3 + [config.intermediate_size]  # of q, k, v, fc1
        cos, sin = self.model.model.rotary_emb(weight, torch.arange(self.context, device=self.device)[None])  # (1, T, rotary)
        self.cos = cos[0, :, None].contiguous()  # (T, 1, rotary)
        # rotate_half(x) * sin is roll(x) * sin with the sign of sin's first half flipped: one kernel fewer.
        first, second = sin[0, :, None].chunk(2, -1)
        self.sin = torch.cat((-first, second), -1)
        self.blocks = self.model.model.layers
        self.weights = [_weights(layer) for layer in self.blocks]

    def _matrices(self) -> Iterable[torch.Tensor]:
        return (
            matrix
            for layer in self.blocks
            for names in LINEARS
            for matrix in stacked_lora(list(map(layer.get_submodule, names)))
        )

    def lean_lora(self):
        return nullcontext()  # the step has no use for the layers' own forward pass

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor, length: int) -> torch.Tensor:
        model, rows, heads, hidden_size = self.model.model, len(tokens), self.heads, self.hidden_size
        row_index, rotary = torch.arange(rows, device=self.device), self.cos.shape[-1]
        mask = position_mask(positions, length, self.dtype)
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
