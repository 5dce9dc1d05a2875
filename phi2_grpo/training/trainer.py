"""TRL's trainers with our rollouts, updates without padding, and an exit that says why a run ended.

All that overrides private methods of TRL or transformers is in this file.
"""

import logging
import os
from dataclasses import fields
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import load_peft_weights, set_peft_model_state_dict
from transformers import TrainerState
from trl import GRPOTrainer, RewardTrainer
from trl.trainer.utils import RepeatSampler

from phi2_grpo.common import files, progress
from phi2_grpo.common.cli import UserError, disk_is_full, explain, first_lines, memory_ran_out, num_processes
from phi2_grpo.models.base import is_sharded
from phi2_grpo.rewards.scorer import BadReward
from phi2_grpo.rollout.decode_step import unsupported_reason
from phi2_grpo.training import checkpoints
from phi2_grpo.training.callbacks import GracefulStop, LogCallback
from phi2_grpo.training.packing import Pass, pack

# It would print a whole row in each step that has one without a score; answers/scored counts them.
logging.getLogger("trl.trainer.grpo_trainer").addFilter(lambda record: "functions returned None" not in record.getMessage())


def pass_tokens(model) -> int:
    """Tokens in one pass of an update, at most: twice the hidden size H.

    Attention over L tokens takes 4 L H flops a token and layer, the linear layers 24 H^2: with L = 2 H that is a third.
    """
    return 2 * model.config.get_text_config().hidden_size


def training_arguments(kind: type, config: dict, device: torch.device, dtype: torch.dtype, **own):
    """A `kind` (GRPOConfig, RewardConfig) of those keys of `config` that are its fields, and of `own`."""
    # bf16 autocast fails in a CPU's layer norm. Set, or else accelerate's config file decides, whose fp16 Phi-2 overflows in.
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision = "bf16" if dtype.itemsize == 2 and device.type == "cuda" else "no"
    known = {field.name for field in fields(kind)}
    settings = {key: value for key, value in config.items() if key in known and value != ""} | {
        "bf16": precision == "bf16",
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_total_limit": None,  # callbacks.CheckpointCallback prunes
        "trackio_static_space_id": False,  # stay on this machine
        **own,
    }
    return kind(**{"run_name": Path(settings["output_dir"]).name, **settings})


def switch_off_dropout(model) -> None:
    """Also where a rate is a number that a forward pass reads (OPT, StarCoder, Granite): TRL's own knows modules alone."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)


class RunMixin:
    """Mixed into a trainer: a run from its start, or from a checkpoint, to its end or to a clear message."""

    another_run = "--init_adapter {} --output_dir ANOTHER"  # the flags that begin one at a checkpoint

    def run(self, log: LogCallback, checkpoint: Path | None) -> None:
        """Train up to `max_steps`, on from `checkpoint`.

        Raises UserError for what ends it and is no bug, KeyboardInterrupt or Terminated after a signal, with a checkpoint of
        the last step.
        """
        output, steps = Path(self.args.output_dir), self.args.max_steps
        if self.accelerator.num_processes != num_processes():
            raise UserError("WORLD_SIZE is set, and LOCAL_RANK is not: start the processes by torchrun or accelerate launch.")
        if len(set(gather_object([checkpoints.step_of(checkpoint)]))) > 1:
            raise UserError(f"the machines see different checkpoints in {output}, which has to be on a disk that they share.")
        if checkpoint:
            log.seconds_before = files.read_run(checkpoint).get("seconds", 0.0)
        if checkpoints.step_of(checkpoint) >= steps:  # nothing is left to train, and transformers would do one step more
            return self.load_checkpoint(checkpoint)
        if self.args.should_save:
            (checkpoints.remove_incomplete if checkpoint else checkpoints.remove_run)(output)
        switch_off_dropout(self.model)
        stop = GracefulStop()
        self.add_callback(stop)
        progress.silence_printing(self)
        try:
            with stop.listening():
                self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except Exception as error:
            if text := self._end(error, output):
                raise UserError(text) from None
            raise
        finally:
            progress.finish_trackio()
        if self.state.global_step < steps:
            stop.raise_if_asked()

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Weights and state of a checkpoint, without training."""
        weights = load_peft_weights(str(checkpoint), device=str(self.accelerator.device))
        set_peft_model_state_dict(self.accelerator.unwrap_model(self.model), weights)
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _end(self, error: Exception, output: Path) -> str:
        """Save, or make room. Returns in words what ended the training and how to go on; "" for a bug."""
        if isinstance(error, BadReward) or memory_ran_out(error):
            self._save_now(output)
        elif disk_is_full(error):
            checkpoints.remove_incomplete(output)
        newest = checkpoints.newest_complete(output)
        if isinstance(error, UserError):  # of a reward, or of a training that diverged: --resume would meet it again
            start = f"start another run: {self.another_run.format(newest)}" if newest else "start again"
            outside = "\n  If what failed was outside (a server was away), go on with --resume."
            return f"{error}\n  Correct it, and {start}{outside * bool(newest and isinstance(error, BadReward))}"
        # gloo raises a plain RuntimeError, NCCL a DistError.
        if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            text = f"another process of this run is gone, or its machine: {first_lines(error)[:200]}"
        elif type(error).__module__.startswith("wandb"):
            text = f"wandb: {first_lines(error)}. `wandb login`, WANDB_MODE=offline, or --report_to none."
        else:
            text = explain(error)
        return text and f"{text}\n  {checkpoints.resume_hint(output)}"

    def _save_now(self, output: Path) -> None:
        """Save what the last complete step left, where no checkpoint has it yet."""
        step = self.state.global_step
        # Of several processes one alone cannot save: the others wait for it elsewhere.
        if step and self.accelerator.num_processes == 1 and step != checkpoints.step_of(checkpoints.newest_complete(output)):
            self._save_checkpoint(self.model, trial=None)  # transformers has no public method that saves the optimizer
            self.callback_handler.on_save(self.args, self.state, self.control)

    def create_model_card(self, *_, **__) -> None:
        """Not TRL's: ours is written with each checkpoint."""


class Trainer(RunMixin, GRPOTrainer):
    """Rolls out with `engine` (rollout/engine.py), unless vLLM does. TRL's hook for rollouts (rollout_func) is experimental,
    and the rest has no hook, hence the private methods; a test holds their signatures."""

    engine = None

    def _get_train_sampler(self, dataset=None) -> RepeatSampler:
        self.sampler = super()._get_train_sampler(dataset)
        return self.sampler

    def _run_epoch(self, *arguments, epoch: int, **keywords):
        """TRL's, with the order of an epoch fixed by seed and epoch. No checkpoint has the sampler's generator: a run resumed
        after an epoch would repeat the first order.
        """
        # Not by `set_epoch`, which accelerate does not pass on through all that it wraps a sampler in.
        self.sampler.generator.manual_seed(self.sampler.seed + 1_000_003 * epoch)
        return super()._run_epoch(*arguments, epoch=epoch, **keywords)

    def _generate_single_turn(self, prompt_ids, *arguments, **keywords):
        """TRL's: token ids of the prompts, a group's next to each other, to (completion ids, log-probs or None)."""
        if self.engine and not self.use_vllm:
            return self.engine(prompt_ids, self.generation_config), self.engine.log_probs
        return super()._generate_single_turn(prompt_ids, *arguments, **keywords)

    def _logps(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **others):
        """TRL's, without padding, and with each prompt computed once for all of its completions (training/packing.py).

        TRL pads all rows to the longest prompt and the longest completion. Returns log-probs (B, T) of the last
        `logits_to_keep` tokens, 0 where there is none, their entropies or None, and None.
        """
        unusual = any(value is not None and value is not False for value in others.values())
        unwrapped = self.accelerator.unwrap_model(model)
        # Sharded weights are gathered in each pass, so all processes need equally many of them.
        if unusual or is_sharded() or unsupported_reason(unwrapped):
            arguments = (model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy)
            return super()._get_per_token_logps_and_entropies(*arguments, **others)
        most = min(pass_tokens(unwrapped), (batch_size or len(input_ids)) * input_ids.shape[1])
        places, scores = [], []
        for each in pack(input_ids, attention_mask, logits_to_keep, most):
            with self.accelerator.autocast():
                scores.append(self._score(model, each, compute_entropy))
            places.append((each.rows, each.columns))
        place = tuple(map(torch.cat, zip(*places, strict=True)))
        empty = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
        logps, *entropies = (empty.index_put(place, torch.cat(values)) for values in zip(*scores, strict=True))
        return logps, entropies[0] if entropies else None, None

    def _score(self, model, each: Pass, with_entropy: bool) -> tuple[torch.Tensor, ...]:
        """Log-probs (N,) of the targets, and with them the entropies."""
        given = {name: getattr(each, name) for name in ("input_ids", "attention_mask", "position_ids")}
        if each.targets.is_cuda:
            labels = torch.full_like(each.input_ids, -100).index_copy(1, each.predicting, each.targets[None])
            out = model(**given, shift_labels=labels, fused_lm_head=True)
            return tuple(values[0, each.predicting] for values in (out.log_probs, out.entropy)[: 1 + with_entropy])
        # Where there is no Triton, TRL's fused head scores the prompts' tokens too, and is several times slower.
        logits = model(**given, logits_to_keep=each.predicting, use_cache=False).logits[0].float().div_(self.temperature)
        total = logits.logsumexp(-1)
        logps = logits.gather(1, each.targets[:, None])[:, 0] - total
        if not with_entropy:
            return (logps,)
        with torch.no_grad():  # for the log
            parts = zip(logits.split(256), total.split(256), strict=True)
            return logps, torch.cat([ends - ((part - ends[:, None]).exp_() * part).sum(-1) for part, ends in parts])

    def _get_per_token_logps_and_entropies(self, *arguments, **keywords):
        result = self._logps(*arguments, **keywords)
        self.policy_logps = result[0].detach()  # of the reference first; when `_compute_loss` reads it, of the policy
        return result

    def _compute_loss(self, model, inputs: dict) -> torch.Tensor:
        """TRL's; and logs how far the sampled tokens' log-probs moved from rollout to update, under TRL's own names.

        And by how much nearer the rollout is to the reference; above 0, it did not sample from the policy.
        """
        loss, sampled = super()._compute_loss(model, inputs), inputs.get("sampling_per_token_logps")
        if sampled is not None and not self.use_vllm:
            real = inputs["completion_mask"].bool()
            difference = (self.policy_logps - sampled).abs()[real]
            logged = {"sampling_logp_difference/mean": difference.mean(), "sampling_logp_difference/max": difference.max()}
            if (reference := inputs.get("ref_per_token_logps")) is not None:
                logged["nearer_to_reference"] = difference.mean() - (reference - sampled).abs()[real].mean()
            for name, value in logged.items():
                gathered = self.accelerator.gather(value)  # of all processes
                kept = self._metrics["train"][f"sampling/{name}"]  # of the step's micro-batches, of which TRL logs the mean
                if name.endswith("max"):
                    kept[:] = [max([*kept, gathered.max().item()])]
                else:
                    kept.append(gathered.mean().item())
        return loss


class RewardModelTrainer(RunMixin, RewardTrainer):
    """For a reward model."""

    another_run = "--overwrite"
