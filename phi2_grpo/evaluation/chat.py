"""The sample prompts answered by both sides as a chat."""

from rich.text import Text
from trl.trainer.utils import use_adapter

from phi2_grpo.common.console import make_table
from phi2_grpo.evaluation.measure import adapter_of_side
from phi2_grpo.models.answers import trim
from phi2_grpo.models.tokenizer import render
from phi2_grpo.rollout.engine import complete


def show_samples(
    console, engine, tokenizer, names: tuple[str, str], generation, seed: int, questions: list[list[dict]], against: bool
) -> list[dict]:
    """The questions, each a conversation, answered by both as a chat, as `generation` has it, side by side, trimmed."""
    how = f"temperature {generation.temperature or 1:g}, top-p {generation.top_p or 1:g}" if generation.do_sample else "greedy"
    console.print(f"Sample prompts, as a chat (not scored): at most {generation.max_new_tokens} tokens, {how}")
    texts = render(tokenizer, questions)
    answers = {}
    for side, adapter in adapter_of_side(against).items():
        with use_adapter(engine.model, adapter), console.status(f"{side} answers"):
            answers[side] = trim(complete(engine, tokenizer, texts, generation, seed), tokenizer)
    samples = []
    for question, *pair in zip(questions, answers["base"], answers["tuned"], strict=True):
        ends = [Text(f"{answer.tokens} tokens, {answer.finish_reason}", style="dim") for answer in pair]
        rows = [[answer.text for answer in pair], ends]
        table = make_table(question[-1]["content"], *names, rows=rows, words=(0, 1), expand=True, show_lines=True)
        table.columns[0].ratio = table.columns[1].ratio = 1
        console.print(table)
        texts_of = [{"answer": a.text, "tokens": a.tokens, "finish_reason": a.finish_reason} for a in pair]
        samples.append({"prompt": question[-1]["content"], "base": texts_of[0], "tuned": texts_of[1]})
    return samples
