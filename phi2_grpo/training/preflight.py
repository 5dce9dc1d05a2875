"""Everything that can be wrong with a training run, looked at before anything slow starts."""

import importlib.metadata
import math
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.table import Table
from rich.text import Text
from transformers.utils import is_triton_available

from phi2_grpo.common import cli
from phi2_grpo.common.cli import UserError
from phi2_grpo.common.console import make_table
from phi2_grpo.data import store
from phi2_grpo.data.store import first_rows
from phi2_grpo.models.base import (
    base_of_adapter,
    choose_device,
    commit_of,
    context_length,
    is_same_base,
    is_sharded,
    meta_model,
    resolve_model,
)
from phi2_grpo.models.lora import lora_config, lora_counts, lora_summary, meta_lora_model
from phi2_grpo.models.tokenizer import check_context, check_vocabulary, load_tokenizer
from phi2_grpo.rewards.collapse import WINDOW
from phi2_grpo.rewards.reward_model import render_conversations
from phi2_grpo.rewards.scorer import Scorer, choose_rewards, describe_rewards, try_rewards
from phi2_grpo.rollout.cache import free_memory
from phi2_grpo.rollout.engine import choose_engine
from phi2_grpo.training import checkpoints, memory, outputs, places
from phi2_grpo.training.trainer import mixed_precision

GB = 1e9


class Checklist:
    """Runs checks one after another, keeps what each found or complained of, and shows all of it as one table."""

    def __init__(self):
        self.rows: list[tuple[str, bool, str]] = []

    def run(self, name: str, check: Callable, *arguments):
        """`check(*arguments)` returns (value, what was found); returns the value, or None where it raised a UserError.

        A check that needs the value of one that failed is passed over.
        """
        if any(argument is None for argument in arguments):
            return None
        try:
            value, found = check(*arguments)
        except UserError as error:
            self.rows.append((name, False, str(error)))
            return None
        self.rows.append((name, True, found))
        return value

    def table(self) -> Table:
        table = make_table("Before the start", "check", "", "found", words=(0, 1, 2))
        for name, good, found in self.rows:
            table.add_row(name, Text("ok", "green") if good else Text("no", "red"), found if good else "see below")
        return table

    def complain(self) -> None:
        """Raise a UserError with every complaint, if there is any."""
        if complaints := [f"{name}: {found}" for name, good, found in self.rows if not good]:
            raise UserError("\n".join(complaints))


@dataclass
class Preflight:
    """What was checked and loaded for a GRPO run."""

    device: torch.device
    dtype: torch.dtype
    tokenizer: object
    prompts: object
    funnel: dict
    scorer: Scorer
    lora: LoraConfig
    memory: dict
    checks: Checklist

    def table(self) -> Table:
        return self.checks.table()

    def raise_errors(self) -> None:
        self.checks.complain()


def preflight(config: dict, resume: bool, overwrite: bool) -> Preflight:
    """Check a GRPO run. Returns the checklist and what was loaded: device, dtype, tokenizer, prompts, funnel, scorer,
    the LoRA without weights and the memory plan."""
    checks = Checklist()
    device = checks.run("device", _device, config)
    if device and device[0].type == "cuda" and is_triton_available():
        checks.run("compiler", _compiler)
    output, final = Path(config["output_dir"]), checkpoints.final_folder(config)
    checks.run("output folder", places.for_a_run, output, final, "rewards", resume, overwrite)
    checks.run("settings", _settings, config)
    checks.run("tracker", _tracker, config)
    tokenizer = checks.run("base model", _tokenizer, config)
    prompts, funnel = checks.run("data", _data, config, tokenizer) or (None, None)
    wrapped = checks.run("LoRA", _lora, config, tokenizer)
    longest = checks.run("context", _context, config, tokenizer, prompts, wrapped)
    checks.run("batch", _batch, config, prompts)
    scorer = checks.run("rewards", _rewards, config, tokenizer, prompts)
    if resume and device and scorer:
        facts = {**_content(config, device[1]), "rewards": describe_rewards(scorer.chosen)}
        checks.run("same run", places.same_run, config, output, funnel, config["max_steps"], facts)
    engine = checks.run("rollout", _rollout, config, wrapped)
    parts = checks.run("memory", _memory, config, wrapped, longest, device, scorer, engine)
    checks.run("disk", _disk, config, wrapped, output)
    where, dtype = device or (None, None)
    lora = None
    if wrapped and config["init_adapter"]:
        lora = LoraConfig.from_pretrained(config["init_adapter"])
        lora.inference_mode, lora.revision = False, resolve_model(config)[1]
    elif wrapped:
        lora = lora_config(config, meta_model(config))
    return Preflight(where, dtype, tokenizer, prompts, funnel, scorer, lora, parts, checks)


def preflight_reward(config: dict, resume: bool, overwrite: bool) -> tuple[Checklist, dict]:
    """The same for the training of a reward model; loads device, dtype, tokenizer, pairs, funnel, steps and left_out."""
    if cli.num_processes() > 1:
        raise UserError("train_reward.py runs in one process: start it with python, not with accelerate launch or torchrun.")
    checks = Checklist()
    device = checks.run("device", _device, config)
    output, final = checkpoints.reward_run_folder(config), Path(config["reward_dir"])
    checks.run("output folder", places.for_a_run, output, final, "scores", resume, overwrite)
    checks.run("tracker", _tracker, config)
    tokenizer = checks.run("base model", _tokenizer, config)
    found = checks.run("data", _pairs, config, tokenizer) or {}
    if resume and device:
        facts = _content(config, device[1])
        checks.run("same run", places.same_run, config, output, found.get("funnel"), found.get("steps"), facts)
    wrapped = checks.run("LoRA", _lora, {**config, "init_adapter": ""}, tokenizer)
    checks.run("memory", _pair_memory, config, wrapped, found.get("longest"), device)
    checks.run("disk", _disk, config, wrapped, output)
    return checks, {"device": device, "tokenizer": tokenizer, **found}


def _content(config: dict, dtype: torch.dtype) -> dict:
    """What a setting may come to mean anew, as run.json has it."""
    return {"dtype": str(dtype).removeprefix("torch."), "model_commit": commit_of(config)}


def _device(config: dict):
    device, dtype = choose_device(config)
    ours, theirs = mixed_precision(device, dtype), os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if theirs not in ("no", ours):
        raise UserError(
            f"the launcher or the environment asks for mixed precision {theirs} (ACCELERATE_MIXED_PRECISION), and --dtype "
            f"{config['dtype']} on this device trains with {ours}. Leave it out there (accelerate launch --mixed_precision no)"
            + (", or give --dtype bfloat16." if theirs == "bf16" and device.type == "cuda" else ".")
        )
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"{gpus} GPUs are visible to one process. Use one: CUDA_VISIBLE_DEVICES=0 python ...; "
            "or all, for train_grpo.py: accelerate launch --multi_gpu ..."
        )
    return (device, dtype), f"{outputs.hardware_name(device)}, {str(dtype).removeprefix('torch.')}"


def _compiler():
    """TRL's log-probs are a Triton kernel, which is compiled at its first use: in the first step, after all else is loaded."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("clang", "gcc", "cc"))), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    lacks = [name for name, there in (("a C compiler", compiler), (str(header), header.is_file())) if not there]
    if lacks:
        raise UserError(
            f"Triton compiles the log-prob kernel at its first use, and needs {' and '.join(lacks)}. Debian and Ubuntu: "
            "apt-get install gcc python3-dev. Elsewhere: a C compiler, and the headers of this Python."
        )
    return True, f"{compiler}, and Python.h: Triton's kernels can be built"


def is_installed(package: str) -> bool:
    """Whether pip knows it: a folder of its name in the working directory would import as well."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _tracker(config: dict):
    package = config["report_to"]
    if package != "none" and not is_installed(package):
        raise UserError(f"--report_to {package} needs a package that is not installed: pip install {package}. Or: none.")
    return True, package


def _settings(config: dict):
    target, room = config["target_tokens"], config["max_completion_length"]
    if room < 2 * target:
        raise UserError(
            f"max_completion_length is {room} and target_tokens {target}: answers need room to end late, so give at least "
            f"--max_completion_length {2 * target}, or at most --target_tokens {room // 2}."
        )
    reach = config["save_steps"] * (config["save_total_limit"] - 1)
    if config["stop_on_collapse"] and reach < WINDOW:
        raise UserError(
            f"stop_on_collapse needs a checkpoint from {WINDOW} steps before, but save_steps {config['save_steps']} x "
            f"(save_total_limit {config['save_total_limit']} - 1) reaches back {reach}. Raise one of them."
        )
    if config["learning_rate"] < 2e-6:
        return True, f"learning_rate {config['learning_rate']:g} is so low that {config['max_steps']} steps may change nothing"
    return True, f"{config['max_steps']} steps at learning rate {config['learning_rate']:g}, target {target} tokens"


def _tokenizer(config: dict):
    tokenizer = load_tokenizer(config)
    return tokenizer, f"{config['model']}, {len(tokenizer):,} tokens"


def _data(config: dict, tokenizer):
    prompts, funnel, notes = store.load_prompts(config, tokenizer)
    if not len(prompts["train"]):
        again = cli.prepare_command(config, overwrite=True)
        raise UserError(f"{config['data_dir']} has no train prompt. Make it again, with others: {again}")
    counts = f"{len(prompts['train']):,} train and {len(prompts['validation']):,} validation prompts"
    return (prompts, funnel), ". ".join([counts, *notes])


def _pairs(config: dict, tokenizer):
    pairs, funnel, notes = store.load_preferences(config, tokenizer)
    for split, table in pairs.items():
        if not len(table):
            raise UserError(
                f"{config['data_dir']} has no ranked pair of replies in its {split} split: a reward model learns from pairs "
                "that people ranked, and is measured on others. Prepare a source that has ranks, with a --validation_fraction."
            )
    table = pairs["train"]
    texts = [render_conversations(tokenizer, table["prompt"], [reply[0]["content"] for reply in table[side]])
             for side in ("chosen", "rejected")]  # fmt: skip
    lengths = [[len(ids) for ids in tokenizer(side, add_special_tokens=False)["input_ids"]] for side in texts]
    fits = [i for i, both in enumerate(zip(*lengths, strict=True)) if max(both) <= config["reward_max_length"]]
    left_out = len(pairs["train"]) - len(fits)
    if not fits:
        raise UserError(f"no pair has at most {config['reward_max_length']} tokens. Raise --reward_max_length.")
    pairs["train"] = pairs["train"].select(fits)
    update = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    steps = config["reward_epochs"] * math.ceil(len(fits) / update)
    text = (
        f"{len(fits):,} train and {len(pairs['validation']):,} validation pairs, ties of rank left out"
        f"{f', {left_out:,} too long' if left_out else ''}; {steps} updates of {update} pairs"
    )
    if len(pairs["validation"]) < 50:
        notes = [*notes, "So few validation pairs say little: the intervals will be wide"]
    longest = max(max(side[i] for side in lengths) for i in fits)
    found = {"pairs": pairs, "funnel": funnel, "steps": steps, "left_out": left_out, "longest": longest}
    return found, ". ".join([text, *notes])


def _lora(config: dict, tokenizer):
    if config["init_adapter"] and Path(config["init_adapter"]).resolve().is_relative_to(Path(config["output_dir"]).resolve()):
        raise UserError(
            f"--init_adapter {config['init_adapter']} lies in output_dir, whose checkpoints go as new ones come. "
            "Choose another --output_dir."
        )
    wrapped = meta_lora_model(config)
    check_vocabulary(tokenizer, wrapped)
    if isinstance(wrapped.get_output_embeddings(), BaseTunerLayer):
        raise UserError("LoRA on lm_head is not supported: TRL reads the head's own weight. Leave lm_head out.")
    found = lora_summary(wrapped)
    if config["init_adapter"]:
        lora = wrapped.peft_config["default"]
        found += f"; r {lora.r} and alpha {lora.lora_alpha} are those of {config['init_adapter']}"
        if not is_same_base(named := base_of_adapter(Path(config["init_adapter"])), config):
            found += f", which was trained on {named[0]}"
    return wrapped, found


def _context(config: dict, tokenizer, prompts, wrapped: PeftModel):
    context = context_length(wrapped)
    longest = check_context([prompt for table in prompts.values() for prompt in table["prompt"]], tokenizer, config, context)
    return longest, f"{longest} prompt + {config['max_completion_length']} completion tokens at most, of {context}"


def _batch(config: dict, prompts):
    world = cli.num_processes()
    size, passes, group = (config[k] for k in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"))
    sampled = size * passes * world
    if sampled % group:
        valid = [n for n in range(2, sampled + 1) if sampled % n == 0]
        nearest = sorted(sorted(valid, key=lambda n: abs(n - group))[:2])
        fewer = f"--num_generations {' or '.join(map(str, nearest))}, or " if nearest else ""
        up = group // math.gcd(group, passes * world)
        raise UserError(
            f"per_device_train_batch_size {size} x gradient_accumulation_steps {passes} x {world} process(es) = {sampled} "
            f"completions, not a multiple of num_generations {group}. Give {fewer}"
            f"--per_device_train_batch_size {max(up, round(size / up) * up)}."
        )
    if len(prompts["train"]) < sampled // group:
        raise UserError(
            f"{sampled // group} prompts are sampled at once, but the train split has {len(prompts['train'])}. Raise "
            "num_generations or lower per_device_train_batch_size x gradient_accumulation_steps."
        )
    return True, f"{sampled} completions an update = {sampled / group:g} prompts x {group}"


def _rollout(config: dict, wrapped: PeftModel):
    if config["use_vllm"]:
        if not is_installed("vllm"):
            raise UserError(
                "--use_vllm needs vLLM, which is not installed: pip install trl[vllm]. Without it: --rollout auto, no second "
                "copy of the weights."
            )
        return "vllm", f"vLLM, {config['vllm_mode']}"
    if is_sharded():
        if config["eval_prompts"]:
            raise UserError(
                "with FSDP or ZeRO no process has the whole base, so none can evaluate alone: give --eval_prompts 0."
            )
        if config["stop_on_collapse"]:
            raise UserError("with FSDP or ZeRO no process can take up an earlier checkpoint: leave --stop_on_collapse out.")
        return "generate", "generate: the weights are spread over the processes"
    engine, why = choose_engine(config["rollout"], wrapped)
    return engine, f"{engine}: {why}"


def _rewards(config: dict, tokenizer, prompts):
    chosen = choose_rewards(config["rewards"])
    scorer = Scorer(tokenizer, config["target_tokens"], chosen)
    found = try_rewards(scorer, first_rows(prompts))
    parts = []
    for reward in chosen:
        if reward.name in found:
            values = [score for score in found[reward.name] if score is not None]
            scored = f"{min(values):.2f} to {max(values):.2f} for human replies" if values else "scores none of the first rows"
        else:
            scored = reward.function.describe(config)
        sign = ", negative: it is paid for less of it" if reward.weight < 0 else ""
        parts.append(f"{reward.name} x {reward.weight:g} ({scored}{sign})")
    return scorer, "; ".join(parts)


def _memory(config: dict, wrapped: PeftModel, longest: int, device: tuple[torch.device, torch.dtype], scorer: Scorer, engine):
    where, dtype = device
    judges = sum(judge.extra_bytes(config, dtype) for judge in scorer.models)
    free = free_memory(where)
    parts = memory.estimate(config, wrapped, longest, where, dtype, free, judges)
    peak = memory.peak(parts, engine)
    text = _listing(parts, peak, free)
    if where.type == "cuda":
        largest = memory.largest_preset(wrapped, longest, where, dtype, free)
        text += f". Largest preset that fits: {largest or 'none'}"
    if peak > free:
        text += (
            "\nThis may not fit: lower per_device_train_batch_size (and raise gradient_accumulation_steps as much), "
            "rollout_batch_size or max_completion_length"
        )
    return parts, text


def _listing(parts: dict[str, int], peak: int, free: int) -> str:
    listing = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    return f"about {peak / GB:.2f} GB ({listing}), of {free / GB:.1f} GB free"


def _pair_memory(config: dict, wrapped: PeftModel, longest: int, device: tuple[torch.device, torch.dtype]):
    """Of a reward model's training: both replies of a pair are in one pass."""
    where, dtype = device
    parts = memory.update_estimate(config, wrapped, 2 * config["per_device_train_batch_size"] * longest, where, dtype)
    peak, free = sum(parts.values()), free_memory(where)
    text = _listing(parts, peak, free)
    if peak > free:
        text += (
            "\nThis may not fit: lower per_device_train_batch_size (and raise gradient_accumulation_steps as much) or "
            "reward_max_length"
        )
    return parts, text


def _disk(config: dict, wrapped: PeftModel, output: Path):
    _, trainable, _ = lora_counts(wrapped)
    return places.room(config, trainable, output)
