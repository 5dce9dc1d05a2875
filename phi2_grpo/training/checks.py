"""The checks of a run: each returns (value, what it says), or raises UserError with what was given, the rule and the remedy."""

import importlib.metadata
import math
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForSequenceClassification

from phi2_grpo.common import cli, files
from phi2_grpo.common.cli import UserError
from phi2_grpo.data import store
from phi2_grpo.models.base import base_of, choose_device, commit_of, context_length, is_same_base, is_sharded, meta_model
from phi2_grpo.models.lora import lora_counts, lora_summary, meta_lora_model
from phi2_grpo.models.tokenizer import check_context, check_prompt_format, check_vocabulary, load_tokenizer
from phi2_grpo.rewards.reward_model import render_conversations
from phi2_grpo.rewards.scorer import Scorer, parse_rewards, try_rewards
from phi2_grpo.rollout.cache import free_memory
from phi2_grpo.rollout.engine import choose_engine
from phi2_grpo.training import checkpoints, outputs
from phi2_grpo.training.memory import estimate, peak, update_estimate

GB = 1e9
MAY_NOT_FIT = "This may not fit"  # by the estimate; a run may still try
# Their positions count TRL's padding, or TRL leaves out a part of their head.
WRONG_LOG_PROBS = {"gpt_neo", "xglm", "openai-gpt", "ctrl", "modernbert-decoder", "recurrent_gemma", "xlstm"}


def device(config: dict):
    device, dtype = choose_device(config)
    if device.type == "cuda" and torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to one process. Use one: CUDA_VISIBLE_DEVICES=0 python ...; "
            "or all, for train_grpo.py: accelerate launch --multi_gpu ..."
        )
    return (device, dtype), f"{outputs.hardware_name(device)}, {str(dtype).removeprefix('torch.')}"


def output_folder(output: Path, final: Path, key: str, resume: bool, overwrite: bool):
    """`output` is for the checkpoints, `final` for what a finished run leaves, with `key` in its run.json."""
    files.check_writable(output)
    files.check_writable(final)
    finished = files.check_replaceable(final, lambda folder: key in files.read_run(folder))
    if not checkpoints.is_run_folder(output) or (output / "adapter_config.json").exists():
        raise UserError(f"{output} holds an adapter, metrics or checkpoints of another program. Choose another folder.")
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it. Give one of them.")
    newest = checkpoints.newest_complete(output)
    if resume and not newest and finished:
        raise UserError(f"{final} is finished, and there is no checkpoint to go on from. Replace it: --overwrite.")
    if resume:
        return True, f"resuming at {newest.name}" if newest else "no complete checkpoint: starting at step 0"
    run = newest or (final if finished else None)
    if run and not overwrite:
        raise UserError(f"{run} holds a run. Go on with it: --resume; replace it: --overwrite; or choose another folder.")
    return True, f"{output}{', replacing the run there' if run else ''}"


def same_run(config: dict, output: Path, funnel: dict, dtype: torch.dtype, steps: int, facts: dict):
    """Would the newest checkpoint go on as it began?"""
    newest = checkpoints.newest_complete(output)
    if newest is None:
        return True, "nothing to go on from"
    then = files.read_run(newest)
    facts = {"dtype": str(dtype).removeprefix("torch."), "model_commit": commit_of(config), **facts}
    changed = checkpoints.changed_settings(then, config, facts)
    if then.get("data", {}).get("fingerprint") != funnel["fingerprint"]:
        changed.append(f"the prompts in {config['data_dir']} are not those it was trained on")
    if changed:
        listing = "\n  ".join(changed)
        other = f"; or begin a run with these weights: --init_adapter {newest} --output_dir ANOTHER" * ("rewards" in facts)
        raise UserError(
            f"{newest} is of a run with other settings, and would not go on as it began:\n  {listing}\n"
            f"  Give those settings again{other}; or start anew: --overwrite, or another folder."
        )
    done = f"; nothing is left to train: it is at step {checkpoints.step_of(newest)} of {steps}"
    return True, f"settings and data are those of {newest.name}{done * (checkpoints.step_of(newest) >= steps)}"


def settings(config: dict):
    if config["top_p"] < 1 or config["top_k"]:
        return True, "with top_p or top_k the completions are of another distribution than the log-probs that are trained"
    if config["learning_rate"] < 2e-6:
        return True, f"learning_rate {config['learning_rate']:g} is so low that {config['max_steps']} steps may change nothing"
    text = f"{config['max_steps']} steps at learning rate {config['learning_rate']:g}"
    return True, text + _warmup(config, config["max_steps"])


def _warmup(config: dict, steps: int) -> str:
    """What is to be said where most of a run is warm-up."""
    few = config["lr_scheduler_type"] != "constant" and steps <= 2 * config["warmup_steps"]
    return f"; the rate rises from 0 over {config['warmup_steps']} steps: a new run with --warmup_steps 0 learns more" * few


def _is_installed(package: str) -> bool:
    """Whether pip knows it: a folder of its name in the working directory would import as well."""
    return any(True for _ in importlib.metadata.distributions(name=package))


def tracker(config: dict):
    package = config["report_to"]
    if package != "none" and not _is_installed(package):
        raise UserError(f"--report_to {package} is not installed: {cli.python_command()} -m pip install {package}. Or: none.")
    return True, package


def tokenizer(config: dict):
    tokenizer = load_tokenizer(config)
    thinks = "; it may think before it answers: rewards see the thoughts, too (docs/models.md)"
    return tokenizer, f"{config['model']}, {len(tokenizer):,} tokens{thinks * ('<think>' in tokenizer.chat_template)}"


def prompts(config: dict, tokenizer):
    prompts, funnel = store.load_prompts(config, tokenizer)
    if not len(prompts["train"]):
        again = cli.prepare_command(config, overwrite=True)
        raise UserError(f"{config['data_dir']} has no train prompt. Make it again, with others: {again}")
    return (prompts, funnel), f"{len(prompts['train']):,} train and {len(prompts['validation']):,} validation prompts"


def pairs(config: dict, tokenizer):
    """(pairs, funnel, optimizer steps, pairs left out, tokens of the longest reply with its prompt)."""
    pairs, funnel = store.load_prompts(config, tokenizer, store.PREFERENCES)
    if not len(pairs["train"]) or not len(pairs["validation"]):
        raise UserError(
            f"{config['data_dir']} has {len(pairs['train'])} train and {len(pairs['validation'])} validation pairs of ranked "
            "replies, and both are needed. Prepare a source that has ranks, with a --validation_fraction."
        )
    most = min(config["reward_max_length"], context_length(meta_model(config)))
    lengths = {split: _pair_lengths(tokenizer, table) for split, table in pairs.items()}
    kept = {split: [i for i, length in enumerate(of) if length <= most] for split, of in lengths.items()}
    if not all(kept.values()):
        raise UserError(f"no pair of a split has at most {most} tokens. Raise --reward_max_length, within the context.")
    batch = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    steps = config["reward_epochs"] * math.ceil(len(kept["train"]) / batch)
    left_out = sum(len(lengths[split]) - len(of) for split, of in kept.items())
    for split, of in kept.items():
        pairs[split] = pairs[split].select(of)
    counts = f"{len(pairs['train']):,} train and {len(pairs['validation']):,} validation pairs, {left_out:,} too long"
    few = ". So few validation pairs say little: the intervals will be wide" * (len(pairs["validation"]) < 50)
    text = f"{counts}; {steps} steps of {batch} pairs{few}{_warmup(config, steps)}"
    return (pairs, funnel, steps, left_out, max(lengths["train"][i] for i in kept["train"])), text


def _pair_lengths(tokenizer, table: Dataset) -> list[int]:
    """Tokens of the longer reply of each pair, its prompt included."""
    sides = []
    for side in ("chosen", "rejected"):
        texts = render_conversations(tokenizer, table["prompt"], [reply[0]["content"] for reply in table[side]])
        sides.append(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return list(map(max, *sides))


def reward_head(config: dict):
    base = meta_model(config)
    try:
        with torch.device("meta"):
            return True, type(AutoModelForSequenceClassification.from_config(base.config)).__name__
    except ValueError:
        kind = base.config.model_type
        raise UserError(f"transformers has no sequence-classification model of the kind {kind}. Take another base.") from None


def lora(config: dict, tokenizer):
    start, output = config["init_adapter"], Path(config["output_dir"]).resolve()
    if start and Path(start).resolve().is_relative_to(output):
        raise UserError(f"--init_adapter {start} lies in output_dir, whose checkpoints are replaced. Give another output_dir.")
    policy = meta_lora_model(config)
    check_vocabulary(tokenizer, policy)
    if start:
        check_prompt_format(Path(start), tokenizer)
    if isinstance(policy.get_output_embeddings(), BaseTunerLayer):
        raise UserError("LoRA on lm_head is not supported: TRL reads the head's own weight. Leave lm_head out.")
    text = lora_summary(policy)
    if start:
        lora, base = policy.peft_config["default"], base_of(Path(start))
        text += f"; r {lora.r} and alpha {lora.lora_alpha} are those of {start}"
        text += "" if is_same_base(base, config) else f", which was trained on {base[0]}"
    return policy, text


def context(config: dict, tokenizer, prompts: DatasetDict, policy: PeftModel):
    limit = context_length(policy)
    longest = check_context([prompt for table in prompts.values() for prompt in table["prompt"]], tokenizer, config, limit)
    return longest, f"{longest} prompt + {config['max_completion_length']} completion tokens at most, of {limit}"


def batch(config: dict, prompts: DatasetDict):
    size, steps = config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
    world, group = cli.num_processes(), config["num_generations"]
    sampled = size * steps * world
    product = f"per_device_train_batch_size {size} x gradient_accumulation_steps {steps} x {world} process(es) = {sampled}"
    if sampled % group:
        multiple = group // math.gcd(group, steps * world)
        remedy = f"--per_device_train_batch_size {max(multiple, round(size / multiple) * multiple)}"
        raise UserError(f"{product} completions, not a multiple of num_generations {group}. Give {remedy}.")
    if len(prompts["train"]) < sampled // group:
        raise UserError(
            f"{product} completions take {sampled // group} prompts, and the train split has {len(prompts['train'])}. Raise "
            "num_generations, or lower one of the others."
        )
    return True, f"{sampled} completions an update = {sampled / group:g} prompts x {group}"


def rollout(config: dict, policy: PeftModel, device: torch.device):
    if device.type == "cuda":  # Triton compiles TRL's kernel for the log-probs of what was rolled out
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        if not (compiler and Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists()):
            raise UserError("training on a GPU needs a C compiler and Python.h: apt-get install gcc python3-dev")
    if is_sharded() and config["eval_prompts"]:
        raise UserError("with FSDP or ZeRO no process has all weights, so none can evaluate alone: give --eval_prompts 0.")
    if (kind := policy.config.model_type) in WRONG_LOG_PROBS:
        raise UserError(f"TRL computes other log-probs for {kind} models than they sample by. Take another base.")
    if config["use_vllm"]:
        if not _is_installed("vllm"):
            raise UserError(f"--use_vllm needs vLLM: {cli.python_command()} -m pip install 'trl[vllm]'. Or: --rollout auto.")
        return "vllm", f"vLLM, {config['vllm_mode']}"
    if is_sharded():
        return "generate", "generate: the weights are sharded over the processes"
    engine, reason = choose_engine(config["rollout"], policy, device)
    return engine, f"{engine}: {reason}"


def rewards(config: dict, tokenizer, prompts: DatasetDict):
    scorer = Scorer(tokenizer, config["target_tokens"], parse_rewards(config["rewards"]), config["format_regex"])
    target, room = config["target_tokens"], config["max_completion_length"]
    if scorer.has_target and room < 2 * target:
        raise UserError(
            f"max_completion_length is {room} and target_tokens {target}: answers need room to end late, so give at least "
            f"--max_completion_length {2 * target}, or at most --target_tokens {room // 2}."
        )
    tried = try_rewards(scorer, store.select_rows(prompts["train"], 1000, seed=0))
    parts = []
    for reward in scorer.chosen:
        if reward.name in tried:
            values = [score for score in tried[reward.name] if score is not None]
            text = f"{min(values):.2f} to {max(values):.2f} for references" if values else "scores none of the rows tried"
        else:
            text = reward.function.describe(config)
        parts.append(f"{reward.name} x {reward.weight:g} ({text})")
    return scorer, "; ".join(parts) + f"; target {target} tokens" * scorer.has_target


def memory(config: dict, policy: PeftModel, longest: int, device, dtype, scorer: Scorer, engine: str):
    reward_models = sum(model.extra_bytes(config, dtype) for model in scorer.models)
    free = free_memory(device)

    def parts_of(config: dict) -> dict[str, int]:
        return estimate(config, policy, longest, device, dtype, free, reward_models)

    return parts_of(config), _memory_text(config, parts_of, lambda parts: peak(parts, engine), free, "rollout_batch_size")


def pair_memory(config: dict, policy: PeftModel, longest: int, device, dtype):
    """Both replies of a pair are in one forward pass."""

    def parts_of(config: dict) -> dict[str, int]:
        return update_estimate(config, policy, 2 * config["per_device_train_batch_size"] * longest, device, dtype)

    free = free_memory(device)
    return parts_of(config), _memory_text(config, parts_of, lambda parts: sum(parts.values()), free, "reward_max_length")


def _memory_text(
    config: dict, parts_of: Callable[[dict], dict], total: Callable[[dict], int], free: int, last_resort: str
) -> str:
    """The estimate in words, and where it does not fit the largest batch, by halves, that does, or else the `last_resort`."""
    parts = parts_of(config)
    listing = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    text = f"about {total(parts) / GB:.2f} GB ({listing}), of {free / GB:.1f} GB free"
    if total(parts) <= free:
        return text
    size, steps = config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
    while size % 2 == 0:
        size, steps = size // 2, steps * 2
        smaller = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        if total(parts_of({**config, **smaller})) <= free:
            flags = " ".join(f"--{key} {value}" for key, value in smaller.items())
            return f"{text}\n{MAY_NOT_FIT}; this does: {flags}"
    return f"{text}\n{MAY_NOT_FIT}, nor a smaller batch: lower --{last_resort}, or take a smaller base"


def disk(config: dict, policy: PeftModel, output: Path):
    _, trainable, _ = lora_counts(policy)
    # A checkpoint is adapter and two Adam moments in float32; one more is written before the oldest goes.
    need = trainable * 4 * 3 * (config["save_total_limit"] + 1) + trainable * 4
    path = files.nearest_existing(output)
    free = shutil.disk_usage(path).free
    if need > free:
        raise UserError(f"checkpoints need {need / GB:.2f} GB, {path} has {free / GB:.2f} GB free. Make room there.")
    return True, f"{need / GB:.2f} GB for checkpoints, of {free / GB:.1f} GB free"
