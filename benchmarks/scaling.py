"""Samples a second of one process and of two, each on a core of its own, with the same batch a process.

  python benchmarks/scaling.py [--turns 3] [--steps 14]

train_grpo.py on preset tiny under torchrun (gloo), in the order 1 2 1 2; the first two steps of each are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCH, WARMUP = 32, 2


def samples_a_second(processes: int, steps: int, output: Path) -> float:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*torchrun, "train_grpo.py",
               str(steps), "--preset", "tiny", "--report_to", "none", "--eval_prompts", "0", "--per_device_train_batch_size",
               str(BATCH), "--output_dir", str(output)]  # fmt: skip
    # One thread each: those of two processes would fight for the same cores.
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][WARMUP:]
    return processes * BATCH * len(rows) / sum(row["step_time"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14)
    arguments = parser.parse_args()
    from benchmarks.models import middle, prepared
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table

    prepared()
    samples = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(arguments.turns):
            for processes, speeds in samples.items():
                speeds.append(samples_a_second(processes, arguments.steps, Path(scratch) / f"{turn}-{processes}"))
                print(f"turn {turn + 1}, {processes}: {speeds[-1]:.1f} samples/s", flush=True)
    rows = [(processes, middle(speeds, 1)) for processes, speeds in samples.items()]
    lines = markdown_table(("processes", "samples/s, median [lowest, highest]"), rows)
    ratios = [two / one for one, two in zip(*samples.values(), strict=True)]
    note = f"{BATCH} completions a process and step, a thread each.\n\ntwo processes {middle(ratios)} times one"
    body = "\n".join([*lines, "", note])
    write_section("Two processes", "python benchmarks/scaling.py", body, "torch", "trl", "accelerate")


if __name__ == "__main__":
    main()
