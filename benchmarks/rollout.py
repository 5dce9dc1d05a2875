"""How fast are the rollout engines: tokens a second, milliseconds a decode step, memory.

  python benchmarks/rollout.py --model full        # Phi-2's size, random weights, bfloat16; nothing is downloaded
  python benchmarks/rollout.py --model tiny        # on the CPU

Groups of 8 prompts of 64 tokens with a live LoRA; no completion ends early, so both engines do the same work. The engines take
turns, A B A B, after one turn that is not counted.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PROMPT, GROUP = 64, 8


def prompts_of(batch: int, vocabulary: int) -> list[list[int]]:
    draw = random.Random(0)
    groups = [[draw.randrange(5, min(vocabulary, 2500)) for _ in range(PROMPT)] for _ in range(-(-batch // GROUP))]
    return [groups[row // GROUP] for row in range(batch)]


def timed(engine, prompts: list[list[int]], new: int, device) -> float:
    import torch
    from transformers import GenerationConfig

    how = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new, pad_token_id=0,
                           disable_compile=True)  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    completions = engine(prompts, how)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    assert all(len(ids) == new for ids in completions)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("full", "tiny"), default="tiny")
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--lengths", default="128,256,512")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    from phi2_grpo.common import setup

    setup.prepare("tiny")
    import torch

    from benchmarks import models
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table
    from phi2_grpo.rollout.engine import FastEngine, GenerateEngine
    from phi2_grpo.training.outputs import hardware_name

    device, dtype = models.device_of(arguments.model)
    policy = models.policy_of(arguments.model)
    policy.generation_config.eos_token_id = policy.get_base_model().generation_config.eos_token_id = None
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        for new in map(int, arguments.lengths.split(",")):
            prompts = prompts_of(batch, policy.config.vocab_size)
            engines = {"fast": FastEngine(policy), "generate": GenerateEngine(policy, rows=batch)}
            peak = {}
            for name, engine in engines.items():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                timed(engine, prompts, new, device)
                peak[name] = models.peak_bytes(device)
            seconds = {name: [] for name in engines}
            for _ in range(arguments.turns):
                for name, engine in engines.items():
                    seconds[name].append(timed(engine, prompts, new, device))
            ratios = [slow / fast for fast, slow in zip(seconds["fast"], seconds["generate"], strict=True)]
            step = min(seconds["fast"]) / new
            peaks = f"{peak['fast'] / 1e9:.2f}" if device.type == "cuda" else ""
            speeds = [f"{batch * new / min(seconds[name]):,.4g}" for name in engines]
            rows.append((batch, new, *speeds, models.middle(ratios), f"{1000 * step:.2f}", peaks))
            print(*rows[-1], sep="  ", flush=True)
    columns = ("batch", "tokens", "fast, tokens/s", "generate, tokens/s", "times", "fast, ms a step", "peak, GB")
    body = "\n".join(markdown_table(columns, rows)) + (
        f"\n\n{hardware_name(device)}, {str(dtype).removeprefix('torch.')}, "
        f"Tokens/s and ms of the fastest of {arguments.turns} turns, the prefill included; times: median [lowest, highest] "
        "of the turns' ratios."
    )
    command = " ".join(["python benchmarks/rollout.py", *sys.argv[1:]])
    write_section(f"Rollout, {arguments.model}", command, body, "torch", "transformers", "peft")


if __name__ == "__main__":
    main()
