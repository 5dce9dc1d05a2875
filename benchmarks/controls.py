"""Could the accuracy have risen without the right answers? One task, three rewards, from the same seeds.

  python benchmarks/controls.py [--seeds 3]

Preset sums, trained on the true reward, on a random one, and on the form of the answer alone. In published work a random reward
lifted a model's score by 21 points (arXiv 2506.10947). Whatever comes out is written down.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ARMS = {"true": "correct", "random": "benchmarks/controls.py:coin", "format": "format"}
NUMBER = r"\W*\d+\W*"


def coin(answers, trainer_state, **_):
    """Rewards at random. 0 or 1."""
    draw = random.Random(trainer_state.global_step)
    return [float(draw.random() < 0.5) for _ in answers]


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def train(arm: str, seed: int) -> tuple:
    """Sampled accuracy (`stats.Paired`, each arm at 95 %) and greedy accuracy of a run on the held-out sums."""
    from phi2_grpo.common.stats import paired

    output = f"results/sums-{arm}-seed-{seed}"
    common = ["--preset", "sums", "--seed", str(seed), "--format_regex", NUMBER]
    run("train_grpo.py", *common, "--rewards", ARMS[arm], "--output_dir", output, "--overwrite")
    report = ["--adapter", f"{output}-final", "--validation_dir", f"{output}-validation"]
    # The other reward has no weight, so that both are measured in every arm.
    rewards = ",".join({f"{name}:{int(name == ARMS[arm])}": None for name in (ARMS[arm], "correct", "format")})
    run("validate_model.py", *common, "--rewards", rewards, *report)
    folder = ROOT / f"{output}-validation"
    values = {"base": defaultdict(list), "tuned": defaultdict(list)}
    for row in map(json.loads, (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()):
        values[row["side"]][row["message_id"]].append(row["scores"]["correct"])
    sampled = paired(*([fmean(scores) for scores in of.values()] for of in values.values()))
    return sampled.to_json(), json.loads((folder / "report.json").read_text())["accuracy"]["greedy"]


def numbers(pair: dict) -> list[str]:
    difference = f"{pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]"
    return [f"{pair['base']:.3f}", f"{pair['tuned']:.3f}", difference]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table
    from phi2_grpo.common.stats import interval

    run("prepare_data.py", "--preset", "sums", "--overwrite")
    rows, summary = [], []
    for arm in ARMS:
        gains = []
        for seed in range(seeds):
            sampled, greedy = train(arm, seed)
            rows.append([arm, seed, *numbers(sampled), *numbers(greedy)])
            gains.append(sampled["difference"])
        ends = interval(gains)
        summary.append([arm, f"{fmean(gains):+.3f}", f"[{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends else ""])
    columns = ("reward", "seed", "accuracy, base", "accuracy, tuned", "difference, 95 % interval over sums", "greedy, base",
               "greedy, tuned", "difference, 95 % interval over sums")  # fmt: skip
    body = [*markdown_table(columns, rows), "", *markdown_table(("reward", "mean gain", "95 % interval over seeds"), summary)]
    command = " ".join(["python benchmarks/controls.py", *sys.argv[1:]])
    write_section("Controls: sums", command, "\n".join(body), "torch", "transformers", "trl", "peft")


if __name__ == "__main__":
    main()
