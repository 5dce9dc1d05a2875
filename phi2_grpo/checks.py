"""Everything that can be wrong with a training run, looked at before anything slow starts."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from rich.table import Table

from phi2_grpo import data, files, model
from phi2_grpo.chat import count_tokens
from phi2_grpo.cli import UserError
from phi2_grpo.loading import load_tokenizer
from phi2_grpo.rewards import Scorer, try_rewards

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
        table = Table("check", "", "found", title="Before the start", title_justify="left")
        for name, good, found in self.rows:
            table.add_row(name, "[green]ok[/]" if good else "[red]no[/]", found.replace("[", "\\["))
        return table

    def complain(self) -> None:
        """Raise a UserError with every complaint, if there is any."""
        if complaints := [f"{name}: {found}" for name, good, found in self.rows if not good]:
            raise UserError("\n".join(complaints))


def preflight(config: dict, resume: bool, overwrite: bool) -> tuple[Checklist, dict]:
    """Check a training run. Returns the checklist and what was loaded: device, dtype, tokenizer, prompts, funnel, scorer."""
    checks = Checklist()
    device = checks.run("device", _device, config)
    checks.run("output folder", _output, config, resume, overwrite)
    checks.run("settings", _settings, config)
    tokenizer = checks.run("base model", _tokenizer, config)
    prompts, funnel = checks.run("data", _data, config, tokenizer) or (None, None)
    wrapped = checks.run("LoRA", _lora, config) if tokenizer else None
    longest = checks.run("context", _context, config, tokenizer, prompts, wrapped)
    checks.run("batch", _batch, config, prompts)
    scorer = Scorer(tokenizer, config["target_tokens"]) if tokenizer else None
    checks.run("rewards", _rewards, scorer, prompts)
    checks.run("memory", _memory, config, wrapped, longest, device)
    checks.run("disk", _disk, config, wrapped)
    found = {"device": device, "tokenizer": tokenizer, "prompts": prompts, "funnel": funnel, "scorer": scorer}
    return checks, found


def _device(config: dict):
    device, dtype = model.choose_device(config)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"{gpus} GPUs are visible to one process. Use one: CUDA_VISIBLE_DEVICES=0 python train_grpo.py ..., "
            "or all: accelerate launch train_grpo.py ..."
        )
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (device, dtype), f"{name}, {str(dtype).removeprefix('torch.')}"


def final_folder(config: dict) -> Path:
    """Where the finished adapter goes."""
    output = Path(config["output_dir"])
    if not output.name:  # "." or "/"
        output = output.resolve()
    return output.with_name(f"{output.name}-final")


def remove_run(output: Path) -> None:
    """Remove what a run wrote into its folder, and nothing else: the folder may be any of the user's."""
    for checkpoint in output.glob("checkpoint-*"):
        if checkpoint.name.removeprefix("checkpoint-").isdecimal():
            shutil.rmtree(checkpoint)
    (output / "metrics.jsonl").unlink(missing_ok=True)


def whole_checkpoints(output_dir: str) -> list[Path]:
    """The checkpoints that were written to their end, oldest first: run.json is the last file of each."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    whole = [path for path in found if (path / "run.json").is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _output(config: dict, resume: bool, overwrite: bool):
    output, final = Path(config["output_dir"]), final_folder(config)
    files.check_writable(output)
    files.check_writable(final)
    checkpoints = whole_checkpoints(config["output_dir"])
    # Only what cost time to make counts as a run: a first checkpoint that was never finished does not.
    run = checkpoints[-1] if checkpoints else final if final.exists() else None
    if resume:
        return output, f"resuming at {checkpoints[-1].name}" if checkpoints else "no whole checkpoint: starting at step 0"
    if run and not overwrite:
        raise UserError(f"{run} holds a run. Go on with it: --resume; replace it: --overwrite; or choose an --output_dir.")
    return output, f"{output}{', replacing the run there' if run else ''}"


def _settings(config: dict):
    target, room = config["target_tokens"], config["max_completion_length"]
    if room < 2 * target:
        raise UserError(
            f"max_completion_length is {room} and target_tokens {target}: answers need room to end late, so give at least "
            f"--max_completion_length {2 * target}, or at most --target_tokens {room // 2}."
        )
    if config["learning_rate"] < 2e-6:
        return True, f"learning_rate {config['learning_rate']:g} is so low that {config['max_steps']} steps may change nothing"
    return True, f"{config['max_steps']} steps at learning rate {config['learning_rate']:g}, target {target} tokens"


def _tokenizer(config: dict):
    tokenizer = load_tokenizer(config)
    return tokenizer, f"{config['model']}, {len(tokenizer):,} tokens"


def _data(config: dict, tokenizer):
    prompts, funnel, notes = data.load_prompts(config, tokenizer)
    if not len(prompts["train"]):
        raise UserError(f"{config['data_dir']} has no train prompt. Make it again: python prepare_data.py --overwrite")
    counts = f"{len(prompts['train']):,} train and {len(prompts['validation']):,} validation prompts"
    return (prompts, funnel), ". ".join([counts, *notes])


def _lora(config: dict):
    if config["init_adapter"]:
        model.check_adapter(config["init_adapter"])
    wrapped = model.wrap_empty(config)
    return wrapped, model.describe_coverage(wrapped)


def _context(config: dict, tokenizer, prompts, wrapped: PeftModel):
    longest = max(count_tokens(tokenizer, [prompt for table in prompts.values() for prompt in table["prompt"]]))
    context = wrapped.config.max_position_embeddings
    if longest + config["max_completion_length"] > context:
        raise UserError(
            f"the longest prompt has {longest} tokens; with max_completion_length {config['max_completion_length']} that is "
            f"more than the context of {context}. Give at most --max_completion_length {max(0, context - longest)}, or "
            "prepare the data with a smaller --max_prompt_tokens."
        )
    return longest, f"{longest} prompt + {config['max_completion_length']} completion tokens at most, of {context}"


def _batch(config: dict, prompts):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    size, steps, group = (config[k] for k in ("per_device_train_batch_size", "steps_per_generation", "num_generations"))
    sampled = size * steps * world
    if sampled % group:
        valid = [n for n in range(2, sampled + 1) if sampled % n == 0]
        nearest = sorted(valid, key=lambda n: abs(n - group))[:2]
        up = group // math.gcd(group, steps * world)
        raise UserError(
            f"per_device_train_batch_size {size} x steps_per_generation {steps} x {world} process(es) = {sampled} completions, "
            f"not a multiple of num_generations {group}. Give --num_generations {' or '.join(map(str, sorted(nearest)))}, or "
            f"--per_device_train_batch_size {max(up, round(size / up) * up)}."
        )
    if len(prompts["train"]) < sampled // group:
        raise UserError(
            f"{sampled // group} prompts are sampled at once, but the train split has {len(prompts['train'])}. Raise "
            "num_generations or lower per_device_train_batch_size x steps_per_generation."
        )
    update = size * config["gradient_accumulation_steps"] * world
    return True, f"{update} completions an update = {update / group:g} prompts x {group}; {sampled} sampled at once"


def _rewards(scorer: Scorer, prompts):
    found = try_rewards(scorer, prompts["train"].select(range(min(8, len(prompts["train"])))).to_list())
    parts = []
    for name, scores in found.items():
        values = [score for score in scores if score is not None]
        parts.append(f"{name} {min(values):.2f} to {max(values):.2f}" if values else f"{name} scores none of them")
    return True, "human replies to real prompts score: " + ", ".join(parts)


def memory_plan(config: dict, wrapped: PeftModel, longest_prompt: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes by part. The first two stay; cache and activations take turns, so the larger of the two counts.

    Activations are an estimate: about 100 bytes per token, layer and hidden unit for a Phi layer with LoRA in bfloat16
    (inputs of every linear layer, and float32 copies of them for the adapter).
    """
    base = wrapped.config
    _, trainable, parameters = model.coverage(wrapped)
    width = dtype.itemsize
    heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
    per_token = 2 * base.num_hidden_layers * heads * (base.hidden_size // base.num_attention_heads) * width
    length = longest_prompt + config["max_completion_length"]
    batch = config["per_device_train_batch_size"]
    tokens = batch * length
    layer = 50 * width * tokens * base.hidden_size
    kept = width * tokens * base.hidden_size * base.num_hidden_layers
    return {
        "weights": parameters * width,
        "adapter, gradient, Adam": trainable * 4 * 4,
        "KV cache": batch * config["steps_per_generation"] * length * per_token,
        "activations": kept + layer if config["activation_checkpointing"] else layer * base.num_hidden_layers,
    }


def _memory(config: dict, wrapped: PeftModel, longest: int, device: tuple[torch.device, torch.dtype]):
    plan = memory_plan(config, wrapped, longest, device[1])
    need = plan["weights"] + plan["adapter, gradient, Adam"] + max(plan["KV cache"], plan["activations"])
    if device[0].type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in plan.items())
    text = f"about {need / GB:.2f} GB ({parts}), of {free / GB:.1f} GB free"
    if need > free:
        text += "\nThis may not fit: lower steps_per_generation (cache), per_device_train_batch_size or max_completion_length"
    return True, text


def _disk(config: dict, wrapped: PeftModel):
    _, trainable, _ = model.coverage(wrapped)
    # A checkpoint is adapter and two Adam moments in float32; one more is written before the oldest goes.
    need = trainable * 4 * 3 * (config["save_total_limit"] + 1) + trainable * 4
    path = files.nearest_existing(Path(config["output_dir"]))
    free = shutil.disk_usage(path).free
    if need > free:
        raise UserError(f"checkpoints need {need / GB:.2f} GB, {path} has {free / GB:.2f} GB free. Make room there.")
    return True, f"{need / GB:.2f} GB for checkpoints, of {free / GB:.1f} GB free"
