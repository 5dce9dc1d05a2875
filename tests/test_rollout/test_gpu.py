"""What needs a CUDA card: `pytest -m gpu`. The models are made on the spot; nothing is downloaded."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, script
from test_rollout_engine import make_policy, prompts_of, sampled, settings

from benchmarks import models
from config import CONFIG
from phi2_grpo.models.lora import lora_config
from phi2_grpo.rollout.cache import free_memory
from phi2_grpo.rollout.engine import FastEngine, GenerateEngine
from phi2_grpo.training import memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def test_the_main_job_on_a_card(quick, tmp_path):
    """bfloat16 base, float32 adapter, checkpointing: trains, saves, resumes, validates."""
    where = ("--device", "cuda", "--activation_checkpointing", "true", "--output_dir", tmp_path / "o", "--save_steps", "2")
    assert script("train_grpo", "2", *quick, *where).code == 0
    done = script("train_grpo", "4", *quick, *where, "--resume")
    assert done.code == 0, done.err
    run = json.loads((tmp_path / "o-final" / "run.json").read_text())
    assert run["dtype"] == "bfloat16" and run["steps"] == 4
    checked = (*quick[:10], "--device", "cuda", "--adapter", tmp_path / "o-final", "--validation_dir", tmp_path / "v")
    done = script("validate_model", *checked)
    assert done.code == 0, done.err
    done = script("train_grpo", *quick, "--device", "cuda", "--check", "--output_dir", tmp_path / "c")
    assert done.code == 0 and "Largest preset that fits" in " ".join(done.out.replace("│", " ").split()), done.err


def test_a_reward_model_on_a_gpu(quick, tmp_path):
    """Reward model in bfloat16 with its head in float32; GRPO on it, on shared weights."""
    where = (*quick[:6], "--device", "cuda", "--report_to", "none")
    folder = tmp_path / "folder"
    done = script("train_reward", *where, "--reward_dir", folder, "--reward_epochs", "1", "--activation_checkpointing", "true")
    assert done.code == 0, done.err
    options = (*quick, "--device", "cuda", "--rewards", f"{folder},ending", "--output_dir", tmp_path / "o")
    done = script("train_grpo", "2", *options)
    assert done.code == 0 and "on the policy's own weights" in " ".join(done.out.replace("│", " ").split()), done.err


@pytest.fixture
def exact():
    """float32 that is float32: TF32 off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("seed", range(3))
def test_captured_steps_say_what_generate_says(micro, exact, seed):
    """Greedy, in float32: ragged prompts, rows that end, several lengths; and again with the graphs that are there."""
    policy = make_policy(micro, seed=seed).to("cuda")
    engine, reference = FastEngine(policy), GenerateEngine(policy)
    assert engine.cuda
    for count, longest, new in ((6, 20, 40), (5, 200, 150), (6, 20, 40), (1, 9, 60)):
        prompts = prompts_of(policy, count, 3, seed, longest)
        assert engine(prompts, settings(policy, new)) == reference(prompts, settings(policy, new))


def test_captured_or_not_the_same_is_drawn(micro, exact):
    policy = make_policy(micro).to("cuda")
    prompts, how = prompts_of(policy, 6, 4), sampled(policy, 60, top_k=50, top_p=0.95, temperature=0.9)
    torch.manual_seed(0)
    captured = FastEngine(policy)(prompts, how)
    for rows, cuda in ((0, False), (5, True)):
        engine = FastEngine(policy, rows=rows)
        engine.cuda = cuda
        torch.manual_seed(0)
        assert engine(prompts, how) == captured


def test_captured_steps_see_an_update_of_the_adapter(micro, exact):
    policy = make_policy(micro).to("cuda")
    engine, reference = FastEngine(policy), GenerateEngine(policy)
    prompts, how = prompts_of(policy, 4, 2), settings(policy, 40)
    before, graphs = engine(prompts, how), dict(engine.graphs)
    adapter = [parameter for name, parameter in policy.named_parameters() if "lora_B" in name]
    with torch.no_grad():
        for parameter in adapter:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    after = engine(prompts, how)
    assert after == reference(prompts, how) != before
    assert all(engine.graphs[key] is graph for key, graph in graphs.items()), "no graph was captured anew"
    with policy.disable_adapter():
        assert engine(prompts, how) == reference(prompts, how) != after


def full_size_policy():
    from peft import get_peft_model

    with torch.device("cuda"):
        base = models.full_size_phi2(torch.bfloat16)
    return get_peft_model(base, lora_config(CONFIG, base))


def test_full_size_phi2_forward_and_backward():
    """Finite numbers in bfloat16 with SDPA, and a memory plan that is not below what one training pass takes."""
    torch.cuda.reset_peak_memory_stats()
    wrapped = full_size_policy()
    wrapped.gradient_checkpointing_enable()
    wrapped.enable_input_require_grads()
    wrapped.train()
    length = 128 + CONFIG["max_completion_length"]
    ids = torch.randint(0, 50_000, (CONFIG["per_device_train_batch_size"], length), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        hidden = wrapped.get_base_model().model(input_ids=ids).last_hidden_state
    loss = hidden.float().pow(2).mean()
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad.isfinite().all() for p in wrapped.parameters() if p.requires_grad)
    parts = memory.estimate(CONFIG, wrapped, 128, wrapped.device, torch.bfloat16, free_memory(wrapped.device))
    peak = torch.cuda.max_memory_allocated()
    print(f"peak {peak / 1e9:.2f} GB, plan {parts}")
    assert peak < 1.15 * (parts["weights"] + parts["adapter, gradient, Adam"] + parts["update"])


def test_full_size_phi2_rolls_out():
    """bfloat16: log-probs of the decoder against a fresh forward, and no memory beyond cache and plan."""
    policy = full_size_policy().eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    engine = FastEngine(policy, rows=16)
    prompts = [torch.randint(0, 50_000, (40 + row // 8,)).tolist() for row in range(16)]
    policy.generation_config.eos_token_id = None
    completions = engine(prompts, sampled(policy, 64))
    decoder, state = engine.decoder, engine.state
    ids = torch.tensor([completion[-1] for completion in completions], device="cuda")
    positions = torch.tensor([len(prompt) + 63 for prompt in prompts], device="cuda")
    with torch.no_grad():
        ours = decoder.logits(ids, positions, state.cache, 128).float().log_softmax(-1)
        worst = 0.0
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            fresh = policy(torch.tensor([prompt + completion], device="cuda")).logits[0, -1].float().log_softmax(-1)
            worst = max(worst, (ours[row] - fresh).abs().mean().item())
    assert worst < 2e-2, worst


@pytest.mark.parametrize("command", [["rollout.py", "--batches", "8", "--lengths", "32", "--turns", "1"],
                                     ["step.py", "--steps", "4", "--turns", "1"]])  # fmt: skip
def test_the_benchmarks_run_on_a_card(command, tmp_path, monkeypatch):
    """In full size; the table goes to the standard output and, here, into a file of its own."""
    code = (
        "import sys, runpy; from pathlib import Path; sys.path.insert(0, '.'); from benchmarks import results;"
        f"results.RESULTS = Path({str(tmp_path / 'RESULTS.md')!r}); sys.argv = {['', *command[1:], '--model', 'full']!r};"
        f"runpy.run_path('benchmarks/{command[0]}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.cuda.get_device_name() in done.stdout
