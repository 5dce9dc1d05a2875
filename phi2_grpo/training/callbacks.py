"""What happens during a run, by transformers' own hooks: the printed line, the held-out evaluation, checkpoints, stopping."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch
from accelerate import PartialState
from rich.panel import Panel
from rich.text import Text
from transformers import TrainerCallback, TrainerControl

from phi2_grpo.common import files
from phi2_grpo.common.cli import HANGUP, Terminated, UserError, print_error
from phi2_grpo.common.console import Console
from phi2_grpo.common.progress import alert
from phi2_grpo.common.stats import interval
from phi2_grpo.models.tokenizer import render
from phi2_grpo.rewards import collapse
from phi2_grpo.rewards.scorer import Scorer
from phi2_grpo.rollout.engine import complete
from phi2_grpo.rollout.sampling import preserve_random_state, rollout_generation_config
from phi2_grpo.training import checkpoints, outputs

HEADER_EVERY = 25  # steps
SAMPLES = 3  # prompts whose answers are kept at each evaluation
# The printed line: key of the log row, header, format. The first key marks the log rows that are a step's.
GRPO_COLUMNS = (
    ("reward", "reward", ".3f"),
    ("reward_std", "± std", ".2f"),
    ("frac_reward_zero_std", "zero-std", ".0%"),
    ("kl", "   KL", ".3f"),
    ("answers/tokens", "tokens", ".0f"),
    ("answers/ended", "ended", ".0%"),
)
REWARD_MODEL_COLUMNS = (("loss", "  loss", ".3f"), ("accuracy", "accuracy", ".0%"), ("margin", "margin", ".2f"))


class LogCallback(TrainerCallback):
    """Prints a line a step under a repeated header, and writes metrics.jsonl; of a GRPO run also alerts and samples.

    `columns`: GRPO_COLUMNS or REWARD_MODEL_COLUMNS. `scorer`: that of a GRPO trainer's rewards, which keeps the last batch.
    `seconds_before`: wall time of the earlier parts of a resumed run. `collapsed_at`: the step that `stop_on_collapse` ended
    the run at.
    """

    seconds_before = 0.0
    collapsed_at: int | None = None

    def __init__(self, columns: tuple, config: dict, scorer: Scorer | None = None):
        self.columns, self.key, self.config, self.scorer = columns, columns[0][0], config, scorer
        self.console, self.started = Console(), time.monotonic()

    def seconds(self) -> float:
        """Wall time of the training, earlier parts of a resumed run included."""
        return self.seconds_before + time.monotonic() - self.started

    def on_train_begin(self, args, state, control, **_):
        self.console.quiet = not state.is_world_process_zero
        self.started = time.monotonic()
        self.first_step, self.metrics_file = state.global_step, Path(args.output_dir) / "metrics.jsonl"
        rows = outputs.log_rows(state.log_history, self.key)
        if state.is_world_process_zero:
            files.write_rows(self.metrics_file, rows)
        # A resumed run repeats no alert but a collapse that it is to stop at.
        self.printed = {(kind, metric) for row in rows for kind, metric in row.get("alerts", [])
                       if kind == "warning" or not self.config["stop_on_collapse"]}  # fmt: skip

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.first_step:  # without what comes before, as the first evaluation
            self.first_begun = self.last_log = time.monotonic()

    def on_log(self, args, state, control, logs=None, **_):
        if self.key not in (logs or {}):
            return
        if not math.isfinite(logs.get("grad_norm") or 0.0):
            raise UserError(
                f"the gradient of step {state.global_step} is not finite, and the weights are lost with it. Lower "
                f"--{'' if self.scorer else 'reward_'}learning_rate, or look at data, rewards and the base's own weights."
            )
        rows = outputs.log_rows(state.log_history, self.key)
        self.print_step(state, rows[-1])
        if self.scorer:
            self.print_alerts(args, state, control, rows)
            if state.global_step % self.config["sample_steps"] == 0 or state.global_step == state.max_steps:
                self.show_samples(state.global_step)
        if state.is_world_process_zero:
            with self.metrics_file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")

    def print_step(self, state, row: dict) -> None:
        now, done = time.monotonic(), state.global_step - self.first_step
        if done % HEADER_EVERY == 1:
            headers = [header for _, header, _ in self.columns]
            self.console.print("     step", *headers, "s/step", "   left", sep="  ", style="bold")
        cells = [_format(row.get(key), spec).rjust(len(header)) for key, header, spec in self.columns]
        left = timedelta(seconds=round((now - self.first_begun) / done * (state.max_steps - state.global_step)))
        step = f"{state.global_step}/{state.max_steps}"
        self.console.print(f"{step:>9}", *cells, f"{now - self.last_log:6.1f}", f"{left!s:>7}", sep="  ", soft_wrap=True)
        self.last_log = now

    def print_alerts(self, args, state, control, rows: list[dict]) -> None:
        """Say what is new, and note it in the log history: for checkpoints, the curve and a resumed run."""
        for each in collapse.alerts(rows, self.printed):
            self.printed.add((each.kind, each.metric))
            rows[-1]["alerts"] = state.log_history[-1].setdefault("alerts", [])
            rows[-1]["alerts"].append([each.kind, each.metric])
            collapsed = each.kind == "collapse"
            self.console.print(f"{each.kind}: {each.text}", style="bold red" if collapsed else "yellow")
            if "trackio" in args.report_to and state.is_world_process_zero:  # transformers opens it in the first process alone
                alert(f"{each.kind}: {each.metric}", each.text, collapsed)
            if collapsed and self.config["stop_on_collapse"]:
                self.collapsed_at = state.global_step
                control.should_save = control.should_training_stop = True

    def show_samples(self, step: int) -> None:
        """The completions of highest and lowest reward in the last batch, prompt and tokens as the model sees them."""
        rows = sorted(self.scorer.last_batch, key=lambda row: -math.inf if row["score"] is None else row["score"])
        for name, row, color in (("highest", rows[-1], "green"), ("lowest", rows[0], "red")):
            prompt, completion = render(self.scorer.tokenizer, [row["prompt"]])[0], row["completion_ids"]
            parts = ", ".join(f"{key} {_format(value, '.3f')}" for key, value in row["scores"].items())
            of_each = f"{parts}\n\n" * (len(row["scores"]) > 1)
            body = Text.assemble((of_each, "italic"), (prompt, "dim"), self.scorer.tokenizer.decode(completion))
            answer, score = row["answer"], _format(row["score"], ".3f")
            title = f"step {step}, {name} reward {score}; {answer.tokens} tokens, {answer.finish_reason}"
            self.console.print(Panel(body, border_style=color, title=Text(title), title_align="left"))


def _format(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


class EvaluationCallback(TrainerCallback):
    """Evaluates on held-out prompts at step 0, every `eval_steps` and at the end.

    Prompts and seeds are fixed, and nothing is drawn from the run's own random numbers: a run with it and one without end
    with the same weights. The trainer's engine answers, whose cache is there already, and its trackers get the numbers; the
    `scorer` is another one, for the trainer's keeps the last training batch.
    """

    def __init__(self, trainer, scorer: Scorer, rows: list[dict], config: dict, console):
        self.trainer, self.scorer, self.rows, self.config, self.console = trainer, scorer, rows, config, console

    def on_train_begin(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.evaluate(args, state, model)

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.config["eval_steps"] == 0 or state.global_step == state.max_steps:
            self.evaluate(args, state, model)

    def evaluate(self, args, state, model) -> None:
        if not state.is_world_process_zero:
            return
        tokenizer, self.scorer.state = self.scorer.tokenizer, state
        texts = render(tokenizer, [row["prompt"] for row in self.rows])
        with preserve_random_state(model.device):
            generation = rollout_generation_config(self.config, tokenizer)
            ids = complete(self.trainer.engine, tokenizer, texts, generation, self.config["seed"])
            scored = self.scorer.score(self.rows, ids)  # a user's reward may use random numbers, too
        means = self.means(scored)
        answers = [{"prompt": asked["prompt"][-1]["content"], "answer": row["answer"].text}
                   for asked, row in zip(self.rows, scored[:SAMPLES], strict=False)]  # fmt: skip
        state.log_history.append({"step": state.global_step, **means, "answers": answers})  # kept by the checkpoints
        files.write_rows(Path(args.output_dir) / "evaluation.jsonl", outputs.log_rows(state.log_history, "eval_reward"))
        known = {key: value for key, value in means.items() if value is not None}
        mean, low, high = (_format(means[key], ".3f") for key in ("eval_reward", "eval_low", "eval_high"))
        count = sum(row["score"] is not None for row in scored)
        each = [f"{key.rpartition('/')[2]} {_format(value, '.3f')}" for key, value in means.items() if "rewards/" in key]
        text = f"{state.global_step:>9}  held out: reward {mean}, 95 % interval [{low}, {high}], {count} prompts"
        self.console.print("\n".join([text, *[f"{'':>9}  {', '.join(each)}"] * bool(each)]), style="cyan")
        # To every tracker of --report_to; `trainer.log` would take the training's metrics with it.
        self.trainer.callback_handler.on_log(args, state, TrainerControl(), known)

    def means(self, scored: list[dict]) -> dict[str, float | None]:
        """Of the reward with its 95 % interval, of each reward where there are several, and of the answers."""
        columns = {"eval_reward": [row["score"] for row in scored]}
        if len(self.scorer.chosen) > 1:
            columns |= {f"eval_rewards/{name}": [row["scores"][name] for row in scored] for name in scored[0]["scores"]}
        columns |= {f"eval_{name}": [getattr(row["answer"], name) for row in scored] for name in ("ended", "tokens")}
        known = {key: [value for value in column if value is not None] for key, column in columns.items()}
        means = {key: round(fmean(values), 4) if values else None for key, values in known.items()}
        ends = interval(known["eval_reward"])
        low, high = (round(end, 4) for end in ends) if ends else (None, None)
        return {**means, "eval_low": low, "eval_high": high}


class CheckpointCallback(TrainerCallback):
    """Completes each checkpoint, and then removes the oldest ones; none with the last save of a run that stops early.

    transformers would prune (its save_total_limit) before `on_save`: an incomplete checkpoint would push out a complete one.
    `write_files` writes the rest of a checkpoint folder, given the trainer's log history; run.json last.
    """

    def __init__(self, write_files: Callable[[Path, list[dict]], None], save_total_limit: int):
        self.write_files, self.save_total_limit = write_files, save_total_limit

    def on_train_begin(self, args, state, control, **_):
        state.save_steps = args.save_steps  # or else a resumed run would keep that of its first part

    def on_save(self, args, state, control, **_):
        PartialState().wait_for_everyone()  # each process writes its own random state
        if not state.is_world_process_zero:
            return
        output = Path(args.output_dir)
        folder = output / f"checkpoint-{state.global_step}"
        files.open_to_umask(folder)
        self.write_files(folder, state.log_history)
        if control.should_training_stop and state.global_step < state.max_steps:
            return  # stopped early: after a collapse the checkpoints from before it are needed
        for old in checkpoints.complete_checkpoints(output)[: -self.save_total_limit]:
            checkpoints.remove(old)


class GracefulStop(TrainerCallback):
    """Ends the training after the step in which a signal came, with a checkpoint; all processes at the same step.

    `asked` is the signal, or 0.
    """

    asked = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first signal is noted, and the second raises (under a launcher Ctrl-C's). nohup's SIGHUP is ignored."""
        hangup = [] if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN else [HANGUP]
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.asked and number != signal.SIGINT and "LOCAL_RANK" in os.environ:
            return  # a launcher sends its own after a scheduler's, and kills in the end what does not stop
        if self.asked:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.asked = number
        print_error("\nstopping after this step, with a checkpoint; a second Ctrl-C stops at once.")

    def on_step_end(self, args, state, control, **_):
        # Signals reach processes at different times, and one that stops alone leaves the others waiting.
        agreed = torch.tensor(self.asked, device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        if agreed:  # or else a signal that has come since stays noted, for the next step
            self.asked = int(agreed)
            control.should_save = control.should_training_stop = True

    def raise_if_asked(self) -> None:
        """After the training: raise what the signal that ended it stands for, if one did."""
        if self.asked:
            raise KeyboardInterrupt if self.asked == signal.SIGINT else Terminated
