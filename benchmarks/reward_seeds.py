"""A reward model learnt from the tiny sample's rankings, and GRPO on it, over several seeds.

  python benchmarks/reward_seeds.py [--seeds 3] [--steps 100]

For each seed: a reward model of its own, GRPO on that and on `ending`, validation on the held-out prompts.
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

    def accuracy(group: dict, judge: str) -> str:
        low, high = group[f"{judge}_interval"]
        return f"{group[judge]:.1%} [{low:.0%}, {high:.0%}]"

    run("prepare_data.py", "--overwrite")
    judges = ["| seed | held-out pairs | reward model right | the longer reply wins | correlation of score and length |",
              "|---|---|---|---|---|"]  # fmt: skip
    tuned = ["| seed | judge's score, base | judge's score, tuned | difference, 95 % interval | ended, base | ended, tuned |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for seed in map(str, range(arguments.seeds)):
        judge, output, report = (f"results/tiny-seed-{seed}-{name}" for name in ("judge", "judged", "judged-validation"))
        run("train_reward.py", "--seed", seed, "--reward_dir", judge, "--overwrite")
        found = json.loads((ROOT / judge / "run.json").read_text())["validation"]
        everything = found["groups"][0]
        judges.append(
            f"| {seed} | {everything['pairs']} | {accuracy(everything, 'model')} | {accuracy(everything, 'longer')} "
            f"| {found['rank_correlation']:.2f} |"
        )
        options = ("--seed", seed, "--rewards", f"{judge},ending", "--output_dir", output)
        run("train_grpo.py", str(arguments.steps), *options, "--overwrite")
        run("validate_model.py", "--seed", seed, "--adapter", f"{output}-final", "--validation_dir", report)
        metrics = json.loads((ROOT / report / "report.json").read_text())["metrics"]
        score, ended = metrics[Path(judge).name], metrics["ending"]
        tuned.append(
            f"| {seed} | {score['base']:.3f} | {score['tuned']:.3f} | {spread(score)} "
            f"| {ended['base']:.2f} | {ended['tuned']:.2f} |"
        )
    body = "\n".join([*judges, "", *tuned]) + (
        f"\n\nPreset tiny; the judge's score is 0 for the mean human reply and 1 a standard deviation above; "
        f"{arguments.steps} steps of GRPO on it and on ending, held-out prompts at the training temperature."
    )
    write_section(
        "The tiny reward model, over seeds", "python benchmarks/reward_seeds.py", body, "torch", "transformers", "trl", "peft"
    )


if __name__ == "__main__":
    main()
