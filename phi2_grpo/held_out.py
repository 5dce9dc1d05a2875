"""The same held-out prompts, answered now and then while it trains: a curve that learning prompts by heart cannot lift."""

from pathlib import Path

from transformers import TrainerCallback

from phi2_grpo import evaluation, files, report
from phi2_grpo.chat import render
from phi2_grpo.progress import log_answers
from phi2_grpo.rollout import complete
from phi2_grpo.scoring import Scorer
from phi2_grpo.statistics import interval

SHOWN = 3  # prompts whose answers are kept at each evaluation


class HeldOut(TrainerCallback):
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
        with evaluation.random_state_kept(model.device):
            drawing = evaluation.sampling(self.config, self.tokenizer)
            ids = complete(self.engine, self.tokenizer, texts, drawing, self.config["seed"])
            scored = self.scorer.score(self.rows, ids)  # a reward of one's own may draw, too
        self.trainer.failed_in = None
        answers = [row["answer"] for row in scored]
        low, high = interval([row["score"] for row in scored if row["score"] is not None]) or (None, None)
        found = {"eval_reward": _mean([row["score"] for row in scored]), "eval_low": low, "eval_high": high}
        for reward in self.scorer.chosen if len(self.scorer.chosen) > 1 else []:
            found[f"eval_rewards/{reward.name}"] = _mean([row["scores"][reward.name] for row in scored])
        found |= {"eval_ended": _mean([a.ended for a in answers]), "eval_tokens": _mean([a.tokens for a in answers])}
        row = {"step": state.global_step, **{key: value and round(value, 4) for key, value in found.items()}}
        shown = [
            {"prompt": self.rows[i]["prompt"][-1]["content"], "answer": answers[i].text} for i in range(min(SHOWN, len(ids)))
        ]
        state.log_history.append({**row, "answers": shown})  # kept by the checkpoints
        files.write_rows(Path(args.output_dir) / "evaluation.jsonl", report.rows_with(state.log_history, "eval_reward"))
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


def _mean(values: list) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
