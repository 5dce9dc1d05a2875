"""Tasks with a right answer: pass@k, greedy answers, and what went from wrong to right."""

from math import comb

from phi2_grpo.common.console import make_table, markdown_table
from phi2_grpo.common.stats import paired, verdict
from phi2_grpo.evaluation.measure import sample, use_adapter

GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 1}  # the likeliest token is the only one


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k answers is right, unbiased, from `right` of `samples` (arXiv 2107.03374)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def measure_greedy(console, engine, tokenizer, scorer, prompts: list[dict], config: dict, batch: int, against: bool) -> dict:
    """1 or 0 a prompt for the greedy answer of each side; None where there is no reference."""
    right = {}
    for side, adapter in {"base": "against" if against else None, "tuned": "default"}.items():
        with use_adapter(engine.model, adapter), console.status(f"greedy answers, {side}"):
            ids = sample(engine, tokenizer, [row["prompt"] for row in prompts], config | GREEDY, batch, lambda _: None)
        right[side] = [row["scores"]["correct"] for row in scorer.score(prompts, ids)]
    return right


def summarize_accuracy(samples: list[dict], greedy: dict[str, list], samples_per_prompt: int) -> dict:
    """pass@k of both sides for k = 1, 2, 4, ... up to `samples_per_prompt`, and the greedy answers prompt by prompt."""
    count, ks = samples_per_prompt, [2**i for i in range(samples_per_prompt.bit_length())]
    groups: dict[str, dict[int, list]] = {"base": {}, "tuned": {}}  # side: prompt: scores
    for row in samples:
        if row["scores"].get("correct") is not None:
            groups[row["side"]].setdefault(row["prompt"], []).append(row["scores"]["correct"])
    complete = {side: [round(sum(right)) for right in of.values() if len(right) == count] for side, of in groups.items()}
    passed = {k: {side: _mean([pass_at_k(count, c, k) for c in right]) for side, right in complete.items()} for k in ks}
    pair = paired(greedy["base"], greedy["tuned"])
    known = [(b, t) for b, t in zip(greedy["base"], greedy["tuned"], strict=True) if None not in (b, t)]
    return {
        "pass@k": passed,
        "greedy": pair and {**pair.to_json(), "verdict": verdict(pair, True)},
        "wrong to right": sum(b < t for b, t in known),
        "right to wrong": sum(b > t for b, t in known),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def accuracy_rows(accuracy: dict) -> list[list[str]]:
    """pass@k by k, then the greedy answers: base, tuned, difference with its interval."""
    rows = [[f"pass@{k}", *(f"{value:.3f}" for value in sides.values()), ""]
            for k, sides in accuracy["pass@k"].items() if None not in sides.values()]  # fmt: skip
    if greedy := accuracy["greedy"]:
        difference = f"{greedy['difference']:+.3f}"
        difference += f" [{greedy['low']:+.3f}, {greedy['high']:+.3f}]" if greedy["low"] is not None else ""
        rows.append(["greedy answers right", f"{greedy['base']:.3f}", f"{greedy['tuned']:.3f}", difference])
    return rows


def accuracy_sentence(accuracy: dict, sampled: str) -> str:
    """What the greedy answers say of it; `sampled` is the verdict on the sampled ones."""
    wrong_to_right, right_to_wrong = accuracy["wrong to right"], accuracy["right to wrong"]
    text = f"Greedy answers: {wrong_to_right} went from wrong to right, {right_to_wrong} the other way."
    if (accuracy["greedy"] or {}).get("verdict") == "better":
        return f"{text} Learnt: the greedy answers are right more often, too."
    sharpened = " Sharpened: sampled answers are right more often; for greedy ones that is not shown."
    return text + sharpened * (sampled == "better")


def show_accuracy(console, accuracy: dict, names: tuple[str, str], sampled: str) -> None:
    table = make_table("accuracy", "", *names, "difference, 95 % interval")
    for row in accuracy_rows(accuracy):
        table.add_row(*row)
    console.print(table)
    console.print(accuracy_sentence(accuracy, sampled))


def accuracy_markdown(accuracy: dict, names: tuple[str, str], sampled: str) -> list[str]:
    table = markdown_table(("accuracy", *names, "difference, 95 % interval"), accuracy_rows(accuracy))
    return ["## Accuracy", "", *table, "", accuracy_sentence(accuracy, sampled), ""]
