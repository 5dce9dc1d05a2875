"""The models that are measured, each with a LoRA: Phi-2's full size with random weights, the tiny one, or one in a folder."""

import resource
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PhiConfig

from config import CONFIG, PRESETS
from phi2_grpo.data import oasst
from phi2_grpo.models import embedded
from phi2_grpo.models.base import EMBEDDED, choose_device, load_base
from phi2_grpo.models.lora import lora_config
from phi2_grpo.models.tokenizer import load_tokenizer

# What of microsoft/phi-2's config.json differs from PhiConfig's defaults or decides about the size.
PHI2 = {
    "vocab_size": 51200,  # the tokenizer has 50,295 tokens; the rest is padding, so never resize
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.4,
    "resid_pdrop": 0.1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu_new",
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}

ROOT = Path(__file__).resolve().parent.parent
MEAN_TOKENS = 128  # of a completion of the full-size model, whose random weights would hardly ever end one


def full_size_phi2(dtype: torch.dtype = torch.float32):
    """Phi-2 with random weights on the current default device, for tests and benchmarks."""
    return AutoModelForCausalLM.from_config(PhiConfig(**PHI2), dtype=dtype)


def setting(name: str) -> dict:
    """The preset that the model is trained with: phi2 for "full", else tiny; a folder's has 16 longer completions."""
    others = {"model": name, "per_device_train_batch_size": 16, "max_completion_length": 96, "learning_rate": 5e-4}
    return {**CONFIG, **PRESETS["phi2" if name == "full" else "tiny"], **(others if name not in ("full", "tiny") else {})}


def device_of(name: str) -> tuple[torch.device, torch.dtype]:
    """The tiny model runs on the CPU, as in its preset."""
    if name != "tiny" and torch.cuda.is_available():
        dtype = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
        return choose_device({"device": "cuda", "dtype": dtype})
    return torch.device("cpu"), torch.bfloat16 if name == "full" else torch.float32


def base_of(name: str):
    """The base without an adapter, and a tokenizer: the tiny one's for "full", as no text of that model is read."""
    device, dtype = device_of(name)
    embedded.prepare("tiny", oasst.sample_dialogues)
    if name not in ("full", "tiny"):
        return load_base(setting(name), device, dtype), load_tokenizer(setting(name))
    tokenizer = load_tokenizer({**setting("tiny"), "model": str(EMBEDDED["tiny"])})
    if name == "tiny":
        return load_base(setting("tiny"), device, dtype), tokenizer
    torch.manual_seed(0)
    with device:
        base = full_size_phi2(dtype)
    end = tokenizer.eos_token_id
    base.config.eos_token_id = base.generation_config.eos_token_id = base.generation_config.pad_token_id = end
    # Random logits have a standard deviation s of about 1, so their exponentials sum to V exp(s^2 / 2).
    deviation = base.lm_head.weight.float().std() * base.config.hidden_size**0.5
    base.lm_head.bias.data[end] = torch.log(base.config.vocab_size * torch.exp(deviation**2 / 2) / MEAN_TOKENS)
    return base, tokenizer


def prepared() -> None:
    """The tiny data, where it is not there yet."""
    if not (ROOT / "data" / "tiny").exists():
        subprocess.run([sys.executable, "prepare_data.py", "--preset", "tiny"], cwd=ROOT, check=True)


def policy_of(name: str) -> PeftModel:
    """The base with a LoRA that has an effect (lora_B is zero at the start of a training)."""
    base, _ = base_of(name)
    policy = get_peft_model(base, lora_config(setting(name), base))
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.01)
    return policy.eval()


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def middle(values: list[float], places: int = 2) -> str:
    """ "median [lowest, highest]"."""
    ordered = sorted(values)
    half = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return f"{half:.{places}f} [{ordered[0]:.{places}f}, {ordered[-1]:.{places}f}]"
