"""The two models that speed is measured on: Phi-2's full size with random weights, and the tiny one. With a live LoRA."""

import resource
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from config import CONFIG, PRESETS
from phi2_grpo import model
from phi2_grpo.loading import load_tokenizer
from phi2_grpo.tiny import tiny_base

ROOT = Path(__file__).resolve().parent.parent
MEAN_TOKENS = 128  # of a completion of the full-size model, whose random weights would hardly ever end one


def setting(name: str) -> dict:
    """The values of the preset that the model is trained with: phi2 for "full", tiny for "tiny"."""
    return {**CONFIG, **PRESETS["phi2" if name == "full" else "tiny"]}


def device_of(name: str) -> tuple[torch.device, torch.dtype]:
    """The tiny model is the CPU's, as in its preset."""
    if name == "full" and torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.bfloat16 if name == "full" else torch.float32


def base_of(name: str):
    """The base without an adapter, and a tokenizer: the tiny one for both, as no text of the full-size model is read."""
    device, dtype = device_of(name)
    tokenizer = load_tokenizer({**setting("tiny"), "model": str(tiny_base())})
    if name == "tiny":
        return model.load_base(setting("tiny"), device, dtype), tokenizer
    torch.manual_seed(0)
    with device:
        base = model.full_size_phi2(dtype)
    end = tokenizer.eos_token_id
    base.config.eos_token_id = base.generation_config.eos_token_id = base.generation_config.pad_token_id = end
    # Random logits have a spread s of about 1 each, so their exponentials sum to V exp(s^2 / 2).
    spread = base.lm_head.weight.float().std() * base.config.hidden_size**0.5
    base.lm_head.bias.data[end] = torch.log(base.config.vocab_size * torch.exp(spread**2 / 2) / MEAN_TOKENS)
    return base, tokenizer


def prepared() -> None:
    """The tiny data, where it is not there yet."""
    if not (ROOT / "data" / "tiny").exists():
        subprocess.run([sys.executable, "prepare_data.py", "--preset", "tiny"], cwd=ROOT, check=True)


def policy_of(name: str) -> PeftModel:
    """The base with a LoRA that has a say (B is zero at the start of a training)."""
    base, _ = base_of(name)
    policy = get_peft_model(base, model.lora_config(setting(name), base))
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.01)
    return policy.eval()


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: on the card, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def middle(values: list[float], places: int = 2) -> str:
    """ "median [lowest, highest]"."""
    ordered = sorted(values)
    half = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return f"{half:.{places}f} [{ordered[0]:.{places}f}, {ordered[-1]:.{places}f}]"
