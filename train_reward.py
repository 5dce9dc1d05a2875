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
from datetime import timedelta
from pathlib import Path

from phi2_grpo.common import cli, setup

KEYS = ("model", "model_revision", "device", "dtype", "lora_r", "lora_alpha", "lora_target_modules", "data_dir",
        "reward_dir", "reward_learning_rate", "reward_epochs", "reward_max_length", "lr_scheduler_type", "warmup_steps",
        "per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "max_grad_norm", "seed",
        "save_steps", "save_total_limit", "report_to")  # fmt: skip


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("--check", action="store_true", help="print the checks, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in <reward_dir>-run")
    parser.add_argument("--overwrite", action="store_true", help="replace the reward model in reward_dir")
    config, arguments = cli.parse(parser)
    cli.check_one_process("train_reward.py")
    setup.prepare(config["model"])

    from phi2_grpo.common import files
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import oasst
    from phi2_grpo.models import embedded
    from phi2_grpo.training import checkpoints
    from phi2_grpo.training.preflight import preflight_reward

    console, run_folder = Console(), checkpoints.reward_run_folder(config)
    console.print(f"train_reward: {cli.differences(config, KEYS)}")
    embedded.prepare(config["model"], oasst.sample_dialogues)
    ready = preflight_reward(config, arguments.resume, arguments.overwrite)
    console.print(ready.table())
    ready.raise_errors()
    if arguments.check:
        console.print("All is ready. Without --check, training starts here.")
        return
    with files.lock_folder(Path(config["reward_dir"])), checkpoints.add_resume_hint(run_folder):
        train(config, arguments, console, ready, run_folder)


def train(config: dict, arguments, console, ready, run_folder: Path) -> None:
    """Train, measure on the validation pairs, and leave the finished reward model in reward_dir."""
    from transformers import set_seed

    from phi2_grpo.common import files
    from phi2_grpo.evaluation import reward_accuracy
    from phi2_grpo.training import checkpoints, outputs
    from phi2_grpo.training.callbacks import REWARD_MODEL_COLUMNS, CheckpointCallback, LogCallback

    set_seed(config["seed"])
    trainer = make_trainer(config, ready, run_folder)
    settings = {key: config[key] for key in KEYS}
    facts = outputs.run_metadata(settings, arguments.preset, ready.device, ready.dtype, ready.funnel, trainer.model)
    log = LogCallback(REWARD_MODEL_COLUMNS, config)

    def complete(folder: Path, history: list[dict]) -> None:
        files.write_json(folder / "run.json", {**facts, "finished": False, "seconds": round(log.seconds(), 1)})

    trainer.add_callback(log)
    trainer.add_callback(CheckpointCallback(complete, config["save_total_limit"]))
    trainer.run(log, checkpoints.newest_complete(run_folder) if arguments.resume else None)

    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    pairs = ready.pairs["validation"].to_list()
    chosen, rejected = reward_accuracy.score_pairs(console, model, ready.tokenizer, pairs)
    accuracy = reward_accuracy.measure_accuracy(pairs, chosen, rejected)
    save(config, model, ready, facts, trainer.state.log_history, log.seconds(), accuracy, (chosen, rejected))
    checkpoints.remove_run(run_folder)
    with contextlib.suppress(OSError):  # not empty: the rest is somebody's
        run_folder.rmdir()
    print_result(config, arguments.preset, console, accuracy, log.seconds())


def make_trainer(config: dict, ready, run_folder: Path):
    from trl import RewardConfig

    from phi2_grpo.models.base import load_reward_base
    from phi2_grpo.models.lora import lora_config
    from phi2_grpo.training.trainer import RewardModelTrainer, training_arguments

    ready.tokenizer.padding_side = "right"  # the head reads the last token
    base = load_reward_base(config, ready.device, ready.dtype)
    own = {
        "output_dir": str(run_folder),
        "run_name": Path(config["reward_dir"]).name,
        "project": "phi2-reward",
        "learning_rate": config["reward_learning_rate"],
        "max_steps": ready.steps,
        "max_length": None,  # too long pairs were left out before, and counted
    }
    return RewardModelTrainer(
        model=base,
        args=training_arguments(RewardConfig, {key: config[key] for key in KEYS}, ready.device, ready.dtype, **own),
        train_dataset=ready.pairs["train"],
        processing_class=ready.tokenizer,
        peft_config=lora_config(config, base, "SEQ_CLS"),
    )


def save(config: dict, model, ready, facts: dict, history: list[dict], seconds: float, accuracy: dict, scores: tuple) -> None:
    """The reward model with its card, the picture of its scores, and in run.json what they are centred and scaled by."""
    from phi2_grpo.common import files
    from phi2_grpo.evaluation import reward_accuracy
    from phi2_grpo.training.model_card import reward_model_card
    from phi2_grpo.training.outputs import log_rows

    scale, rows = reward_accuracy.scale(*scores), log_rows(history, "loss")
    steps, lines = rows[-1]["step"] if rows else 0, reward_accuracy.markdown(accuracy)
    with files.atomic_folder(Path(config["reward_dir"])) as folder:
        model.save_pretrained(folder)
        ready.tokenizer.save_pretrained(folder)
        standardised = [[(score - scale["mean"]) / scale["std"] for score in side] for side in scores]
        reward_accuracy.draw(accuracy, *standardised, folder / "scores.png")
        files.write_rows(folder / "metrics.jsonl", rows)
        files.write_text(folder / "README.md", reward_model_card(facts, steps, seconds, lines, ready.left_out))
        ending = {"finished": True, "steps": steps, "seconds": round(seconds, 1), "scores": scale, "validation": accuracy}
        files.write_json(folder / "run.json", facts | ending)


def print_result(config: dict, preset: str, console, accuracy: dict, seconds: float) -> None:
    from phi2_grpo.common.console import make_table
    from phi2_grpo.evaluation import reward_accuracy

    reward_dir = Path(config["reward_dir"])
    title = "How often it agrees with people, % [95 % interval]; chance is 50"
    console.print(make_table(title, *reward_accuracy.COLUMNS, rows=reward_accuracy.rows(accuracy)))
    console.print(reward_accuracy.verdict(accuracy), style="bold")
    rewards, output = shlex.quote(f"{config['reward_dir']},ending"), shlex.quote(f"results/on-{reward_dir.name}")
    shared = cli.flags(config, preset, "model", "model_revision", "data_dir", "device", "dtype")
    console.print(
        f"{accuracy['ties']} ties, counted half. Rank correlation of score and length: {accuracy['rank_correlation']:.2f}.\n"
        f"Reward model: {reward_dir}, in {timedelta(seconds=round(seconds))}   scores: {reward_dir / 'scores.png'}\n"
        "To train on it:\n"
        f"  {cli.script_command('train_grpo.py')} --preset {preset} --rewards {rewards} --output_dir {output}"
        f"{shared}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    cli.run(main)
