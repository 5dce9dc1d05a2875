"""Phi's decode step, one token a row, over the live weights of a base with or without a LoRA.

The same sums as transformers' PhiForCausalLM, in fewer kernels and without its bookkeeping: that is what a small decode step
spends its time on. LoRA is applied unmerged, so the base weights never change. The adapter is copied in the base's dtype (2 %
of the base in size) before each rollout (`sync_adapter`): q, k, v and fc1 read the same input, so their A matrices are one
multiplication, and their B matrices one block-diagonal one. No step waits for the GPU, so that a CUDA graph can capture it.
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

LAYER = {"input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"), "dense": ("self_attn.dense",),
         "fc2": ("mlp.fc2",)}  # fmt: skip


def unsupported_reason(model) -> str | None:
    """Why this decoder cannot run `model` (a causal LM, with or without PEFT around it); None where it can."""
    model = _unwrapped(model)
    config = model.config
    if getattr(config, "model_type", "") != "phi":
        return f"it is written for Phi, and this is {getattr(config, 'model_type', 'another model')}"
    if config.qk_layernorm or config.num_key_value_heads != config.num_attention_heads or config.hidden_act != "gelu_new":
        return "this Phi has other attention or activation than Phi-2"
    if (getattr(config, "head_dim", None) or 0) * config.num_attention_heads not in (0, config.hidden_size):
        return "this Phi's heads are wider than its hidden size"
    if config.rope_parameters.get("rope_type", "default") != "default":
        return "this Phi scales its rotary positions"
    norms = [model.model.final_layernorm, *(layer.input_layernorm for layer in model.model.layers)]
    expected = {nn.Linear: [model.lm_head], nn.Embedding: [model.model.embed_tokens], nn.LayerNorm: norms}
    if any(type(module) is not kind for kind, modules in expected.items() for module in modules):
        return "more is adapted than the linear layers of attention and MLP"
    for layer in model.model.layers:
        for name in sum(LAYER.values(), ()):
            module = layer.get_submodule(name)
            plain = module.base_layer if isinstance(module, LoraLinear) else module
            if type(plain) is not nn.Linear or type(module) not in (nn.Linear, LoraLinear):
                return f"{name} is a {type(plain).__name__}, not a plain linear layer"
            if hasattr(plain.weight, "ds_id") or type(plain.weight.data) is not torch.Tensor:
                return "the weights are sharded over processes"
            if isinstance(module, LoraLinear) and (module.lora_variant or any(module.lora_bias.values()) or module.merged):
                return "the adapter is not a plain LoRA"
            if isinstance(module, LoraLinear) and len(module.active_adapters) > 1:
                return "several adapters are active at once"
    return None


def _unwrapped(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class PhiDecoder:
    """One decode step of `model`, for which there is no `unsupported_reason`. Call `sync_adapter` before a rollout."""

    def __init__(self, model):
        self.model = _unwrapped(model)
        config = self.model.config
        self.layers = self.model.model.layers
        self.heads = config.num_attention_heads
        self.width = config.hidden_size
        self.head_width = self.width // self.heads
        self.context = config.max_position_embeddings
        self.qkv_fc1_width = 3 * self.width + config.intermediate_size
        self.rotated = int(self.head_width * config.rope_parameters["partial_rotary_factor"])
        weight = self.model.lm_head.weight
        self.dtype, self.device = weight.dtype, weight.device
        with torch.no_grad():
            positions = torch.arange(self.context, device=self.device)[None]
            cos, sin = self.model.model.rotary_emb(weight, positions)  # (1, T, rotated)
            half = self.rotated // 2
            self.cos = cos[0, :, None].contiguous()  # (T, 1, rotated)
            # rotate_half(x) * sin is roll(x) * sin with the first half of sin negated: one kernel fewer.
            self.sin = torch.cat((-sin[0, :, None, :half], sin[0, :, None, half:]), -1)
            self.weights = [_weights(layer) for layer in self.layers]
        self.adapters: list[dict[str, tuple[torch.Tensor, torch.Tensor] | None]] = [{} for _ in self.layers]

    @torch.no_grad()
    def sync_adapter(self) -> bool:
        """Copy the active adapter as it is now. True where the copies have new addresses, so that captured graphs are void."""
        moved = False
        for layer, kept in zip(self.layers, self.adapters, strict=True):
            for group, names in LAYER.items():
                matrices = _lora([layer.get_submodule(name) for name in names])
                old = kept.get(group)
                if matrices is None and old is not None:
                    old[1].zero_()  # the base alone: nothing is added, and graphs stay valid
                elif matrices is not None and old is not None and old[0].shape == matrices[0].shape:
                    for buffer, new in zip(old, matrices, strict=True):
                        buffer.copy_(new)
                else:
                    moved = moved or matrices is not None
                    kept[group] = matrices and tuple(new.to(self.dtype).contiguous() for new in matrices)
        return moved

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor, length: int) -> torch.Tensor:
        """Logits (B, V) after `tokens` (B,), which stand at `positions` (B,) of their rows.

        `cache` (layers, rows >= B, 2, heads, T, head width) has the keys and values of earlier tokens, and those of `tokens`
        are written to it. Attention reads its first `length` positions, those behind a row's own masked.
        """
        rows, width, heads = len(tokens), self.width, self.heads
        row = torch.arange(rows, device=self.device)
        mask = torch.zeros(rows, length, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(torch.arange(length, device=self.device) > positions[:, None], -torch.inf)[:, None, None]
        cos, sin = self.cos[positions], self.sin[positions]  # (B, 1, rotated)
        x = F.embedding(tokens, self.model.model.embed_tokens.weight)  # (B, H)
        for (norm, qkv_fc1_weights, dense, fc2, bias), adapter, cached in zip(self.weights, self.adapters, cache, strict=True):
            h = F.layer_norm(x, *norm)
            qkv_fc1 = torch.empty(rows, self.qkv_fc1_width, dtype=self.dtype, device=self.device)  # side by side
            start = 0
            for weight, offset in qkv_fc1_weights:
                end = start + len(offset)
                torch.addmm(offset, h, weight, out=qkv_fc1[:, start:end])
                start = end
            _add(qkv_fc1, h, adapter["input"])
            rotated_qk = qkv_fc1[:, : 2 * width].view(rows, 2 * heads, -1)[..., : self.rotated]
            rotated_qk.copy_(torch.addcmul(rotated_qk * cos, rotated_qk.roll(self.rotated // 2, -1), sin))
            cached[row, :, :, positions] = qkv_fc1[:, width : 3 * width].view(rows, 2, heads, -1)
            queries = qkv_fc1[:, :width].view(rows, heads, 1, -1)
            keys, values = cached[:rows, :, :, :length].unbind(1)
            attn_out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).view(rows, width)
            mlp_hidden = F.gelu(qkv_fc1[:, 3 * width :], approximate="tanh")
            x = torch.addmm(x, attn_out, dense).addmm_(mlp_hidden, fc2)
            _add(x, attn_out, adapter["dense"])
            _add(x, mlp_hidden, adapter["fc2"])
            x += bias
        head = self.model.lm_head
        return F.linear(F.layer_norm(x, *_norm(self.model.model.final_layernorm)), head.weight, head.bias)


def _norm(module: nn.LayerNorm) -> tuple:
    return module.normalized_shape, module.weight, module.bias, module.eps


def _weights(layer) -> tuple:
    """Of one layer: its norm; weight (in, out) and bias of q, k, v, fc1; weights of dense and fc2, and their biases' sum."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv_fc1 = [(module.weight.T, module.bias) for module in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1)]
    bias = attention.dense.bias + mlp.fc2.bias
    return _norm(layer.input_layernorm), qkv_fc1, attention.dense.weight.T, mlp.fc2.weight.T, bias


def _add(out: torch.Tensor, x: torch.Tensor, matrices: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    if matrices:
        a, b = matrices
        out.addmm_(x @ a.T, b.T)


def _lora(modules: list) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A (sum of ranks, in), scaled by alpha / r, and block-diagonal B (sum of outs, sum of ranks) of the active adapter."""
    lora_A, lora_B = [], []
    for module in modules:
        name = module.active_adapters[0] if isinstance(module, LoraLinear) and not module.disable_adapters else None
        if name in getattr(module, "lora_A", ()):
            lora_A.append(module.lora_A[name].weight * module.scaling[name])
            lora_B.append(module.lora_B[name].weight)
        else:
            lora_B.append(next(module.parameters()).new_zeros(module.out_features, 0, dtype=torch.float32))
    return (torch.cat(lora_A), torch.block_diag(*lora_B)) if lora_A else None
