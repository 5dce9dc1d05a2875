"""What needs a CUDA GPU: `pytest -m gpu`, beside the engine's own tests. Models are made on the spot, nothing is downloaded."""

import torch
from conftest import ok, read_json, script
from test_fast_engine import GPU, sampled

from benchmarks import models
from config import CONFIG
from phi2_grpo.rollout.cache import free_memory
from phi2_grpo.rollout.engine import FastEngine
from phi2_grpo.training import memory

pytestmark = GPU


def test_the_main_job(quick, tmp_path):
    """bfloat16 base, float32 adapter, checkpointing: trains, saves, resumes, validates."""
    flags = ("--device", "cuda", "--activation_checkpointing", "true", "--output_dir", tmp_path / "o", "--save_steps", "2")
    final = tmp_path / "o-final"
    for arguments in (("train_grpo", "2", *quick, *flags), ("train_grpo", "4", *quick, *flags, "--resume"),
                      ("train_grpo", *quick, "--device", "cuda", "--check", "--output_dir", tmp_path / "c"),
                      ("validate_model", *quick[:10], "--device", "cuda", "--adapter", final, "--validation_dir",
                       tmp_path / "v")):  # fmt: skip
        ok(script(*arguments))
    run = read_json(final / "run.json")
    assert run["dtype"] == ("bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32") and run["steps"] == 4


def test_a_reward_model(quick, tmp_path):
    """In bfloat16 with its head in float32; GRPO on it, on shared weights."""
    folder, options = tmp_path / "reward", ("--device", "cuda", "--activation_checkpointing", "true")
    ok(script("train_reward", *quick[:6], *options, "--report_to", "none", "--reward_dir", folder, "--reward_epochs", "1"))
    ok(script("train_grpo", "2", *quick, *options, "--rewards", f"{folder},ending", "--output_dir", tmp_path / "o"))


def test_full_size_phi2_trains_within_the_estimate():
    """One forward and backward pass in bfloat16 with SDPA: finite, and hardly above the memory estimate."""
    torch.cuda.reset_peak_memory_stats()
    policy = models.policy_of("full").train()
    policy.gradient_checkpointing_enable()
    policy.enable_input_require_grads()
    length = 128 + CONFIG["max_completion_length"]
    ids = torch.randint(0, 50_000, (CONFIG["per_device_train_batch_size"], length), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = policy.get_base_model().model(input_ids=ids).last_hidden_state.float().pow(2).mean()
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in policy.parameters() if p.requires_grad)
    parts = memory.estimate(CONFIG, policy, 128, policy.device, torch.bfloat16, free_memory(policy.device))
    assert torch.cuda.max_memory_allocated() < 1.15 * (parts["weights"] + memory.reserved_bytes(parts)), parts


def test_full_size_phi2_rolls_out():
    """bfloat16: log-probs over the cache against a fresh forward pass."""
    policy = models.policy_of("full")
    policy.generation_config.eos_token_id = None
    engine, prompts = FastEngine(policy, rows=16), [torch.randint(0, 50_000, (40 + row // 8,)).tolist() for row in range(16)]
    completions = engine(prompts, sampled(policy, 64, eos_token_id=None))
    ids = torch.tensor([completion[-1] for completion in completions], device="cuda")
    positions = torch.tensor([len(prompt) + 63 for prompt in prompts], device="cuda")
    with torch.no_grad():
        ours = engine.decode_step.logits(ids, positions, engine.state.cache, 128).float().log_softmax(-1)
        for row, prompt, completion in zip(ours, prompts, completions, strict=True):
            fresh = policy(torch.tensor([prompt + completion], device="cuda")).logits[0, -1].float().log_softmax(-1)
            assert (row - fresh).abs().mean() < 2e-2
