"""Held-out prompts answered and measured: the samples, their scores, and what the tuning cost."""

import math
from collections.abc import Callable

import torch

from phi2_grpo.models.base import context_length
from phi2_grpo.models.tokenizer import FORWARD_TOKENS, batches_by_length, render
from phi2_grpo.rollout.engine import complete_in_batches
from phi2_grpo.rollout.sampling import rollout_generation_config


def reserved_bytes(model) -> int:
    """What measuring the answers takes: log-probs of two models over the vocabulary in float32, and copies of them."""
    return 4 * FORWARD_TOKENS * model.config.vocab_size * 4


def complete_prompts(engine, tokenizer, texts: list[str], config: dict, side: str, drawn, advance) -> None:
    """Complete rendered prompts into the journal `drawn`, those that are not there yet."""
    done = {index for found, index in drawn.found if found == side}
    advance(len(done))
    drawing = rollout_generation_config(config, tokenizer)
    for completions in complete_in_batches(engine, tokenizer, texts, drawing, drawn.batch, config["seed"]):
        new = {index: ids for index, ids in completions.items() if index not in done}
        drawn.add(side, new)
        advance(len(new))


def mean_per_prompt(values: list[float | None], samples: int) -> list[float | None]:
    """Samples of one prompt stand next to each other. None where one of them has no value."""
    groups = [values[i : i + samples] for i in range(0, len(values), samples)]
    return [None if None in group else sum(group) / samples for group in groups]


@torch.no_grad()
def kl_to_base(
    policy, without_adapter: Callable, tokenizer, rows: list[dict], completion_ids: list[list[int]], advance=lambda count: None
) -> list[float | None]:
    """KL(policy || base) in nats, over the whole vocabulary, mean over the tokens of each completion (end token included).

    `without_adapter()` is the context in which `policy` is its base. None for an empty completion.
    """
    prompts = tokenizer(render(tokenizer, [row["prompt"] for row in rows]), add_special_tokens=False)["input_ids"]
    values: list[float | None] = [None] * len(rows)
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]
    for batch in batches_by_length(lengths):
        tuned = token_log_probs(policy, tokenizer, [prompts[i] for i in batch], [completion_ids[i] for i in batch])
        with without_adapter():
            base = token_log_probs(policy, tokenizer, [prompts[i] for i in batch], [completion_ids[i] for i in batch])
        for i, p, q in zip(batch, tuned, base, strict=True):  # (T, V)
            values[i] = (p.exp() * (p - q)).sum(-1).mean().item() if len(p) else None
        advance(len(batch))
    return values


@torch.no_grad()
def reference_nll(policy, tokenizer, rows: list[dict], advance=lambda count: None) -> list[tuple[float, int] | None]:
    """Negative log-likelihood (nats, summed) of each row's human reply after its prompt, and the reply's tokens.

    None where there is no reply. exp(sum of the first / sum of the second) is the perplexity. A reply is cut where the context
    ends.
    """
    prompts = tokenizer(render(tokenizer, [row["prompt"] for row in rows]), add_special_tokens=False)["input_ids"]
    # The answer begins with the space behind "Output:", as in training.
    replies = tokenizer([f" {row['reference'] or ''}" for row in rows], add_special_tokens=False)["input_ids"]
    replies = [reply[: max(0, context_length(policy) - len(prompt))] for prompt, reply in zip(prompts, replies, strict=True)]
    values: list[tuple[float, int] | None] = [None] * len(rows)
    chosen = [i for i, row in enumerate(rows) if row["reference"] and replies[i]]
    for part in batches_by_length([len(prompts[i]) + len(replies[i]) for i in chosen]):
        batch = [chosen[k] for k in part]
        log_probs = token_log_probs(policy, tokenizer, [prompts[i] for i in batch], [replies[i] for i in batch])
        for i, rows_of_log_probs in zip(batch, log_probs, strict=True):
            picked = rows_of_log_probs[range(len(replies[i])), replies[i]]
            values[i] = (-picked.sum().item(), len(replies[i]))
        advance(len(batch))
    return values


def perplexity(surprises: list[tuple[float, int] | None]) -> float | None:
    """Of all replies together: exp of the mean surprise of a token. None where there is no reply."""
    known = [value for value in surprises if value]
    return math.exp(sum(nats for nats, _ in known) / sum(tokens for _, tokens in known)) if known else None


def token_log_probs(model, tokenizer, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
    """For each text the log-probs of every token at the places of its completion, (T, V) in float32."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    longest = max(map(len, texts))
    # Padded on the right, so that no position moves.
    ids = torch.full((len(texts), longest), tokenizer.pad_token_id, device=model.device)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text, device=model.device)
        mask[i, : len(text)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, T, V)
    return [
        logits[i, len(prompt) - 1 : len(prompt) + len(completion) - 1].float().log_softmax(-1)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
