"""The tiny run over several seeds: what the README's first table says.

  python benchmarks/seeds.py [--seeds 3] [--steps 100]

Trains and validates preset tiny for each seed; the numbers are those of validate_model.py's report.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    from benchmarks.results import write_section

    def spread(metric: dict) -> str:
        return f"{metric['difference']:+.3f} [{metric['low']:+.3f}, {metric['high']:+.3f}]"

    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command, "--preset", "tiny"], cwd=ROOT, check=True)

    run("prepare_data.py", "--overwrite")
    lines = [
        "| seed | reward, base | reward, tuned | difference, 95 % interval | ended, base | ended, tuned |",
        "|---|---|---|---|---|---|",
    ]
    for seed in range(arguments.seeds):
        output, report = f"results/tiny-seed-{seed}", f"results/tiny-seed-{seed}-validation"
        run("train_grpo.py", str(arguments.steps), "--seed", str(seed), "--output_dir", output, "--overwrite")
        run("validate_model.py", "--seed", str(seed), "--adapter", f"{output}-final", "--validation_dir", report)
        metrics = json.loads((ROOT / report / "report.json").read_text())["metrics"]
        reward, ended = metrics["length"], metrics["ending"]
        lines.append(
            f"| {seed} | {reward['base']:.3f} | {reward['tuned']:.3f} "
            f"| {spread(reward)} | {ended['base']:.2f} | {ended['tuned']:.2f} |"
        )
    body = "\n".join(lines) + f"\n\nPreset tiny, {arguments.steps} steps, held-out prompts at the training temperature."
    write_section("The tiny run, over seeds", "python benchmarks/seeds.py", body, "torch", "transformers", "trl", "peft")


if __name__ == "__main__":
    main()
