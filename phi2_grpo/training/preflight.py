"""What a training run needs, checked before anything slow starts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import DatasetDict
from peft import LoraConfig
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from phi2_grpo.common.cli import UserError
from phi2_grpo.common.console import make_table
from phi2_grpo.rewards.scorer import Scorer, describe_rewards
from phi2_grpo.training import checkpoints, checks


class Check(NamedTuple):
    name: str
    ok: bool
    text: str


@dataclass
class Preflight:
    """Checks, one after another, and what they loaded: None where a check failed, and for a run of the other kind."""

    results: list[Check] = field(default_factory=list)
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    tokenizer: PreTrainedTokenizerFast | None = None
    funnel: dict | None = None
    # Of a GRPO run.
    prompts: DatasetDict | None = None
    lora: LoraConfig | None = None
    scorer: Scorer | None = None
    memory: dict[str, int] | None = None  # estimated bytes by part
    # Of the training of a reward model.
    pairs: DatasetDict | None = None
    steps: int | None = None  # optimizer steps
    left_out: int | None = None  # pairs that are too long

    def run(self, name: str, check: Callable, *inputs):
        """The value of `check(*inputs)`, which returns (value, text). None where it raises a UserError, or where an input is
        None because its own check failed."""
        if any(value is None for value in inputs):
            return None
        try:
            value, text = check(*inputs)
        except UserError as error:
            self.results.append(Check(name, False, str(error)))
            return None
        self.results.append(Check(name, True, text))
        return value

    def table(self) -> Table:
        ok, unsure, no = Text("ok", "green"), Text("?", "yellow"), Text("no", "red")
        rows = [(each.name, no if not each.ok else unsure if checks.MAY_NOT_FIT in each.text else ok, each.text)
                for each in self.results]  # fmt: skip
        return make_table("Preflight", "check", "", "", rows=rows, words=(0, 1, 2))

    def raise_errors(self) -> None:
        """Raise a UserError with the text of every check that failed."""
        if errors := [f"{check.name}: {check.text}" for check in self.results if not check.ok]:
            raise UserError("\n".join(errors))


def preflight(config: dict, resume: bool, overwrite: bool) -> Preflight:
    """Check a GRPO run and load what is small: everything but the base's weights."""
    ready = Preflight()
    output, final = Path(config["output_dir"]), checkpoints.final_folder(config)
    ready.device, ready.dtype = ready.run("device", checks.device, config) or (None, None)
    ready.run("output folder", checks.output_folder, output, final, "rewards", resume, overwrite)
    ready.run("settings", checks.settings, config)
    ready.run("tracker", checks.tracker, config)
    ready.tokenizer = ready.run("base model", checks.tokenizer, config)
    ready.prompts, ready.funnel = ready.run("data", checks.prompts, config, ready.tokenizer) or (None, None)
    policy = ready.run("LoRA", checks.lora, config, ready.tokenizer)
    ready.lora = policy and policy.peft_config["default"]
    longest = ready.run("context", checks.context, config, ready.tokenizer, ready.prompts, policy)
    ready.run("batch", checks.batch, config, ready.prompts)
    ready.scorer = ready.run("rewards", checks.rewards, config, ready.tokenizer, ready.prompts)
    if resume and ready.scorer:
        rewards = {"rewards": describe_rewards(ready.scorer.chosen)}
        ready.run("same run", checks.same_run, config, output, ready.funnel, ready.dtype, config["max_steps"], rewards)
    engine = ready.run("rollout", checks.rollout, config, policy, ready.device)
    ready.memory = ready.run("memory", checks.memory, config, policy, longest, ready.device, ready.dtype, ready.scorer, engine)
    ready.run("disk", checks.disk, config, policy, output)
    return ready


def preflight_reward(config: dict, resume: bool, overwrite: bool) -> Preflight:
    ready = Preflight()
    output, final = checkpoints.reward_run_folder(config), Path(config["reward_dir"])
    ready.device, ready.dtype = ready.run("device", checks.device, config) or (None, None)
    ready.run("output folder", checks.output_folder, output, final, "scores", resume, overwrite)
    ready.run("tracker", checks.tracker, config)
    ready.tokenizer = ready.run("base model", checks.tokenizer, config)
    data = ready.run("data", checks.pairs, config, ready.tokenizer) or (None,) * 5
    ready.pairs, ready.funnel, ready.steps, ready.left_out, longest = data
    if resume:
        ready.run("same run", checks.same_run, config, output, ready.funnel, ready.dtype, ready.steps, {})
    ready.run("reward head", checks.reward_head, config)
    policy = ready.run("LoRA", checks.lora, {**config, "init_adapter": ""}, ready.tokenizer)
    ready.run("memory", checks.pair_memory, config, policy, longest, ready.device, ready.dtype)
    ready.run("disk", checks.disk, config, policy, output)
    return ready
