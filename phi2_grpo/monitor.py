"""What people see while it trains: progress with time left, a line a step, samples in full, and warnings."""

import json
import time
from pathlib import Path

from rich.panel import Panel
from rich.text import Text

from phi2_grpo import report
from phi2_grpo.chat import render
from phi2_grpo.progress import ProgressBar
from phi2_grpo.rewards import Scorer

# Healthy ranges (Axolotl's GRPO docs, "training stability"), judged on the mean of the last WINDOW steps so that one
# noisy step raises no alarm. metric: (lowest, highest, what it means when left).
WINDOW = 5
HEADER_EVERY = 25
HEALTHY = {
    "frac_reward_zero_std": (0, 0.8, "most groups have one reward for all their completions, so they teach nothing: "
                             "the reward is too easy, too hard, or too coarse"),
    "completions/clipped_ratio": (0, 0.3, "many completions are cut off at max_completion_length: the model does not end "
                                  "its answers (yet), or has no room for them"),
    "kl": (0, 0.5, "the policy is far from its base; above 2 it has diverged: lower learning_rate or raise beta"),
    "grad_norm": (0.001, 1, "gradients are vanishing (nothing is learnt) or exploding (lower learning_rate)"),
    "entropy": (0.01, float("inf"), "sampling has collapsed to one answer: raise temperature or beta"),
}  # fmt: skip


def duration(seconds: float) -> str:
    """1:05 or 2:03:04."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Monitor(ProgressBar):
    """Prints and records each step, and completes every checkpoint to a self-describing folder."""

    def __init__(self, scorer: Scorer, tokenizer, facts: dict, sample_steps: int, seconds_before: float = 0.0):
        super().__init__("training")
        self.scorer, self.tokenizer, self.facts, self.sample_steps = scorer, tokenizer, facts, sample_steps
        self.warned: set[str] = set()
        self.seconds_before = seconds_before  # of the run that is resumed
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **_):
        super().on_train_begin(args, state, control)
        self.metrics_file = Path(args.output_dir) / "metrics.jsonl"
        rows = report.step_rows(state.log_history)
        self.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.started, self.first_step = time.monotonic(), state.global_step

    def seconds(self) -> float:
        """Wall time of the training, earlier parts of a resumed run included."""
        return self.seconds_before + time.monotonic() - self.started

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or "reward" not in (logs or {}):
            return
        rows = report.step_rows(state.log_history)
        row = rows[-1]
        with self.metrics_file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        if (done - 1) % HEADER_EVERY == 0:
            self.console.print("     step  reward  ± std  flat  tokens  ended     KL  s/step     left", style="bold")
        kl = f"{row['kl']:.3f}" if row.get("kl") is not None else "-"
        self.console.print(
            f"{f'{state.global_step}/{state.max_steps}':>9}  {row['reward']:6.3f}  {row['reward_std']:5.2f}"
            f"  {row['frac_reward_zero_std']:4.0%}  {row['answers/tokens']:6.0f}  {row['answers/ended']:5.0%}  {kl:>5}"
            f"  {row['step_time']:6.1f}  {duration(left):>7}",
            highlight=False,
        )
        self.warn(rows)
        if state.global_step % self.sample_steps == 0:
            self.show_samples(state.global_step)

    def warn(self, rows: list[dict]) -> None:
        """One warning per healthy range, the first time that it is left."""
        for key, (low, high, meaning) in HEALTHY.items():
            values = [row[key] for row in rows[-WINDOW:] if row.get(key) is not None]
            if len(values) < WINDOW or key in self.warned:
                continue
            mean = sum(values) / len(values)
            if not low <= mean <= high:
                self.warned.add(key)
                text = f"warning: {key} is {mean:.3g} over {WINDOW} steps, healthy is {low:g} to {high:g}: {meaning}"
                self.console.print(text, style="yellow", highlight=False)

    def show_samples(self, step: int) -> None:
        """The best and the worst completion of the last batch, prompt and tokens as the model sees them."""
        rows = sorted(self.scorer.last, key=lambda row: row["score"])
        for name, row, color in (("best", rows[-1], "green"), ("worst", rows[0], "red")):
            body = Text(render(self.tokenizer, [row["prompt"]])[0], style="dim")
            body.append(self.tokenizer.decode(row["completion_ids"]), style="default")
            answer = row["answer"]
            title = f"step {step}, {name}: reward {row['score']:.3f}, {answer.tokens} tokens, {answer.why}"
            self.console.print(Panel(body, title=Text(title), title_align="left", border_style=color))

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            rows = report.step_rows(state.log_history)
            report.describe_folder(folder, self.tokenizer, self.facts, rows, self.seconds(), finished=False)
