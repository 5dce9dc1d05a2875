"""Held-out prompts answered by base and tuned, and measured: the samples, their scores, and what the tuning cost."""

from collections.abc import Callable

import torch
from trl.trainer.utils import use_adapter

from phi2_grpo.common.progress import progress_bar
from phi2_grpo.common.stats import mean
from phi2_grpo.models.base import context_length
from phi2_grpo.models.tokenizer import FORWARD_TOKENS, QUESTION, batches_by_length, render
from phi2_grpo.rollout.engine import complete
from phi2_grpo.rollout.sampling import rollout_generation_config

Advance = Callable[[int], None]  # is told how many more are done


def reserved_bytes(model) -> int:
    """What measuring takes beside the rollout's cache: log-probs of two models over the vocabulary in float32, and copies."""
    return 4 * FORWARD_TOKENS * model.config.get_text_config().vocab_size * 4


def measure(console, engine, tokenizer, scorer, prompts: list[dict], config: dict, against: bool) -> tuple:
    """Samples, drawn as in training, with their scores; and what the tuning cost: metric -> side -> a value a prompt."""
    count = config["samples_per_prompt"]
    rows = [row for row in prompts for _ in range(count)]
    texts, generation = render(tokenizer, [row["prompt"] for row in rows]), rollout_generation_config(config, tokenizer)
    sides = adapter_of_side(against)
    completions, samples = {}, []
    costs: dict[str, dict[str, list]] = {"KL to base": {}, "reference NLL": {}}
    with progress_bar(console, "held-out prompts", 2 * len(rows)) as advance:
        for side, adapter in sides.items():
            with use_adapter(engine.model, adapter):
                completions[side] = complete(engine, tokenizer, texts, generation, config["seed"], advance)
    with progress_bar(console, "KL and reference NLL", 2 * (len(rows) + len(prompts))) as advance:
        for side, adapter in sides.items():
            ids = completions[side]
            samples += [{**row, "side": side, "prompt": i // count} for i, row in enumerate(scorer.score(rows, ids))]
            with use_adapter(engine.model, adapter):
                kl = [0.0] * len(rows) if adapter is None else kl_to_base(engine.model, tokenizer, rows, ids, advance)
                costs["reference NLL"][side] = reference_nll(engine.model, tokenizer, prompts, advance)
            costs["KL to base"][side] = mean_per_prompt(kl, count)
    return samples, costs


def adapter_of_side(against: bool) -> dict[str, str | None]:
    """Which adapter answers as which side; None for the base itself."""
    return {"base": "against" if against else None, "tuned": "default"}


def mean_per_prompt(values: list[float | None], samples: int) -> list[float | None]:
    """Samples of one prompt stand next to each other. None where one of them has no value."""
    return [mean(values[i : i + samples]) for i in range(0, len(values), samples)]


@torch.no_grad()
def kl_to_base(policy, tokenizer, rows: list[dict], completion_ids: list[list[int]], advance: Advance) -> list[float | None]:
    """KL(policy || base) in nats, over the whole vocabulary, mean over the tokens of each completion (end token included).

    `policy` runs with the adapter that is active. None for an empty completion.
    """
    prompts = tokenizer(render(tokenizer, [row["prompt"] for row in rows]), add_special_tokens=False)["input_ids"]
    values: list[float | None] = [None] * len(rows)
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]
    for batch in batches_by_length(lengths):
        texts = ([prompts[i] for i in batch], [completion_ids[i] for i in batch])
        tuned = token_log_probs(policy, tokenizer, *texts)
        with policy.disable_adapter():
            base = token_log_probs(policy, tokenizer, *texts)
        for i, p, q in zip(batch, tuned, base, strict=True):  # (T, V)
            values[i] = (p.exp() * (p - q)).sum(-1).mean().item() if len(p) else None
        advance(len(batch))
    return values


@torch.no_grad()
def reference_nll(policy, tokenizer, rows: list[dict], advance: Advance) -> list[float | None]:
    """Negative log-likelihood of each row's reference after its prompt, in nats, mean over the reference's tokens.

    None where there is no reference. A reference is cut where the context ends.
    """
    texts = render(tokenizer, [row["prompt"] for row in rows])
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    # What stands between prompt and answer: a space behind Phi-2's "Output:", and nothing under most chat templates.
    said = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": "Because."}], tokenize=False)
    between = said.removeprefix(render(tokenizer, [QUESTION])[0]).partition("Because.")[0]
    answers = [f"{between if between.isspace() else ''}{row['reference'] or ''}" for row in rows]
    references = tokenizer(answers, add_special_tokens=False)["input_ids"]
    references = [ids[: max(0, context_length(policy) - len(prompt))] for prompt, ids in zip(prompts, references, strict=True)]
    values: list[float | None] = [None] * len(rows)
    chosen = [i for i, row in enumerate(rows) if row["reference"] and references[i]]
    for part in batches_by_length([len(prompts[i]) + len(references[i]) for i in chosen]):
        batch = [chosen[k] for k in part]
        log_probs = token_log_probs(policy, tokenizer, [prompts[i] for i in batch], [references[i] for i in batch])
        for i, of_tokens in zip(batch, log_probs, strict=True):  # (T, V)
            values[i] = -of_tokens[range(len(references[i])), references[i]].sum().item() / len(references[i])
        advance(len(batch))
    return values


def token_log_probs(model, tokenizer, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
    """For each text the log-probs of every token at the positions of its completion, (T, V) in float32."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    # Padded on the right, so that no position moves.
    inputs = tokenizer.pad({"input_ids": texts}, padding_side="right", return_tensors="pt").to(model.device)
    logits = model(**inputs, use_cache=False).logits  # (B, T, V)
    return [
        logits[i, len(prompt) - 1 : len(prompt) + len(completion) - 1].float().log_softmax(-1)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
