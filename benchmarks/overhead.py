"""train_grpo.py beside a bare GRPOTrainer script with the same settings: what do the checks and the watching cost?

  python benchmarks/overhead.py [--pairs 5] [--steps 20]

Whole processes in turn, A B A B ..., on preset tiny without a tracker; the seconds a step are those of the training loop
(TRL's own train_runtime / steps), the seconds a run everything from start to exit.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BARE = """
import sys, torch
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

base, steps, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
tokenizer = AutoTokenizer.from_pretrained(base)

def length(completion_ids, **_):
    ended = [tokenizer.eos_token_id in ids for ids in completion_ids]
    near = [max(0.0, 1 - abs(len(ids) - 32) / 32) for ids in completion_ids]
    return [score if done else score / 2 for score, done in zip(near, ended)]

trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    reward_funcs=length,
    args=GRPOConfig(
        output_dir=output, max_steps=steps, learning_rate=1e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=5,
        beta=0.03, loss_type="dr_grpo", scale_rewards="none", num_generations=8, max_completion_length=64,
        per_device_train_batch_size=32, gradient_accumulation_steps=1, activation_checkpointing=False, max_grad_norm=0.5,
        seed=0, disable_dropout=True, use_cpu=True, bf16=False, logging_steps=1, save_steps=25, report_to="none",
        dataloader_pin_memory=False,
    ),
    train_dataset=load_from_disk("data/tiny/oasst1_prompts")["train"],
    processing_class=tokenizer,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
)
runtime = trainer.train().metrics["train_runtime"]
trainer.save_model(output + "-final")
print("runtime", runtime)
"""


def timed(command: list[str]) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - started, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    from benchmarks.results import write_section
    from phi2_grpo.tiny import tiny_base

    base = str(tiny_base())
    if not (ROOT / "data" / "tiny").exists():
        timed([sys.executable, "prepare_data.py", "--preset", "tiny"])
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(arguments.pairs):
            output = Path(scratch) / f"ours{pair}"
            flags = ["--preset", "tiny", "--report_to", "none", "--output_dir", str(output)]
            seconds, _ = timed([sys.executable, "train_grpo.py", str(arguments.steps), *flags])
            loop = json.loads((output.with_name(output.name + "-final") / "run.json").read_text())["seconds"]
            ours.append((seconds, loop / arguments.steps))
            seconds, printed = timed(
                [sys.executable, "-c", BARE, base, str(arguments.steps), str(Path(scratch) / f"bare{pair}")]
            )
            bare.append((seconds, float(re.search(r"runtime ([\d.]+)", printed)[1]) / arguments.steps))
            print(f"pair {pair + 1}: ours {ours[-1][0]:.1f} s, bare {bare[-1][0]:.1f} s", flush=True)
    lines = [
        "| | train_grpo.py, median | bare GRPOTrainer, median | ratio of each pair: median [low, high] |",
        "|---|---|---|---|",
    ]
    for i, name in enumerate(("seconds a run", "seconds a step")):
        ratios = [a[i] / b[i] for a, b in zip(ours, bare, strict=True)]
        medians = [statistics.median(run[i] for run in side) for side in (ours, bare)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append(f"| {name} | {medians[0]:.2f} | {medians[1]:.2f} | {spread} |")
    body = "\n".join(lines) + f"\n\n{arguments.pairs} pairs of {arguments.steps} steps, preset tiny."
    write_section(
        "train_grpo beside a bare trainer", "python benchmarks/overhead.py", body, "torch", "transformers", "trl", "peft"
    )


if __name__ == "__main__":
    main()
