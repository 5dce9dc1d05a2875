"""The same held-out prompts, answered now and then while it trains: a curve that learning prompts by heart cannot lift."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.panel import Panel
from rich.text import Text
from transformers import TrainerCallback

from phi2_grpo.common import files
from phi2_grpo.common.cli import HANGUP, Terminated, UserError, print_error
from phi2_grpo.common.console import format_duration, make_table
from phi2_grpo.common.progress import ProgressBar, alert, log_answers
from phi2_grpo.common.stats import interval
from phi2_grpo.models.tokenizer import render
from phi2_grpo.rewards.collapse import COLLAPSE, HEALTHY, SINCE_START, SINCE_WINDOW, WINDOW
from phi2_grpo.rewards.scorer import Scorer
from phi2_grpo.rollout.engine import complete
from phi2_grpo.rollout.sampling import preserve_random_state, rollout_generation_config
from phi2_grpo.training import outputs
from phi2_grpo.training.checkpoints import write_manifest

SHOWN = 3  # prompts whose answers are kept at each evaluation


class EvaluationCallback(TrainerCallback):
    """Evaluates at step 0, every `eval_steps` and at the end, with fixed prompts and seeds.

    Draws nothing from the run's own random numbers: a run with it and one without end with the same weights.

    Args:
        trainer: is told which part of its work this is, should memory run out in it.
        scorer: one of its own, for the monitor's keeps the last training batch.
        engine: of the rollouts, which has memory for them already (see rollout.py).
        rows: held-out rows of the data set; none, and nothing is evaluated.
        track: also show the answers on trackio's page; the numbers go to every tracker.
    """

    def __init__(self, trainer, scorer: Scorer, tokenizer, engine, rows: list[dict], config: dict, console, track: bool):
        self.scorer, self.tokenizer, self.engine, self.rows, self.config = scorer, tokenizer, engine, rows, config
        self.trainer, self.console, self.track = trainer, console, track

    def on_train_begin(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.evaluate(args, state, model)

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.config["eval_steps"] == 0 or state.global_step == state.max_steps:
            self.evaluate(args, state, model)

    def evaluate(self, args, state, model) -> None:
        if not self.rows or not state.is_world_process_zero:
            return
        texts = render(self.tokenizer, [row["prompt"] for row in self.rows])
        self.trainer.failed_in = "rollout"
        self.scorer.state = state
        with preserve_random_state(model.device):
            drawing = rollout_generation_config(self.config, self.tokenizer)
            ids = complete(self.engine, self.tokenizer, texts, drawing, self.config["seed"])
            scored = self.scorer.score(self.rows, ids)  # a reward of one's own may draw, too
        self.trainer.failed_in = None
        answers = [row["answer"] for row in scored]
        low, high = interval([row["score"] for row in scored if row["score"] is not None]) or (None, None)
        found = {"eval_reward": _known_mean([row["score"] for row in scored]), "eval_low": low, "eval_high": high}
        for reward in self.scorer.chosen if len(self.scorer.chosen) > 1 else []:
            found[f"eval_rewards/{reward.name}"] = _known_mean([row["scores"][reward.name] for row in scored])
        found |= {
            "eval_ended": _known_mean([a.ended for a in answers]),
            "eval_tokens": _known_mean([a.tokens for a in answers]),
        }
        row = {"step": state.global_step, **{key: value and round(value, 4) for key, value in found.items()}}
        shown = [
            {"prompt": self.rows[i]["prompt"][-1]["content"], "answer": answers[i].text} for i in range(min(SHOWN, len(ids)))
        ]
        state.log_history.append({**row, "answers": shown})  # kept by the checkpoints
        files.write_rows(Path(args.output_dir) / "evaluation.jsonl", outputs.log_rows(state.log_history, "eval_reward"))
        spread = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        reward = "not scored" if found["eval_reward"] is None else f"{found['eval_reward']:.3f}"
        text = f"{state.global_step:>9}  held out: reward {reward}{spread} on {len(ids)} prompts"
        self.console.print(text, style="cyan")
        numbers = {key: value for key, value in row.items() if key != "step" and value is not None}
        control = self.trainer.control
        asked = control.should_log  # which the handler takes as done
        self.trainer.callback_handler.on_log(args, state, control, numbers)  # every tracker of --report_to
        control.should_log = asked
        if self.track:
            log_answers(state.global_step, shown)


def _known_mean(values: list) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


class GracefulStop(TrainerCallback):
    """Ends the training after the step in which it was asked to, with a checkpoint; all processes at the same step.

    `asked` is the signal, or 0.
    """

    def __init__(self):
        self.asked = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are noted; the second raises."""
        before = {number: signal.signal(number, self._note) for number in self._heard()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @staticmethod
    def _heard() -> list[int]:
        """A terminal that is closed is heard too, unless nohup says otherwise."""
        hangup = [] if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN else [HANGUP]
        return [signal.SIGINT, signal.SIGTERM, *hangup]

    def _note(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.asked = number
        print_error("\nstopping after this step, with a checkpoint; once more stops at once.")

    def on_step_end(self, args, state, control, **_):
        asked = torch.tensor(self.asked, device=args.device)
        # Signals reach processes at different times, and one that stops alone leaves the others waiting.
        if args.world_size > 1:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if agreed := int(asked):  # or else a signal that has come since stays noted, for the next step
            self.asked = agreed
            control.should_save = control.should_training_stop = True

    def raise_if_asked(self) -> None:
        """After the training: the interruption that it was ended by, if it was."""
        if self.asked:
            raise KeyboardInterrupt if self.asked == signal.SIGINT else Terminated


HEADER_EVERY = 25


class RunCallback(ProgressBar):
    """Times a run over its resumptions, and prints a line a step under a header that comes back."""

    header = ""

    def __init__(self, name: str, facts: dict, seconds_before: float):
        super().__init__(name)
        self.facts, self.seconds_before = facts, seconds_before
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **_):
        super().on_train_begin(args, state, control)
        self.started, self.first_step = time.monotonic(), state.global_step

    def seconds(self) -> float:
        """Wall time of the training, earlier parts of a resumed run included."""
        return self.seconds_before + time.monotonic() - self.started

    def show(self, state, cells: str) -> None:
        """One line: the step, `cells`, and the time left."""
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        if (done - 1) % HEADER_EVERY == 0:
            self.console.print(f"     step  {self.header}     left", style="bold")
        step = f"{state.global_step}/{state.max_steps}"
        self.console.print(f"{step:>9}  {cells}  {format_duration(left):>7}")


class LogCallback(RunCallback):
    """Of a GRPO run: prints and records each step, raises alarms, and completes every checkpoint to a self-describing folder.

    Args:
        sample_steps: steps between samples printed in full, and between comparisons of the rewards.
        stop_on_collapse: end the run at the first alarm of COLLAPSE; `collapsed_at` is its step then.
        track: also raise alarms in trackio.
    """

    header = "reward  ± std  flat     KL  tokens  ended  s/step"

    def __init__(
        self,
        scorer: Scorer,
        tokenizer,
        facts: dict,
        sample_steps: int,
        seconds_before: float = 0.0,
        stop_on_collapse: bool = False,
        track: bool = False,
    ):
        super().__init__("training", facts, seconds_before)
        self.scorer, self.tokenizer, self.sample_steps = scorer, tokenizer, sample_steps
        self.stop_on_collapse, self.track = stop_on_collapse, track
        self.raised: set[tuple[str, str]] = set()
        self.collapsed_at: int | None = None

    def on_train_begin(self, args, state, control, **_):
        super().on_train_begin(args, state, control)
        self.metrics_file = Path(args.output_dir) / "metrics.jsonl"
        rows = outputs.log_rows(state.log_history, "reward")
        if state.is_world_process_zero:
            files.write_rows(self.metrics_file, rows)
        # Not again after a resume; but a collapse that the run is to stop at is looked for anew.
        self.raised = {(kind, metric) for row in rows for kind, metric in row.get("alarms", [])
                       if kind == "warning" or not self.stop_on_collapse}  # fmt: skip

    def on_log(self, args, state, control, logs=None, **_):
        if "reward" not in (logs or {}):
            return
        if not math.isfinite(logs.get("grad_norm") or 0.0):
            raise UserError(
                f"the gradient of step {state.global_step} is not finite, and the weights are lost with it. Lower "
                "--learning_rate, or look at the rewards and at the base's own weights."
            )
        interval = state.global_step % self.sample_steps == 0
        compared = self.scorer.compare() if interval else {}
        logs.update(compared)  # for trackio, which comes after this callback
        state.log_history[-1].update(compared)
        rows = outputs.log_rows(state.log_history, "reward")
        row = rows[-1]
        cells = [("reward", 6, ".3f"), ("reward_std", 5, ".2f"), ("frac_reward_zero_std", 4, ".0%"), ("kl", 5, ".3f"),
                 ("answers/tokens", 6, ".0f"), ("answers/ended", 5, ".0%"), ("step_time", 6, ".1f")]  # fmt: skip
        self.show(
            state,
            "  ".join(f"{'-' if row.get(key) is None else format(row[key], spec):>{width}}" for key, width, spec in cells),
        )
        if alarms := self.alarms(rows):
            # In the log history, so that checkpoints, the curve and a resumed run know of them.
            row["alarms"] = state.log_history[-1]["alarms"] = alarms
            if self.stop_on_collapse and any(kind == "collapse" for kind, _ in alarms):
                self.collapsed_at = state.global_step
                control.should_training_stop = True
        if state.is_world_process_zero:
            with self.metrics_file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
        if interval:
            self.show_samples(state.global_step)
            self.show_comparison(compared)

    def alarms(self, rows: list[dict]) -> list[tuple[str, str]]:
        """(kind, metric) of the ranges that are left now for the first time; each is said."""
        found = []
        for kind, ranges in (("warning", HEALTHY), ("collapse", COLLAPSE)):
            for key, (low, high, meaning) in ranges.items():
                values = [row[key] for row in rows if row.get(key) is not None]
                window, grown = (SINCE_WINDOW, True) if key in SINCE_START else (WINDOW, False)
                if len(values) < window * (1 + grown) or (kind, key) in self.raised:
                    continue
                mean = sum(values[-window:]) / window
                if grown:
                    mean -= sum(values[:window]) / window
                if not low <= mean <= high:
                    found.append((kind, key))
                    how = "has grown by" if grown else "is"
                    over = f"from the first {window} steps to the last" if grown else f"over {window} steps"
                    text = f"{key} {how} {mean:.3g} {over}, healthy is {low:g} to {high:g}: {meaning}"
                    style = "yellow" if kind == "warning" else "bold red"
                    self.console.print(f"{kind}: {text}", style=style)
                    if self.track:
                        alert(f"{kind}: {key}", text, serious=kind == "collapse")
        self.raised.update(found)
        return found

    def show_samples(self, step: int) -> None:
        """The best and the worst completion of the last batch, prompt and tokens as the model sees them."""
        rows = sorted(self.scorer.last, key=lambda row: -math.inf if row["score"] is None else row["score"])
        for name, row, color in (("best", rows[-1], "green"), ("worst", rows[0], "red")):
            body = Text(render(self.tokenizer, [row["prompt"]])[0], style="dim")
            body.append(self.tokenizer.decode(row["completion_ids"]), style="default")
            answer = row["answer"]
            reward = "not scored" if row["score"] is None else f"reward {row['score']:.3f}"
            title = f"step {step}, {name}: {reward}, {answer.tokens} tokens, {answer.finish_reason}"
            parts = [f"{key} {'-' if value is None else f'{value:.2f}'}" for key, value in row["scores"].items()]
            subtitle = Text(", ".join(parts)) if len(parts) > 1 else None
            frame = {"title": Text(title), "title_align": "left", "subtitle": subtitle, "subtitle_align": "left"}
            self.console.print(Panel(body, border_style=color, **frame))

    def show_comparison(self, compared: dict[str, float]) -> None:
        """Where there are several rewards: which of them does nothing, and which fights another."""
        names = [key.removeprefix("same/") for key in compared if key.startswith("same/")]
        if len(names) < 2:
            return
        table = make_table("Rewards within groups", "reward", "same in a group", *names[:-1])
        for i, name in enumerate(names):
            cells = [
                f"{value:+.2f}" if (value := compared.get(f"agreement/{other}~{name}")) is not None else ""
                for other in names[:i]
            ]
            table.add_row(name, f"{compared[f'same/{name}']:.0%}", *cells)
        self.console.print(table)

    def complete(self, folder: Path, state) -> None:
        """Make a checkpoint a self-describing adapter folder."""
        outputs.write_adapter_files(folder, self.tokenizer, self.facts, state.log_history, self.seconds(), finished=False)


class RewardLogCallback(RunCallback):
    """Of the training of a reward model: a line a step, and a run.json in every checkpoint, which says that it is whole."""

    header = "  loss  accuracy  margin  s/step"

    def __init__(self, facts: dict, seconds_before: float):
        super().__init__("reward model", facts, seconds_before)
        self.last_step = time.monotonic()

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and "loss" in (logs or {}):
            now = time.monotonic()
            cells = f"{logs['loss']:6.3f}  {logs['accuracy']:8.0%}  {logs['margin']:6.2f}  {now - self.last_step:6.1f}"
            self.show(state, cells)
            self.last_step = now

    def complete(self, folder: Path, state) -> None:
        """Say in a checkpoint what run it is of."""
        write_manifest(folder, {**self.facts, "finished": False, "seconds": round(self.seconds(), 1)})
