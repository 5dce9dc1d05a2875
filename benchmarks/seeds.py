"""A preset's run over several seeds: what the README's tables of seeds say.

  python benchmarks/seeds.py [--seeds 3] [--steps 100]
  python benchmarks/seeds.py --preset smollm2    # the real language model
  python benchmarks/seeds.py --preset smollm2 --dataset messages.jsonl    # on other prompts
  python benchmarks/seeds.py --reward_model      # train a reward model for each seed, then GRPO on it and `ending`

Other flags go to the training (--per_device_train_batch_size 8 --gradient_accumulation_steps 2).

Prepares the data, trains and validates for each seed; the numbers are those of validate_model.py's report.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def train(seed: str, name: str, common: list[str], *more: str) -> dict:
    """The metrics of a run's validation."""
    output, report = f"results/{name}", f"results/{name}-validation"
    run("train_grpo.py", *common, "--seed", seed, "--output_dir", output, *more, "--overwrite")
    run("validate_model.py", *common, "--seed", seed, "--adapter", f"{output}-final", "--validation_dir", report)
    return json.loads((ROOT / report / "report.json").read_text())["metrics"]


def difference(metric: dict) -> str:
    return f"{metric['difference']:+.3f} [{metric['low']:+.3f}, {metric['high']:+.3f}]"


def gain(seed: str, metric: dict, ended: dict) -> list[str]:
    base, tuned = (f"{metric[side]:.3f}" for side in ("base", "tuned"))
    return [seed, base, tuned, difference(metric), f"{ended['base']:.2f}", f"{ended['tuned']:.2f}"]


def train_reward_model(seed: str, folder: str, common: list[str]) -> list[list[str]]:
    """A reward model's accuracy on all held-out pairs, and on those of nearly equal length."""
    from phi2_grpo.evaluation.reward_accuracy import rows

    run("train_reward.py", *common, "--seed", seed, "--reward_dir", folder, "--overwrite")
    accuracy = json.loads((ROOT / folder / "run.json").read_text())["validation"]
    return [[seed, *row] for row in rows(accuracy) if not row[0].startswith("language")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--dataset", metavar="FILE", help="other prompts than the preset's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of GRPO (default: the preset's)")
    parser.add_argument("--reward_model", action="store_true", help="GRPO on a reward model learnt from the sample's rankings")
    parser.add_argument("--no_grpo", action="store_true", help="train the reward models alone")
    arguments, flags = parser.parse_known_args()
    from benchmarks.results import write_section
    from config import CONFIG, PRESETS
    from phi2_grpo.common.console import markdown_table
    from phi2_grpo.common.stats import interval
    from phi2_grpo.evaluation.reward_accuracy import COLUMNS

    preset, where = arguments.preset, ""
    common = ["--preset", preset]
    prepare = [*common, "--overwrite"]
    if arguments.dataset:
        where = f"-{Path(arguments.dataset).stem}"
        common += ["--data_dir", f"data/{preset}{where}"]
        prepare = [*common, "--overwrite", "--dataset", arguments.dataset]
    steps = arguments.steps or {**CONFIG, **PRESETS[preset]}["max_steps"]
    run("prepare_data.py", *prepare)
    accuracies, gains, costs, differences = [], [], [], []
    for seed in map(str, range(arguments.seeds)):
        name = f"{preset}{where}-seed-{seed}"
        rewards, headline = [], "length"
        if arguments.reward_model:
            headline = f"{name}-reward-model"
            accuracies += train_reward_model(seed, f"results/{headline}", [*common, *flags])
            rewards = ["--rewards", f"results/{headline},ending"]
            name += "-on-reward-model"
        if arguments.no_grpo:
            continue
        metrics = train(seed, name, common, "--max_steps", str(steps), *flags, *rewards)
        gains.append(gain(seed, metrics[headline], metrics["ending"]))
        differences.append(metrics[headline]["difference"])
        spent = [difference(metrics[cost]) for cost in ("reference NLL", "distinct-2")]
        costs.append([seed, f"{metrics['KL to base']['tuned']:.3f}", *spent])
    what = "reward model's score" if arguments.reward_model else "reward"
    level = "99 %" if arguments.reward_model else "95 %"  # there the report's headline is the total reward
    columns = ("seed", f"{what}, base", f"{what}, tuned", f"difference, {level} interval", "ended, base", "ended, tuned")
    lines = markdown_table(columns, gains) if gains else []
    if ends := interval(differences):
        over_seeds = f"{fmean(differences):+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]"
        lines += ["", f"Over the seeds: {over_seeds}, 95 % interval by Student's t."]
    if costs:
        columns = ("seed", "KL to base", "reference NLL, difference", "distinct-2, difference")
        lines += ["", *markdown_table(columns, costs)]
    note = f"Preset {preset}, {steps} steps, held-out prompts at the training temperature."
    on = f" on {Path(arguments.dataset).name}" if arguments.dataset else ""
    title = f"The {preset} run{on}, over seeds"
    if arguments.reward_model:
        lines = [*markdown_table(("seed", *COLUMNS), accuracies), *([""] if lines else []), *lines]
        note = f"Preset {preset}. Agreement with the rankings in %, with its 95 % interval."
        if gains:
            note += f" GRPO: {steps} steps, on the reward model and on ending; its score is 0 for the mean human reply, 1 a "
            note += "standard deviation above."
        title = f"The {preset} reward model{on}, over seeds"
    command = " ".join(["python benchmarks/seeds.py", *sys.argv[1:]])
    write_section(title, command, "\n".join([*lines, "", note]), "torch", "transformers", "trl", "peft")


if __name__ == "__main__":
    main()
