"""Kill a training again and again, at random moments and while it saves, and resume it: is the adapter the same in the end?

  python benchmarks/kills.py [--kills 30]

Preset tiny, on the CPU, three epochs of 40 steps, a checkpoint after each step; kill -9 each time. The adapter of a run that
was never killed is the measure, bit for bit; metrics.jsonl and evaluation.jsonl must have every step once.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def command(flags: tuple, output: Path, *more: str) -> list[str]:
    saving = ("--save_steps", "1", "--eval_steps", "3", "--report_to", "none", "--output_dir", output)
    return [sys.executable, "train_grpo.py", *map(str, (*flags, *saving, *more))]


def kill_and_resume(kills: int, output: Path, flags: tuple, seed: int) -> dict[str, int]:
    """A run that is killed `kills` times, if it lives so long, and resumed to its end. Returns how often, and in a save.

    Raises AssertionError where a resume fails.
    """
    draw, done, in_saves, steps = random.Random(seed), 0, 0, []
    farthest = max(1, 2 * flags[0] // kills - 1)  # so that the kills are spread over the whole run
    while done < kills:
        process = subprocess.Popen(
            command(flags, output, "--resume"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        in_a_save = done % 3 == 1
        wanted = newest(output) + draw.randint(1, farthest)
        while process.poll() is None and newest(output) < wanted:  # it is on its way
            time.sleep(0.005)
        if in_a_save:
            while process.poll() is None and not saving(output):
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.05))
        else:
            time.sleep(draw.uniform(0, 1))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        in_saves += saving(output)
        done += 1
        steps.append(newest(output))
    last = subprocess.run(command(flags, output, "--resume"), cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    return {"kills": done, "in a save": in_saves, "steps": steps}


def newest(output: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)


def saving(output: Path) -> bool:
    """Whether a checkpoint is being written, or was when the run was killed."""
    return any(not (path / "run.json").exists() for path in output.glob("checkpoint-*"))


def same(first: Path, second: Path) -> bool:
    """Whether two finished adapters are the same bits, with the same rows and no step twice or missing."""
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (first, second)]
    steps = {}
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        rows = [[json.loads(line) for line in (folder / name).read_text().splitlines()] for folder in (first, second)]
        steps[name] = [[(row["step"], row.get("reward"), row.get("eval_reward")) for row in part] for part in rows]
    return adapters[0] == adapters[1] and all(a == b for a, b in steps.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    arguments = parser.parse_args()
    from benchmarks.models import prepared
    from benchmarks.results import write_section

    prepared()
    flags = (120, "--preset", "tiny", "--max_completion_length", 16, "--target_tokens", 8, "--eval_prompts", 4)
    with tempfile.TemporaryDirectory() as scratch:
        unkilled, killed = Path(scratch) / "unkilled", Path(scratch) / "killed"
        subprocess.run(command(flags, unkilled), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        counts = kill_and_resume(arguments.kills, killed, flags, seed=0)
        equal = same(*(folder.with_name(f"{folder.name}-final") for folder in (unkilled, killed)))
    body = (
        f"{counts['kills']} kills (kill -9), {counts['in a save']} of them in a save; after the last resume the adapter is "
        f"{'the same, bit for bit, as' if equal else 'NOT that of'} the run that was never killed; its metrics and "
        f"evaluations {'have every step once' if equal else 'differ'}.\n\nPreset tiny, {flags[0]} steps, each saved: "
        f"three epochs, killed at the steps {', '.join(map(str, counts['steps']))}."
    )
    write_section(
        "Killed and resumed", f"python benchmarks/kills.py --kills {arguments.kills}", body, "torch", "transformers", "trl"
    )


if __name__ == "__main__":
    main()
