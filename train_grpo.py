"""Fine-tune Phi-2 with GRPO and LoRA on oasst1 prompts.

  python train_grpo.py                     # 100 steps on one 12-16 GB GPU
  python train_grpo.py 500 --learning_rate 1e-5    # longer: what counts is the sum of the rates
  python train_grpo.py --check             # look at everything, train nothing
  python train_grpo.py --resume            # go on from the last whole checkpoint
  python train_grpo.py --preset tiny       # a 2M-parameter model on the CPU, in minutes

GRPO samples a group of completions for each prompt, scores them, and makes those above their group's mean likelier. What
differs from the textbook (DeepSeekMath, arXiv 2402.03300): the loss divides by a constant instead of each answer's length,
and the advantage is not divided by the group's spread (Dr. GRPO, arXiv 2503.20783), so that neither long answers nor easy
prompts weigh more. One update per batch, so nothing is ever clipped.
"""

import math
import shlex
from pathlib import Path

from phi2_grpo.common import cli, setup

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
    setup.prepare(config["model"], *config["rewards"])

    from phi2_grpo.common import files
    from phi2_grpo.common.console import Console
    from phi2_grpo.data import oasst
    from phi2_grpo.models import embedded
    from phi2_grpo.training import preflight, running

    console = Console(quiet=cli.process_index() > 0)
    console.print(f"train_grpo: {cli.differences(config, KEYS)}")
    embedded.prepare(config["model"], oasst.sample_dialogues)
    checklist, found = preflight.preflight(config, arguments.resume, arguments.overwrite)
    console.print(checklist.table())
    checklist.complain()
    if arguments.check:
        console.print(preflight.expectation(config, found))
        console.print("All is ready. Without --check, training starts here.")
        return
    with files.lock_folder(Path(config["output_dir"])), running.advice_when_interrupted(Path(config["output_dir"])):
        train(config, arguments, console, found)


def train(config: dict, arguments, console, found: dict) -> None:
    """Train, and leave the finished adapter in <output_dir>-final."""
    from accelerate.utils import gather_object
    from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
    from transformers import set_seed
    from trl import GRPOConfig

    from phi2_grpo.common import files
    from phi2_grpo.common.console import format_duration
    from phi2_grpo.data import store
    from phi2_grpo.models.base import context_length, is_sharded, load_base, resolve_model
    from phi2_grpo.models.lora import lora_config, lora_summary
    from phi2_grpo.rewards.functions import untrusted_rewards
    from phi2_grpo.rewards.scorer import Scorer, describe_rewards, try_rewards
    from phi2_grpo.rollout.engine import make_engine
    from phi2_grpo.training import checkpoints, memory, outputs, running
    from phi2_grpo.training.callbacks import EvaluationCallback, LogCallback
    from phi2_grpo.training.trainer import Trainer, training_arguments

    device, dtype = found["device"]
    tokenizer, scorer = found["tokenizer"], found["scorer"]
    output, final = Path(config["output_dir"]), checkpoints.final_folder(config)
    whole = checkpoints.complete_checkpoints(output) if arguments.resume else []
    read = {key: config[key] for key in KEYS}
    if whole and checkpoints.step_of(whole[-1]) >= config["max_steps"] and checkpoints.is_result_of(final, whole[-1]):
        console.print(f"Nothing is left to train, and {final} is its result: it stays as it is.")
        return

    set_seed(config["seed"])
    base = load_base(config, device, dtype)
    for judge in scorer.models:
        judge.load(config, base, device, dtype)
    if scorer.models:
        try_rewards(scorer, store.first_rows(found["prompts"]))
    if config["init_adapter"]:
        lora = LoraConfig.from_pretrained(config["init_adapter"])
        lora.inference_mode, lora.revision = False, resolve_model(config)[1]
    else:
        lora = lora_config(config, base)
    own = {
        "project": "phi2-grpo",
        "reward_weights": [reward.weight for reward in scorer.chosen],
        "disable_dropout": True,  # Phi-2 ships resid_pdrop 0.1: rollout and log-probs would see two models
        "ddp_find_unused_parameters": False,  # every adapter weight is in every forward pass
    }
    trainer = Trainer(
        model=base,
        reward_funcs=scorer.functions,
        args=training_arguments(GRPOConfig, read, device, dtype, **own),
        train_dataset=found["prompts"]["train"],
        processing_class=tokenizer,
        peft_config=lora,
    )
    starts = gather_object([checkpoints.step_of(whole[-1]) if whole else 0])
    if len(set(starts)) > 1:
        raise cli.UserError(
            f"the processes found different checkpoints, of the steps {sorted(set(starts))}: all machines must see the same "
            f"{output}, on a shared disk."
        )
    if config["init_adapter"]:
        # Loaded after TRL has wrapped the base: the reference of the KL stays the base with its adapter off.
        weights = load_peft_weights(config["init_adapter"], device=str(device))
        set_peft_model_state_dict(trainer.model, weights)
    # TRL's own path serves vLLM; for the rest an engine, which the held-out evaluations share.
    engine = None
    if not is_sharded():
        speaker = trainer.accelerator.unwrap_model(trainer.model)
        engine = make_engine(config["rollout"], speaker, config["rollout_batch_size"], memory.reserved_bytes(found["plan"]))
    trainer.engine = None if config["use_vllm"] else engine
    adapted = lora_summary(trainer.model)
    facts = outputs.run_metadata(read, arguments.preset, device, dtype, found["funnel"], adapted)
    facts |= {"rewards": describe_rewards(scorer.chosen), "context": context_length(base)}
    track = config["report_to"] == "trackio" and not cli.process_index()  # transformers opens it in the first process alone
    before = checkpoints.elapsed_seconds(whole)
    watch = LogCallback(scorer, tokenizer, facts, config["sample_steps"], before, config["stop_on_collapse"], track)
    trainer.add_run_callback(watch)
    rows = store.select_rows(found["prompts"]["validation"], config["eval_prompts"], seed=0)
    judges = Scorer(tokenizer, config["target_tokens"], scorer.chosen)
    trainer.add_callback(EvaluationCallback(trainer, judges, tokenizer, engine, rows, config, watch.console, track))
    running.train(trainer, config, output, whole, config["max_steps"])

    history = trainer.state.log_history
    kept = running.take_last_good(trainer, output, watch.collapsed_at) if watch.collapsed_at else None
    if kept:
        console.print(f"Stopped at step {watch.collapsed_at}. The result is checkpoint-{kept}.", style="bold red")
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded() else None  # by all processes together
    if not trainer.accelerator.is_main_process:
        return
    with files.atomic_folder(final) as folder:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        outputs.write_adapter_files(folder, tokenizer, facts, history, watch.seconds(), finished=True, kept=kept)
    rows = [row for row in outputs.log_rows(history, "reward") if kept is None or row["step"] <= kept]
    unlike = (
        "model",
        "model_revision",
        "data_dir",
        "device",
        "dtype",
        *(["rewards"] if untrusted_rewards(config["rewards"]) else []),
    )
    named = cli.flags(config, arguments.preset, *unlike)
    first, last = outputs.first_and_last(rows, "reward") or (math.nan, math.nan)
    console.print(
        f"Mean reward, first to last steps: {first:.3f} -> {last:.3f}, in {format_duration(watch.seconds())}.\n"
        f"Adapter: {final}   curve: {final / 'reward.png'}\n"
        "Is it better on prompts it has not seen?\n"
        f"  python validate_model.py --preset {arguments.preset} --adapter {shlex.quote(str(final))}{named}",
        soft_wrap=True,  # a command stays one line, to be copied
    )


if __name__ == "__main__":
    cli.run(main)
