"""Train a reward model from the rankings that oasst1's people left: LoRA and a head of one output on the policy's base.

  python train_reward.py                    # the ranked pairs of data/ -> results/reward-model
  python train_reward.py --check            # look at everything, train nothing
  python train_reward.py --resume           # go on from the last whole checkpoint
  python train_reward.py --preset tiny      # on the CPU, in a minute

Then: python train_grpo.py --rewards results/reward-model. The loss is Bradley and Terry's, -log sigmoid(chosen - rejected), by
TRL's RewardTrainer. Pairs that people ranked alike were left out by prepare_data.py. What counts is the table at the end: how
often the model agrees with people on pairs that it has not seen, beside "the longer reply wins", which costs nothing and is
right more often than chance.
"""

import contextlib
import shlex
from pathlib import Path

from phi2_grpo import cli, environment

KEYS = ("model", "model_revision", "device", "dtype", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "data_dir",
        "reward_dir", "reward_learning_rate", "reward_epochs", "reward_max_length", "lr_scheduler_type", "warmup_steps",
        "per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "max_grad_norm", "seed",
        "save_steps", "save_total_limit", "report_to")  # fmt: skip


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("--check", action="store_true", help="print the checks and the plan, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in <reward_dir>-run")
    parser.add_argument("--overwrite", action="store_true", help="replace the reward model in reward_dir")
    config, arguments = cli.parse(parser)
    environment.prepare(config["model"])

    from phi2_grpo import checkpoints, checks, files, looks, running

    console = looks.Console()
    console.print(f"train_reward: {cli.differences(config, KEYS)}")
    checklist, found = checks.preflight_reward(config, arguments.resume, arguments.overwrite)
    console.print(checklist.table())
    checklist.complain()
    if arguments.check:
        console.print("All is ready. Without --check, training starts here.")
        return
    with files.alone_in(Path(config["reward_dir"])), running.advice_when_interrupted(checkpoints.reward_run_folder(config)):
        train(config, arguments, console, found)


def train(config: dict, arguments, console, found: dict) -> None:
    """Train, measure on the validation pairs, and leave the finished reward model in reward_dir."""
    from transformers import set_seed
    from trl import RewardConfig

    from phi2_grpo import accuracy, checkpoints, files, looks, model, monitor, progress, report, running
    from phi2_grpo.reward_model import judge
    from phi2_grpo.trainer import JudgeTrainer, training_arguments

    device, dtype = found["device"]
    tokenizer = found["tokenizer"]
    tokenizer.padding_side = "right"  # the head reads the last token
    run_folder, reward_dir = checkpoints.reward_run_folder(config), Path(config["reward_dir"])
    whole = checkpoints.whole_checkpoints(run_folder) if arguments.resume else []
    read = {key: config[key] for key in KEYS}

    set_seed(config["seed"])
    base = model.load_judge(config, device, dtype)
    own = {
        "output_dir": str(run_folder),
        "run_name": reward_dir.name,
        "project": "phi2-reward",
        "learning_rate": config["reward_learning_rate"],
        "max_steps": found["steps"],
        "max_length": None,  # too long pairs are left out before, and counted
    }
    trainer = JudgeTrainer(
        model=base,
        args=training_arguments(RewardConfig, read, device, dtype, **own),
        train_dataset=found["pairs"]["train"],
        processing_class=tokenizer,
        peft_config=model.lora_config(config, base, "SEQ_CLS"),
    )
    adapted = model.describe_coverage(trainer.model)
    facts = report.run_facts(read, arguments.preset, device, dtype, found["funnel"], adapted)
    watch = monitor.RewardMonitor(facts, checkpoints.seconds_of(whole))
    trainer.watched_by(watch)
    running.train(trainer, config, run_folder, whole, found["steps"])

    held_out = found["pairs"]["validation"].to_list()
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    with progress.counting(console, "judging held-out replies", 2 * len(held_out)) as advance:
        chosen, rejected = accuracy.judge_pairs(
            lambda prompts, replies: judge(trained, tokenizer, prompts, replies), held_out, advance
        )
    scale = accuracy.scale(chosen, rejected)
    measured = accuracy.accuracies(held_out, chosen, rejected)
    with files.whole_folder(reward_dir) as folder:
        trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        standard = [[(score - scale["mean"]) / scale["std"] for score in scores] for scores in (chosen, rejected)]
        accuracy.draw(measured, *standard, folder / "scores.png")
        rows = report.rows_with(trainer.state.log_history, "loss")
        report.describe_reward_folder(folder, facts, rows, watch.seconds(), scale, measured, found["left_out"])
    checkpoints.remove_run(run_folder)  # its checkpoints have served
    with contextlib.suppress(OSError):  # not empty: the rest is somebody's
        run_folder.rmdir()
    shared = ("model", "model_revision", "data_dir", "device", "dtype")
    console.print(accuracy.table(measured))
    console.print(accuracy.verdict(measured), style="bold")
    console.print(
        f"{measured['ties']} ties, counted half. Rank correlation of score and length: {measured['rank_correlation']:.2f}.\n"
        f"Reward model: {reward_dir}, in {looks.duration(watch.seconds())}   scores: {reward_dir / 'scores.png'}\n"
        "To train on it:\n"
        f"  python train_grpo.py --preset {arguments.preset} --rewards {shlex.quote(config['reward_dir'] + ',ending')} "
        f"--output_dir results/on-reward-model{cli.flags(config, arguments.preset, *shared)}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    cli.run(main)
