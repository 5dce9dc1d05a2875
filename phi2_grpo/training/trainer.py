"""TRL's trainers, with our rollout, a clock and checkpoints that are whole or not there."""

import time
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import torch
from trl import GRPOTrainer, RewardTrainer
from trl.trainer.utils import RepeatSampler

from phi2_grpo.common import progress
from phi2_grpo.training.checkpoints import WholeCheckpoints


def mixed_precision(device: torch.device, dtype: torch.dtype) -> str:
    """What accelerate is to train with: bf16 autocast over a bfloat16 base on a card; it fails in a CPU's layer norm."""
    return "bf16" if dtype.itemsize == 2 and device.type == "cuda" else "no"


def training_arguments(kind: type, config: dict, device: torch.device, dtype: torch.dtype, **own):
    """A `kind` (GRPOConfig, RewardConfig) of those keys of `config` that are its fields, and of `own`."""
    known = {field.name for field in fields(kind)}
    settings = {key: value for key, value in config.items() if key in known and value != ""}
    settings |= {
        "bf16": mixed_precision(device, dtype) == "bf16",
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "logging_steps": 1,
        "disable_tqdm": True,
        "trackio_static_space_id": False,  # stay on this machine
    }
    settings |= own
    return kind(**{"run_name": Path(settings["output_dir"]).name, **settings})


class _Logged(WholeCheckpoints):
    """Mixed into a trainer: what it prints, and what it completes its checkpoints with, is ours."""

    def add_run_callback(self, watch) -> None:
        """`watch`: a Watch (monitor.py)."""
        self.watch, self.complete = watch, watch.complete
        self.add_callback(watch)
        progress.silence_printing(self)

    def create_model_card(self, *_, **__) -> None:
        """Not TRL's: ours is written with each checkpoint."""


class EpochSampler(RepeatSampler):
    """TRL's, with the order of an epoch fixed by seed and epoch: TRL's own generator is in no checkpoint, so that a run resumed
    after an epoch would begin the first order again."""

    epoch = 0

    def __iter__(self):
        self.generator.manual_seed(self.seed + 1_000_003 * self.epoch)
        return super().__iter__()


class Trainer(_Logged, GRPOTrainer):
    """Rolls out with `engine` (rollout.py) where it is set, and logs where the seconds of a step went.

    `seconds/rollout`, `rewards`, `log_probs` (of the reference) and `update` (forward and backward); the optimizer itself,
    which comes after them, is in none. `failed_in` is the part that an exception came out of. The private methods are
    TRL's; a test holds their names.
    """

    engine = None
    failed_in: str | None = None

    def __init__(self, *arguments, **keywords):
        self._spent: dict[str, float] = defaultdict(float)
        self._depth = 0  # a part inside another is the outer's
        super().__init__(*arguments, **keywords)

    def _timed(self, part: str, method, *arguments, **keywords):
        started, self._depth = self._now(), self._depth + 1
        try:
            return method(*arguments, **keywords)
        except BaseException:
            self.failed_in = self.failed_in or part
            raise
        finally:
            self._depth -= 1
            if not self._depth:
                self._spent[part] += self._now() - started

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels run on behind the host; a few waits a step cost nothing
        return time.perf_counter()

    def _get_train_sampler(self, dataset=None) -> EpochSampler:
        found = super()._get_train_sampler(dataset)
        shape = (found.mini_repeat_count, found.batch_size, found.repeat_count)
        self.sampler = EpochSampler(found.data_source, *shape, seed=found.seed)
        return self.sampler

    def _run_epoch(self, *arguments, epoch: int, **keywords):
        # Here and not by `set_epoch`, which accelerate does not pass on through all that it wraps a sampler in.
        self.sampler.epoch = epoch
        return super()._run_epoch(*arguments, epoch=epoch, **keywords)

    def _generate_single_turn(self, prompt_ids, *arguments, **keywords):
        """TRL's: token ids of the prompts, a group's next to each other, to (completion ids, log-probs or None)."""
        if self.engine is None:
            return self._timed("rollout", super()._generate_single_turn, prompt_ids, *arguments, **keywords)
        return self._timed("rollout", self.engine, prompt_ids, self.generation_config), None

    def _calculate_rewards(self, *arguments, **keywords):
        return self._timed("rewards", super()._calculate_rewards, *arguments, **keywords)

    def _get_per_token_logps_and_entropies(self, *arguments, **keywords):
        method = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():  # the forward pass of the update
            return method(*arguments, **keywords)
        return self._timed("log_probs", method, *arguments, **keywords)

    def training_step(self, *arguments, **keywords):
        started, inside = self._now(), sum(self._spent.values()) - self._spent["update"]
        loss = super().training_step(*arguments, **keywords)
        others = sum(self._spent.values()) - self._spent["update"] - inside
        self._spent["update"] += self._now() - started - others
        return loss

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if self._spent:
            logs.update({f"seconds/{part}": round(seconds, 4) for part, seconds in self._spent.items()})
            self._spent.clear()
        super().log(logs, start_time)


class RewardModelTrainer(_Logged, RewardTrainer):
    """For a reward model."""

    failed_in = "reward update"
