"""Train a reward model from the rankings that oasst1's people left: LoRA and a head of one output on the policy's base.

  python train_reward.py                    # the ranked pairs of data/ -> results/reward-model
  python train_reward.py --check            # look at everything, train nothing
  python train_reward.py --resume           # go on from the newest complete checkpoint
  python train_reward.py --preset tiny      # on the CPU, in a minute

Then: python train_grpo.py --rewards results/reward-model. The loss is Bradley and Terry's, -log sigmoid(chosen - rejected), by
TRL's RewardTrainer. Pairs that people ranked alike were left out by prepare_data.py. What counts is the table at the end: how
often the model agrees with people on pairs that it has not seen, beside "the longer reply wins", which costs nothing and is
right more often than chance.
"""

import contextlib
import shlex
from pathlib import Path

from phi2_grpo.common import cli, setup

KEYS = ("model", "model_revision", "device", "dtype", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "data_dir",
        "reward_dir", "reward_learning_rate", "reward_epochs", "reward_max_length", "lr_scheduler_type", "warmup_steps",
        "per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "max_grad_norm", "seed",
        "save_steps", "save_total_limit", "report_to")  # fmt: skip


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("--check", action="store_true", help="print the checks and the plan, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in <reward_dir>-run")
    parser.add_argument("--overwrite", action="store_true", help="replace the reward model in reward_dir")
    config, arguments = cli.parse(parser)
    setup.prepare(config["model"])

    from phi2_grpo.common import files
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import oasst
    from phi2_grpo.models import embedded
    from phi2_grpo.training import checkpoints, preflight

    console = Console()
    console.print(f"train_reward: {cli.differences(config, KEYS)}")
    embedded.prepare(config["model"], oasst.sample_dialogues)
    checklist, found = preflight.preflight_reward(config, arguments.resume, arguments.overwrite)
    console.print(checklist.table())
    checklist.complain()
    if arguments.check:
        console.print("All is ready. Without --check, training starts here.")
        return
    with (
        files.lock_folder(Path(config["reward_dir"])),
        checkpoints.advice_when_interrupted(checkpoints.reward_run_folder(config)),
    ):
        train(config, arguments, console, found)


def train(config: dict, arguments, console, found: dict) -> None:
    """Train, measure on the validation pairs, and leave the finished reward model in reward_dir."""
    from transformers import set_seed
    from trl import RewardConfig

    from phi2_grpo.common import files, progress
    from phi2_grpo.common.console import format_duration
    from phi2_grpo.evaluation import reward_accuracy
    from phi2_grpo.models.base import load_reward_base
    from phi2_grpo.models.lora import lora_config
    from phi2_grpo.rewards.reward_model import score_answers
    from phi2_grpo.training import checkpoints, outputs
    from phi2_grpo.training.callbacks import REWARD_MODEL_COLUMNS, CheckpointCallback, LogCallback
    from phi2_grpo.training.trainer import RewardModelTrainer, training_arguments

    device, dtype = found["device"]
    tokenizer = found["tokenizer"]
    tokenizer.padding_side = "right"  # the head reads the last token
    run_folder, reward_dir = checkpoints.reward_run_folder(config), Path(config["reward_dir"])
    checkpoint = checkpoints.newest_complete(run_folder) if arguments.resume else None
    read = {key: config[key] for key in KEYS}

    set_seed(config["seed"])
    base = load_reward_base(config, device, dtype)
    own = {
        "output_dir": str(run_folder),
        "run_name": reward_dir.name,
        "project": "phi2-reward",
        "learning_rate": config["reward_learning_rate"],
        "max_steps": found["steps"],
        "max_length": None,  # too long pairs are left out before, and counted
    }
    trainer = RewardModelTrainer(
        model=base,
        args=training_arguments(RewardConfig, read, device, dtype, **own),
        train_dataset=found["pairs"]["train"],
        processing_class=tokenizer,
        peft_config=lora_config(config, base, "SEQ_CLS"),
    )
    facts = outputs.run_metadata(read, arguments.preset, device, dtype, found["funnel"], trainer.model)
    log = LogCallback(REWARD_MODEL_COLUMNS, config)
    trainer.add_callback(log)

    def complete(folder: Path, history: list[dict]) -> None:
        files.write_json(folder / "run.json", {**facts, "finished": False, "seconds": round(log.seconds(), 1)})

    trainer.add_callback(CheckpointCallback(complete, config["save_total_limit"]))
    trainer.run(log, checkpoint)

    held_out = found["pairs"]["validation"].to_list()
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    with progress.progress_bar(console, "judging held-out replies", 2 * len(held_out)) as advance:
        chosen, rejected = reward_accuracy.score_pairs(
            lambda prompts, replies: score_answers(trained, tokenizer, prompts, replies), held_out, advance
        )
    scale = reward_accuracy.scale(chosen, rejected)
    measured = reward_accuracy.measure_accuracy(held_out, chosen, rejected)
    with files.atomic_folder(reward_dir) as folder:
        trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        standard = [[(score - scale["mean"]) / scale["std"] for score in scores] for scores in (chosen, rejected)]
        reward_accuracy.draw(measured, *standard, folder / "scores.png")
        rows = outputs.log_rows(trainer.state.log_history, "loss")
        outputs.write_reward_model_files(
            folder, facts, rows, log.seconds(), scale, measured, reward_accuracy.markdown(measured), found["left_out"]
        )
    checkpoints.remove_run(run_folder)  # its checkpoints have served
    with contextlib.suppress(OSError):  # not empty: the rest is somebody's
        run_folder.rmdir()
    shared = ("model", "model_revision", "data_dir", "device", "dtype")
    console.print(reward_accuracy.table(measured))
    console.print(reward_accuracy.verdict(measured), style="bold")
    console.print(
        f"{measured['ties']} ties, counted half. Rank correlation of score and length: {measured['rank_correlation']:.2f}.\n"
        f"Reward model: {reward_dir}, in {format_duration(log.seconds())}   scores: {reward_dir / 'scores.png'}\n"
        "To train on it:\n"
        f"  python train_grpo.py --preset {arguments.preset} --rewards {shlex.quote(config['reward_dir'] + ',ending')} "
        f"--output_dir results/on-reward-model{cli.flags(config, arguments.preset, *shared)}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    cli.run(main)
