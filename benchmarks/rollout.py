"""Speed of the rollout engines: tokens a second, milliseconds a decode step, memory, share of the bandwidth limit.

  python benchmarks/rollout.py --model full        # Phi-2's size, random weights, bfloat16; nothing is downloaded
  python benchmarks/rollout.py --model tiny        # on the CPU
  python benchmarks/rollout.py --model FOLDER --batches 16 --lengths 96

Groups of 8 prompts of 64 tokens with a live LoRA; no completion ends early, so both engines do the same work. The engines take
turns, A B A B, after one turn that is not counted. The limit of a decode step: it reads the weights once, and the cache of
each sequence. On a CPU, where matrix products take the time, theirs is measured beside it. Where the fast engine has a step of
the model's own (phi_step.py), the general one (decode_step.py) takes turns, too.
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


def seconds_of(device, work, *arguments) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def complete(engine, prompts: list[list[int]], new: int) -> None:
    from transformers import GenerationConfig

    generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
                                         pad_token_id=0, disable_compile=True)  # fmt: skip
    assert all(len(ids) == new for ids in engine(prompts, generation_config))


def measured_bandwidth(device) -> float:
    """Bytes a second of a copy, reading and writing."""
    import torch

    source = torch.ones((2**28 if device.type == "cuda" else 2**24), device=device)
    target = torch.empty_like(source)
    times = [seconds_of(device, target.copy_, source) for _ in range(4)]  # the first warms up
    return 2 * source.nbytes / min(times[1:])


def products_seconds(policy, batch: int) -> float:
    """Of the matrix products of a decode step alone: the base's linear layers and its head."""
    import torch

    base = policy.get_base_model()
    layers = [m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in name]
    inputs = [torch.randn(batch, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device) for layer in layers]

    def multiply() -> None:
        for x, layer in zip(inputs, layers, strict=True):
            torch.nn.functional.linear(x, layer.weight, layer.bias)

    with torch.no_grad():
        return min(seconds_of(base.device, multiply) for _ in range(6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="full|tiny|FOLDER", default="tiny")
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
    from phi2_grpo.rollout.cache import cache_bytes_per_token
    from phi2_grpo.rollout.decode_step import DecodeStep
    from phi2_grpo.rollout.engine import FastEngine, GenerateEngine
    from phi2_grpo.training.outputs import hardware_name

    device, dtype = models.device_of(arguments.model)
    policy = models.policy_of(arguments.model)
    policy.generation_config.eos_token_id = policy.get_base_model().generation_config.eos_token_id = None
    weights = sum(p.nbytes for name, p in policy.named_parameters() if "lora_" not in name)
    bandwidth = measured_bandwidth(device)
    rows = []
    for batch in map(int, arguments.batches.split(",")):
        for new in map(int, arguments.lengths.split(",")):
            prompts = prompts_of(batch, policy.config.vocab_size)
            engines = {"fast": FastEngine(policy), "generate": GenerateEngine(policy, rows=batch)}
            if type(engines["fast"].decode_step) is not DecodeStep:
                engines["general"] = FastEngine(policy)
                engines["general"].decode_step = DecodeStep(policy)
            peak = {}
            try:
                for name, engine in engines.items():
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    complete(engine, prompts, new)
                    peak[name] = models.peak_bytes(device)
            except torch.OutOfMemoryError:
                print(f"{batch} rows of {new} tokens: no room for a cache of each engine", flush=True)
                engines.clear()
                continue
            seconds = {name: [] for name in engines}
            for _ in range(arguments.turns):
                for name, engine in engines.items():
                    seconds[name].append(seconds_of(device, complete, engine, prompts, new))
            times = {name: [slow / fast for fast, slow in zip(seconds["fast"], of_one, strict=True)]
                     for name, of_one in seconds.items()}  # fmt: skip
            step, products = min(seconds["fast"]) / new, products_seconds(policy, batch)
            cache = batch * (PROMPT + new / 2) * cache_bytes_per_token(policy.config, dtype)
            share = (weights + cache) / bandwidth / step
            peaks = f"{peak['fast'] / 1e9:.2f}" if device.type == "cuda" else ""
            speeds = [f"{batch * new / min(seconds[name]):,.4g}" for name in ("fast", "generate")]
            rows.append(
                (
                    batch,
                    new,
                    *speeds,
                    models.middle(times["generate"]),
                    models.middle(times["general"]) if "general" in times else "",
                    f"{1000 * step:.2f}",
                    f"{1000 * products:.2f}",
                    f"{share:.0%}",
                    peaks,
                )
            )
            print(*rows[-1], sep="  ", flush=True)
    columns = ("batch", "tokens", "fast, tokens/s", "generate, tokens/s", "times", "times the general step", "fast, ms a step",
               "products, ms", "of the limit", "peak, GB")  # fmt: skip
    body = "\n".join(markdown_table(columns, rows)) + (
        f"\n\n{hardware_name(device)}, {str(dtype).removeprefix('torch.')}, {bandwidth / 1e9:,.0f} GB/s measured by a copy. "
        f"Tokens/s and ms of the fastest of {arguments.turns} turns, prefill included; times: median [lowest, "
        "highest] of the turns' ratios. What fits the processor's own cache can be read faster than the limit of a copy."
    )
    command = " ".join(["python benchmarks/rollout.py", *sys.argv[1:]])
    write_section(f"Rollout, {Path(arguments.model).name}", command, body, "torch", "transformers", "peft")


if __name__ == "__main__":
    main()
