"""Fine-tune Phi-2 with GRPO and LoRA on oasst1 prompts.

  python train_grpo.py                     # 100 steps; one GPU of 12 GB or more, by the estimate
  python train_grpo.py 500 --learning_rate 1e-5    # longer: learning_rate x steps is what matters
  python train_grpo.py --check             # check everything, train nothing
  python train_grpo.py --resume            # go on from the newest complete checkpoint
  python train_grpo.py --preset tiny       # a 2M-parameter model on the CPU, in minutes

GRPO samples a group of completions for each prompt, scores them, and makes those above their group's mean likelier. What
differs from the textbook (DeepSeekMath, arXiv 2402.03300): the loss divides by a constant instead of each completion's length,
and the advantage is not divided by the group's std (Dr. GRPO, arXiv 2503.20783), so that neither short completions nor groups
of nearly equal rewards weigh more. One update per batch (TRL's num_iterations 1), so the ratio is 1 and is never clipped.
"""

import math
import shlex
import shutil
from datetime import timedelta
from pathlib import Path

from phi2_grpo.common import cli, setup

KEYS = ("model", "model_revision", "device", "dtype", "lora_r", "lora_alpha", "lora_target_modules",
        "init_adapter", "data_dir", "rollout", "rollout_batch_size", "use_vllm", "vllm_mode", "vllm_server_base_url",
        "vllm_gpu_memory_utilization", "num_generations", "max_completion_length", "temperature", "top_p", "top_k",
        "chat_temperature", "chat_top_p", "rewards", "target_tokens", "format_regex", "max_steps", "learning_rate",
        "lr_scheduler_type", "warmup_steps", "beta", "loss_type", "scale_rewards", "per_device_train_batch_size",
        "gradient_accumulation_steps", "activation_checkpointing", "max_grad_norm", "seed", "output_dir", "save_steps",
        "save_total_limit", "sample_steps", "eval_steps", "eval_prompts", "stop_on_collapse", "report_to")  # fmt: skip


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("steps", nargs="?", metavar="MAX_STEPS", help="the same as --max_steps")
    parser.add_argument("--check", action="store_true", help="print the checks, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in output_dir")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    config, arguments = cli.parse(parser)
    if arguments.steps:
        if not arguments.steps.isdecimal():
            raise cli.UserError(f"{arguments.steps!r} stands where MAX_STEPS may stand, a number. A list has no spaces in it.")
        config["max_steps"] = cli.parse_value("max_steps", arguments.steps)
    setup.prepare(config["model"], *config["rewards"])

    from phi2_grpo.common import files
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import oasst
    from phi2_grpo.models import embedded
    from phi2_grpo.training.checkpoints import add_resume_hint
    from phi2_grpo.training.preflight import preflight

    output, console = Path(config["output_dir"]), Console(quiet=cli.process_index() > 0)
    console.print(f"train_grpo: {cli.differences(config, KEYS)}")
    embedded.prepare(config["model"], oasst.sample_dialogues)
    ready = preflight(config, arguments.resume, arguments.overwrite)
    console.print(ready.table())
    ready.raise_errors()
    if arguments.check:
        console.print("All is ready. Without --check, training starts here.")
        return
    with files.lock_folder(output), add_resume_hint(output):
        train(config, arguments, console, ready)


def train(config: dict, arguments, console, ready) -> None:
    """Train, and leave the finished adapter in <output_dir>-final. `ready`: the preflight's result, with what it loaded."""
    from transformers import set_seed

    from phi2_grpo.models.base import load_base
    from phi2_grpo.rewards.scorer import describe_rewards
    from phi2_grpo.training import checkpoints, outputs

    output, final = Path(config["output_dir"]), checkpoints.final_folder(config)
    checkpoint = checkpoints.newest_complete(output) if arguments.resume else None
    if checkpoints.step_of(checkpoint) >= config["max_steps"] and checkpoints.is_result_of(final, checkpoint):
        return console.print(f"Nothing is left to train, and {final} is its result: it stays as it is.")
    set_seed(config["seed"])
    base = load_base(config, ready.device, ready.dtype)
    for reward_model in ready.scorer.models:
        reward_model.load(config, base, ready.device, ready.dtype)
    trainer = make_trainer(config, ready, base)
    settings = {key: config[key] for key in KEYS}
    facts = outputs.run_metadata(settings, arguments.preset, ready.device, ready.dtype, ready.funnel, trainer.model)
    facts["rewards"] = describe_rewards(ready.scorer.chosen)
    log = add_callbacks(config, ready, trainer, facts)
    trainer.run(log, checkpoint)
    raise_if_collapsed(log.collapsed_at, output)
    if trainer.args.should_save:  # in the first process; the last step has a checkpoint, for transformers saves there
        save_adapter(checkpoints.newest_complete(output), final, ready.tokenizer, facts, trainer.state.log_history)
        print_result(config, arguments.preset, console, final, trainer.state.log_history)


def make_trainer(config: dict, ready, base):
    """TRL's GRPO trainer around the base with its LoRA, with an engine for the rollouts."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from trl import GRPOConfig

    from phi2_grpo.models.base import is_sharded
    from phi2_grpo.rollout.engine import make_engine
    from phi2_grpo.training.memory import reserved_bytes
    from phi2_grpo.training.trainer import Trainer, training_arguments

    own = {
        "project": "phi2-grpo",
        "reward_weights": [reward.weight for reward in ready.scorer.chosen],
        "use_bias_correction_kl": True,  # the KL's gradient is that of KL(policy || reference): docs/step.md
        "disable_dropout": True,  # Phi-2 ships resid_pdrop 0.1: rollout and log-probs would see two models
        "ds3_gather_for_generation": config["use_vllm"],  # ZeRO-3 is for a base that no GPU holds whole
        "router_aux_loss_coef": 0.0,  # of a mixture of experts: no second loss
        "ddp_find_unused_parameters": False,  # every adapter weight is in every forward pass
        "ddp_broadcast_buffers": False,  # all are constant; and processes may differ in how many passes an update takes
    }
    ends = base.generation_config.eos_token_id = ready.tokenizer.all_eos_ids  # TRL's rollouts end at the base's own
    own["generation_kwargs"] = {"stop_token_ids": ends} if config["use_vllm"] else None
    trainer = Trainer(
        model=base,
        reward_funcs=ready.scorer.functions,
        args=training_arguments(GRPOConfig, config, ready.device, ready.dtype, **own),
        train_dataset=ready.prompts["train"],
        processing_class=ready.tokenizer,
        peft_config=ready.lora,
    )
    if config["init_adapter"]:
        # Loaded after TRL has wrapped the base: the reference of the KL stays the base with its adapter off.
        set_peft_model_state_dict(trainer.model, load_peft_weights(config["init_adapter"], device=str(ready.device)))
    if not is_sharded():  # the engine reads the whole base; its cache leaves room for the update
        policy = trainer.accelerator.unwrap_model(trainer.model)
        trainer.engine = make_engine(config["rollout"], policy, config["rollout_batch_size"], reserved_bytes(ready.memory))
    return trainer


def add_callbacks(config: dict, ready, trainer, facts: dict):
    """Logging, checkpoints, and evaluation on held-out prompts. Returns the LogCallback, which has the run's clock."""
    from phi2_grpo.data.store import select_rows
    from phi2_grpo.rewards.scorer import Scorer
    from phi2_grpo.training.callbacks import GRPO_COLUMNS, CheckpointCallback, EvaluationCallback, LogCallback
    from phi2_grpo.training.outputs import write_adapter_files

    log = LogCallback(GRPO_COLUMNS, config, ready.scorer)

    def write_files(folder: Path, history: list[dict]) -> None:
        write_adapter_files(folder, ready.tokenizer, facts, history, log.seconds(), finished=False)

    trainer.add_callback(log)
    trainer.add_callback(CheckpointCallback(write_files, config["save_total_limit"]))
    if rows := select_rows(ready.prompts["validation"], config["eval_prompts"], seed=0):
        scorer = Scorer(ready.tokenizer, config["target_tokens"], ready.scorer.chosen, config["format_regex"])
        trainer.add_callback(EvaluationCallback(trainer, scorer, rows, config, log.console))
    return log


def raise_if_collapsed(step: int | None, output: Path) -> None:
    """After a run that --stop_on_collapse ended: a UserError that names the last checkpoint from before the collapse."""
    from phi2_grpo.rewards.collapse import WINDOW
    from phi2_grpo.training.checkpoints import complete_checkpoints, step_of

    if step is not None:
        before = [path for path in complete_checkpoints(output) if step_of(path) <= step - WINDOW]
        start = f"from the last checkpoint before it: --init_adapter {before[-1]} --output_dir ANOTHER" if before else "anew"
        change = "with another reward, a lower --learning_rate or a higher --beta"
        raise cli.UserError(f"stopped at step {step}: the run collapsed. Start {start}, {change}.")


def save_adapter(checkpoint: Path, final: Path, tokenizer, facts: dict, history: list[dict]) -> None:
    """The finished adapter is the last checkpoint, without what only the trainer needs."""
    from phi2_grpo.common.files import atomic_folder, read_run
    from phi2_grpo.training.outputs import write_adapter_files

    with atomic_folder(final) as folder:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(checkpoint / name, folder / name)
        tokenizer.save_pretrained(folder)
        write_adapter_files(folder, tokenizer, facts, history, read_run(checkpoint)["seconds"], finished=True)


def print_result(config: dict, preset: str, console, final: Path, history: list[dict]) -> None:
    from phi2_grpo.common.files import read_run, sibling
    from phi2_grpo.rewards.functions import untrusted_rewards
    from phi2_grpo.training.model_card import FIRST_TO_LAST
    from phi2_grpo.training.outputs import first_and_last

    first, last = first_and_last(history, "reward") or (math.nan, math.nan)
    keys = ["model", "model_revision", "data_dir", "device", "dtype"]
    if cli.flags(config, preset, "output_dir"):  # or else its report would replace that of the preset's run
        config = {**config, "validation_dir": str(sibling(Path(config["output_dir"]), "{}-validation"))}
        keys.append("validation_dir")
    if untrusted_rewards(config["rewards"]):
        keys.append("rewards")  # no adapter may name code to run
    console.print(
        f"Mean reward, {FIRST_TO_LAST}: {first:.3f} -> {last:.3f} in {timedelta(seconds=round(read_run(final)['seconds']))}.\n"
        f"Adapter: {final}   curve: {final / 'reward.png'}\n"
        "Is it better on prompts it has not seen?\n"
        f"  {cli.script_command('validate_model.py')} --preset {preset} --adapter {shlex.quote(str(final))}"
        f"{cli.flags(config, preset, *keys)}",
        soft_wrap=True,  # a command stays one line, to be copied
    )


if __name__ == "__main__":
    cli.run(main)
