"""The tiny run over several seeds: what the README's tables of seeds say.

  python benchmarks/seeds.py [--seeds 3] [--steps 100]
  python benchmarks/seeds.py --reward_model   # train a reward model for each seed, then GRPO on it and `ending`

Trains and validates preset tiny for each seed; the numbers are those of validate_model.py's report.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command, "--preset", "tiny"], cwd=ROOT, check=True)


def train(seed: str, name: str, steps: int, *more: str) -> dict:
    """The metrics of a run's validation."""
    output, report = f"results/{name}", f"results/{name}-validation"
    run("train_grpo.py", str(steps), "--seed", seed, "--output_dir", output, *more, "--overwrite")
    run("validate_model.py", "--seed", seed, "--adapter", f"{output}-final", "--validation_dir", report)
    return json.loads((ROOT / report / "report.json").read_text())["metrics"]


def gain(seed: str, metric: dict, ended: dict) -> list[str]:
    spread = f"{metric['difference']:+.3f} [{metric['low']:+.3f}, {metric['high']:+.3f}]"
    base, tuned = (f"{metric[side]:.3f}" for side in ("base", "tuned"))
    return [seed, base, tuned, spread, f"{ended['base']:.2f}", f"{ended['tuned']:.2f}"]


def train_reward_model(seed: str, folder: str) -> list[str]:
    """A reward model's accuracy on held-out pairs."""
    run("train_reward.py", "--seed", seed, "--reward_dir", folder, "--overwrite")
    validation = json.loads((ROOT / folder / "run.json").read_text())["validation"]
    everything = validation["groups"][0]

    def accuracy(of: str) -> str:
        low, high = everything[f"{of}_interval"]
        return f"{everything[of]:.1%} [{low:.0%}, {high:.0%}]"

    return [seed, str(everything["pairs"]), accuracy("model"), accuracy("longer"), f"{validation['rank_correlation']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--reward_model", action="store_true", help="GRPO on a reward model learnt from the sample's rankings")
    arguments = parser.parse_args()
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table

    run("prepare_data.py", "--overwrite")
    accuracies, gains = [], []
    for seed in map(str, range(arguments.seeds)):
        name = f"tiny-seed-{seed}"
        if arguments.reward_model:
            reward_model = f"{name}-reward-model"
            accuracies.append(train_reward_model(seed, f"results/{reward_model}"))
            metrics = train(seed, f"{name}-on-reward-model", arguments.steps, "--rewards", f"results/{reward_model},ending")
            gains.append(gain(seed, metrics[reward_model], metrics["ending"]))
        else:
            metrics = train(seed, name, arguments.steps)
            gains.append(gain(seed, metrics["length"], metrics["ending"]))
    what = "reward model's score" if arguments.reward_model else "reward"
    columns = ("seed", f"{what}, base", f"{what}, tuned", "difference, 95 % interval", "ended, base", "ended, tuned")
    lines = markdown_table(columns, gains)
    note = f"Preset tiny, {arguments.steps} steps, held-out prompts at the training temperature."
    title, command = "The tiny run, over seeds", "python benchmarks/seeds.py"
    if arguments.reward_model:
        columns = ("seed", "held-out pairs", "reward model right", "the longer reply wins", "correlation of score and length")
        lines = [*markdown_table(columns, accuracies), "", *lines]
        note += " The reward model's score is 0 for the mean human reply and 1 a standard deviation above; "
        note += "GRPO on it and on ending."
        title, command = "The tiny reward model, over seeds", f"{command} --reward_model"
    write_section(title, command, "\n".join([*lines, "", note]), "torch", "transformers", "trl", "peft")


if __name__ == "__main__":
    main()
