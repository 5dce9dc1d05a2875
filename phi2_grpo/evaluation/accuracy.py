"""Tasks with a right answer: pass@k, greedy answers, and what went from wrong to right."""

from math import comb

from trl.trainer.utils import use_adapter

from phi2_grpo.common.stats import mean, paired, verdict
from phi2_grpo.evaluation.measure import adapter_of_side
from phi2_grpo.models.tokenizer import render
from phi2_grpo.rollout.engine import complete
from phi2_grpo.rollout.sampling import rollout_generation_config


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k answers is right, unbiased, from `right` of `samples` (arXiv 2107.03374)."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def measure_greedy(console, engine, tokenizer, scorer, prompts: list[dict], config: dict, against: bool) -> dict:
    """1 or 0 a prompt for the greedy answer of each side; None where there is no reference."""
    texts, right = render(tokenizer, [row["prompt"] for row in prompts]), {}
    generation = rollout_generation_config(config, tokenizer)
    generation.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    for side, adapter in adapter_of_side(against).items():
        with use_adapter(engine.model, adapter), console.status(f"greedy answers, {side}"):
            ids = complete(engine, tokenizer, texts, generation, config["seed"])
        right[side] = [row["scores"]["correct"] for row in scorer.score(prompts, ids)]
    return right


def summarize_accuracy(samples: list[dict], greedy: dict[str, list], samples_per_prompt: int) -> dict:
    """pass@k of both sides for k = 1, 2, 4, ... up to `samples_per_prompt`, and the greedy answers prompt by prompt."""
    count, ks = samples_per_prompt, [2**i for i in range(samples_per_prompt.bit_length())]
    groups: dict[str, dict[int, list]] = {"base": {}, "tuned": {}}  # side: prompt: scores
    for row in samples:
        if row["scores"].get("correct") is not None:
            groups[row["side"]].setdefault(row["prompt"], []).append(row["scores"]["correct"])
    counts = {side: [round(sum(right)) for right in of.values() if len(right) == count] for side, of in groups.items()}
    passed = {k: {side: mean([pass_at_k(count, c, k) for c in right]) for side, right in counts.items()} for k in ks}
    pair = paired(greedy["base"], greedy["tuned"])
    known = [(b, t) for b, t in zip(greedy["base"], greedy["tuned"], strict=True) if None not in (b, t)]
    return {
        "pass@k": passed,
        "greedy": pair and {**pair.to_json(), "verdict": verdict(pair, True)},
        "wrong to right": sum(b < t for b, t in known),
        "right to wrong": sum(b > t for b, t in known),
    }


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
        return f"{text} They are right more often."
    return text + " Sampled answers are right more often; for greedy ones that is not shown." * (sampled == "better")
