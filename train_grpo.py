"""Fine-tune Phi-2 with GRPO and LoRA on oasst1 prompts.

  python train_grpo.py                     # 100 steps on one 12-16 GB GPU
  python train_grpo.py 1000                # 1000 steps
  python train_grpo.py --check             # look at everything, train nothing
  python train_grpo.py --resume            # go on from the last whole checkpoint
  python train_grpo.py --preset tiny       # a 2M-parameter model on the CPU, in minutes

GRPO samples a group of completions for each prompt, scores them, and makes those above their group's mean likelier. What
differs from the textbook (DeepSeekMath, arXiv 2402.03300): the loss divides by a constant instead of each answer's length,
and the advantage is not divided by the group's spread (Dr. GRPO, arXiv 2503.20783), so that neither long answers nor easy
prompts weigh more. One update per batch, so nothing is ever clipped.
"""

import math
from pathlib import Path

from phi2_grpo import cli, environment

KEYS = ("model", "model_revision", "device", "dtype", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
        "init_adapter", "data_dir", "rollout", "rollout_batch_size", "use_vllm", "vllm_mode", "vllm_server_base_url",
        "vllm_gpu_memory_utilization", "num_generations", "max_completion_length", "temperature", "top_p", "top_k",
        "chat_temperature", "chat_top_p", "rewards", "target_tokens", "max_steps", "learning_rate", "lr_scheduler_type",
        "warmup_steps", "beta", "loss_type", "scale_rewards", "per_device_train_batch_size",
        "gradient_accumulation_steps", "activation_checkpointing", "max_grad_norm", "seed",
        "output_dir", "save_steps", "save_total_limit", "sample_steps", "eval_steps",
        "eval_prompts", "stop_on_collapse", "report_to")  # fmt: skip


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS)
    parser.add_argument("steps", nargs="?", metavar="MAX_STEPS", help="the same as --max_steps")
    parser.add_argument("--check", action="store_true", help="print the checks and the plan, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in output_dir")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    config, arguments = cli.parse(parser)
    if arguments.steps is not None:
        if arguments.max_steps not in (None, arguments.steps):
            raise cli.UserError(f"MAX_STEPS is {arguments.steps} and --max_steps {arguments.max_steps}. Give one of them.")
        config["max_steps"] = cli.parse_value("max_steps", arguments.steps)
    environment.prepare(config["model"], *cli.reward_models(config["rewards"]))

    from rich.console import Console

    from phi2_grpo import checks, failures, files

    console = Console(quiet=cli.process() > 0)
    console.print(f"train_grpo: {cli.differences(config, KEYS)}", highlight=False)
    checklist, found = checks.preflight(config, arguments.resume, arguments.overwrite)
    console.print(checklist.table())
    checklist.complain()
    if arguments.check:
        console.print(checks.expectation(config, found), highlight=False)
        console.print("All is ready. Without --check, training starts here.")
        return
    with files.alone_in(Path(config["output_dir"])), failures.advice_when_interrupted(Path(config["output_dir"])):
        train(config, arguments, console, found)


def train(config: dict, arguments, console, found: dict) -> None:
    """Train, and leave the finished adapter in <output_dir>-final."""
    from dataclasses import fields

    import torch
    from accelerate.utils import gather_object
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
    from transformers import set_seed
    from trl import GRPOConfig

    from phi2_grpo import (
        checkpoints,
        checks,
        evaluation,
        failures,
        files,
        held_out,
        interruption,
        model,
        monitor,
        plan,
        progress,
        report,
        rollout,
        scoring,
    )
    from phi2_grpo.trainer import Trainer

    device, dtype = found["device"]
    tokenizer, scorer = found["tokenizer"], found["scorer"]
    whole = checkpoints.whole_checkpoints(config["output_dir"]) if arguments.resume else []

    set_seed(config["seed"])
    base = model.load_base(config, device, dtype)
    for judge in scorer.models:
        judge.load(config, base, device, dtype)
    if scorer.models:
        scoring.try_rewards(scorer, checks.real_rows(found["prompts"]))
    if config["init_adapter"]:
        lora = LoraConfig.from_pretrained(config["init_adapter"])
        lora.inference_mode = False
    else:
        lora = model.lora_config(config, base)
    names = {field.name for field in fields(GRPOConfig)}
    trainer = Trainer(
        model=base,
        reward_funcs=scorer.functions,
        args=GRPOConfig(
            **{key: value for key, value in config.items() if key in names and value != ""},
            reward_weights=[reward.weight for reward in scorer.chosen],
            bf16=dtype.itemsize == 2 and device.type == "cuda",  # autocast fails in a CPU's layer norm
            use_cpu=device.type == "cpu",
            disable_dropout=True,  # Phi-2 ships resid_pdrop 0.1: rollout and log-probs would see two models
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
            ddp_find_unused_parameters=False,  # every adapter weight is in every forward pass
            project="phi2-grpo",
            run_name=Path(config["output_dir"]).name,
            trackio_static_space_id=False,  # stay on this machine
        ),
        train_dataset=found["prompts"]["train"],
        processing_class=tokenizer,
        peft_config=lora,
    )
    starts = gather_object([checkpoints.step_of(whole[-1]) if whole else 0])
    if len(set(starts)) > 1:
        raise cli.UserError(
            f"the processes found different checkpoints, of the steps {sorted(set(starts))}: all machines must see the same "
            f"{config['output_dir']}, on a shared disk."
        )
    if config["init_adapter"]:
        # Loaded after TRL has wrapped the base: the reference of the KL stays the base with its adapter off.
        weights = load_peft_weights(config["init_adapter"], device=str(device))
        set_peft_model_state_dict(trainer.model, weights)
    # TRL's own path serves vLLM; for the rest an engine, which the held-out evaluations share.
    speaker = trainer.accelerator.unwrap_model(trainer.model)
    engine = rollout.make_engine(config["rollout"], speaker, config["rollout_batch_size"], plan.reserve(found["plan"]))
    trainer.engine = None if config["use_vllm"] or model.spread() else engine
    trainer.create_model_card = lambda *_, **__: None  # ours is written with each checkpoint
    adapted = model.describe_coverage(trainer.model)
    read = {key: config[key] for key in KEYS}
    facts = report.run_facts(read, arguments.preset, device, dtype, found["funnel"], adapted)
    facts["rewards"] = scoring.describe(scorer.chosen)
    before = files.read_json(whole[-1] / "run.json").get("seconds", 0.0) if whole else 0.0
    track = config["report_to"] == "trackio"
    watch = monitor.Monitor(scorer, tokenizer, facts, config["sample_steps"], before, config["stop_on_collapse"], track)
    trainer.complete = watch.complete
    trainer.add_callback(watch)
    progress.quiet(trainer)
    rows = evaluation.held_out_rows(found["prompts"]["validation"], config["eval_prompts"], seed=0)
    judges = scoring.Scorer(tokenizer, config["target_tokens"], scorer.chosen)
    trainer.add_callback(held_out.HeldOut(judges, tokenizer, engine, rows, config, watch.console, track))
    console.print(f"LoRA on {adapted}", highlight=False)
    asked = interruption.Interruption()
    trainer.add_callback(asked)
    if whole and checkpoints.step_of(whole[-1]) >= config["max_steps"]:
        # Nothing is left to do (and the trainer would do one step more): only the final folder may be missing.
        model.take_up(trainer, whole[-1])
    else:
        if not whole and trainer.accelerator.is_main_process:
            checkpoints.remove_run(Path(config["output_dir"]))  # as late as can be: loading the model may still fail
        try:
            with asked.listening():
                trainer.train(resume_from_checkpoint=str(whole[-1]) if whole else None)
        except scoring.BadReward as error:
            raise cli.UserError(f"{error}\n  {save_now(trainer, config)} Mend the reward first.") from None
        except torch.OutOfMemoryError as error:
            part = trainer.failed_in or "update"
            raise cli.UserError(
                f"memory ran out in the {part} of step {trainer.state.global_step + 1}: {str(error).split('. ')[0]}.\n"
                f"  {save_now(trainer, config)} The next smaller setting: {failures.smaller(config, part)}"
            ) from None
        except Exception as error:
            failures.explain(error, Path(config["output_dir"]))
            raise
        if trainer.state.global_step < config["max_steps"]:
            asked.raise_if_asked()

    history = trainer.state.log_history
    kept = take_last_good(trainer, config, watch.collapsed_at, console) if watch.collapsed_at else None
    state = trainer.accelerator.get_state_dict(trainer.model) if model.spread() else None  # by all processes together
    if not trainer.accelerator.is_main_process:
        return
    final = checks.final_folder(config)
    with files.whole_folder(final) as folder:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        report.describe_folder(folder, tokenizer, facts, history, watch.seconds(), finished=True, kept=kept)
    rows = [row for row in report.step_rows(history) if kept is None or row["step"] <= kept]
    first, last = report.window(rows, "reward") or (math.nan, math.nan)
    console.print(
        f"Mean reward, first to last steps: {first:.3f} -> {last:.3f}, in {monitor.duration(watch.seconds())}.\n"
        f"Adapter: {final}   curve: {final / 'reward.png'}\n"
        "Is it better on prompts it has not seen?\n"
        f"  python validate_model.py --preset {arguments.preset} --adapter {final}",
        highlight=False,
    )


def take_last_good(trainer, config: dict, collapsed_at: int, console) -> int:
    """Put the trainer back to the last checkpoint before the collapse, and return its step. Raises UserError without one."""
    from phi2_grpo import checkpoints, model, monitor

    whole = checkpoints.whole_checkpoints(config["output_dir"])
    good = [path for path in whole if checkpoints.step_of(path) <= collapsed_at - monitor.WINDOW]
    if not good:
        raise cli.UserError(
            f"it collapsed at step {collapsed_at}, before there was a good checkpoint, so there is no result. Mend the reward, "
            "lower --learning_rate or --save_steps, or raise --beta; then --overwrite."
        )
    model.take_up(trainer, good[-1])
    console.print(f"Stopped at step {collapsed_at}. The result is {good[-1].name}.", style="bold red")
    return checkpoints.step_of(good[-1])


def save_now(trainer, config: dict) -> str:
    """Save what the last whole step left, where no checkpoint has it yet; says what there is."""
    from phi2_grpo import checkpoints

    step, output = trainer.state.global_step, Path(config["output_dir"])
    # Of several processes one alone cannot save: the others wait for it elsewhere.
    if step and trainer.accelerator.num_processes == 1 and not checkpoints.is_whole(output / f"checkpoint-{step}"):
        trainer._save_checkpoint(trainer.model, trial=None)  # private; a test holds it
    left = checkpoints.whole_checkpoints(output)
    return f"{left[-1]} is whole: go on with --resume." if left else "No step was finished: nothing is lost."


if __name__ == "__main__":
    cli.run(main)
