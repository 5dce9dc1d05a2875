"""What people see while it trains: progress with time left, a line a step, samples in full, and alarms."""

import json
import math
import time
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from phi2_grpo import files, looks, report
from phi2_grpo.chat import render
from phi2_grpo.checkpoints import seal
from phi2_grpo.cli import UserError
from phi2_grpo.progress import ProgressBar, alert
from phi2_grpo.scoring import Scorer

# Judged on the mean of the last WINDOW steps, so that one noisy step raises no alarm.
WINDOW = 5
HEADER_EVERY = 25
# metric: (lowest, highest, what it means when left). Healthy ranges of Axolotl's GRPO docs, "training stability".
HEALTHY = {
    "frac_reward_zero_std": (0, 0.8, "most groups have one reward for all their completions, so they teach nothing: "
                             "the reward is too easy, too hard, or too coarse"),
    "completions/clipped_ratio": (0, 0.3, "many completions are cut off at max_completion_length: the model does not end "
                                  "its answers (yet), or has no room for them"),
    "kl": (0, 0.5, "the policy is far from its base; above 2 it has diverged: lower learning_rate or raise beta"),
    "grad_norm": (0.001, 1, "gradients are vanishing (nothing is learnt) or exploding (lower learning_rate)"),
}  # fmt: skip
# What no reward can excuse (see signs.py), and what --stop_on_collapse ends a run at.
COLLAPSE = {
    "kl": (0, 2, "the policy has diverged from its base: lower learning_rate or raise beta"),
    "entropy": (0.01, float("inf"), "sampling has collapsed to one answer: raise temperature or beta"),
    "signs/repetition": (0, 0.5, "answers repeat themselves: add the reward repetition, or raise beta"),
    "signs/distinct_2": (0.2, 1, "all answers say the same: the reward pays for one phrase"),
    "signs/one_language": (-1, 0.3, "answers drift to one language: add the reward language"),
    "signs/at_target": (0, 0.6, "answers are padded or cut to the target length: give length a companion"),
    "signs/empty": (0, 0.5, "most answers say nothing: the reward pays for silence"),
}
SINCE_START = {"signs/one_language"}  # a base that answers all in English is no drift
SINCE_WINDOW = 10  # steps at the start and at the end: a batch has few prompts in other languages


class Watch(ProgressBar):
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
        self.console.print(f"{step:>9}  {cells}  {looks.duration(left):>7}")


class Monitor(Watch):
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
        rows = report.rows_with(state.log_history, "reward")
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
        rows = report.rows_with(state.log_history, "reward")
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
            title = f"step {step}, {name}: {reward}, {answer.tokens} tokens, {answer.why}"
            parts = [f"{key} {'-' if value is None else f'{value:.2f}'}" for key, value in row["scores"].items()]
            subtitle = Text(", ".join(parts)) if len(parts) > 1 else None
            frame = {"title": Text(title), "title_align": "left", "subtitle": subtitle, "subtitle_align": "left"}
            self.console.print(Panel(body, border_style=color, **frame))

    def show_comparison(self, compared: dict[str, float]) -> None:
        """Where there are several rewards: which of them does nothing, and which fights another."""
        names = [key.removeprefix("same/") for key in compared if key.startswith("same/")]
        if len(names) < 2:
            return
        table = looks.table("Rewards within groups", "reward", "same in a group", *names[:-1])
        for i, name in enumerate(names):
            cells = [
                f"{value:+.2f}" if (value := compared.get(f"agreement/{other}~{name}")) is not None else ""
                for other in names[:i]
            ]
            table.add_row(name, f"{compared[f'same/{name}']:.0%}", *cells)
        self.console.print(table)

    def complete(self, folder: Path, state) -> None:
        """Make a checkpoint a self-describing adapter folder."""
        report.describe_folder(folder, self.tokenizer, self.facts, state.log_history, self.seconds(), finished=False)


class RewardMonitor(Watch):
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
        seal(folder, {**self.facts, "finished": False, "seconds": round(self.seconds(), 1)})
