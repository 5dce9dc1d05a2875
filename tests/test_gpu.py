"""What needs a CUDA card: `pytest -m gpu`. The models are made on the spot; nothing is downloaded."""

import json

import pytest
import torch
from conftest import script

from config import CONFIG
from phi2_grpo import checks, model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def test_the_main_job_on_a_card(quick, trained, tmp_path):
    """bfloat16 base, float32 adapter, checkpointing: trains, saves, resumes, validates."""
    options = (
        *quick,
        "--device",
        "cuda",
        "--activation_checkpointing",
        "true",
        "--output_dir",
        tmp_path / "o",
        "--save_steps",
        "2",
    )
    assert script("train_grpo", "2", *options).code == 0
    done = script("train_grpo", "4", *options, "--resume")
    assert done.code == 0, done.err
    run = json.loads((tmp_path / "o-final" / "run.json").read_text())
    assert run["dtype"] == "bfloat16" and run["steps"] == 4
    checked = (*quick[:10], "--device", "cuda", "--adapter", tmp_path / "o-final", "--validation_dir", tmp_path / "v")
    assert script("validate_model", *checked).code == 0


def test_a_judge_on_a_card(quick, tmp_path):
    """Reward model in bfloat16 with its head in float32; GRPO on it, on shared weights."""
    where = (*quick[:6], "--device", "cuda", "--report_to", "none")
    judge = tmp_path / "judge"
    done = script("train_reward", *where, "--reward_dir", judge, "--reward_epochs", "1", "--activation_checkpointing", "true")
    assert done.code == 0, done.err
    options = (*quick, "--device", "cuda", "--rewards", f"{judge},ending", "--output_dir", tmp_path / "o")
    done = script("train_grpo", "2", *options)
    assert done.code == 0 and "on the policy's own weights" in " ".join(done.out.replace("│", " ").split()), done.err


def test_full_size_phi2_forward_and_backward():
    """Finite numbers in bfloat16 with SDPA, and a memory plan that is not below what one training pass takes."""
    from peft import get_peft_model

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            base = model.full_size_phi2()
    finally:
        torch.set_default_dtype(torch.float32)
    wrapped = get_peft_model(base, model.lora_config(CONFIG, base))
    wrapped.gradient_checkpointing_enable()
    wrapped.enable_input_require_grads()
    wrapped.train()
    ids = torch.randint(0, 50_000, (CONFIG["per_device_train_batch_size"], 384), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        hidden = wrapped.get_base_model().model(input_ids=ids).last_hidden_state
    loss = hidden.float().pow(2).mean()
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)
    plan = checks.memory_plan(CONFIG, wrapped, 128, torch.bfloat16)
    peak = torch.cuda.max_memory_allocated()
    print(f"peak {peak / 1e9:.2f} GB, plan {plan}")
    assert peak < 1.15 * (plan["weights"] + plan["adapter, gradient, Adam"] + plan["activations"])
