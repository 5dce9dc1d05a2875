"""Completions outside training: batches of prompts in, token ids out."""

from collections.abc import Container, Iterator

import torch
from transformers import GenerationConfig, set_seed


@torch.no_grad()
def complete(
    model,
    tokenizer,
    prompts: list[str],
    generation: GenerationConfig,
    batch_size: int,
    seed: int,
) -> list[list[int]]:
    """Completion token ids for rendered prompts, in their order; the end token is kept, the padding is not.

    Args:
        batch_size: prompts generated at once.
        seed: set before each batch, so that two models draw with the same random numbers, batch by batch.
    """
    completions: dict[int, list[int]] = {}
    for batch in complete_in_batches(model, tokenizer, prompts, generation, batch_size, seed):
        completions |= batch
    return [completions[i] for i in range(len(prompts))]


@torch.no_grad()
def complete_in_batches(
    model, tokenizer, prompts: list[str], generation: GenerationConfig, batch_size: int, seed: int, done: Container[int] = ()
) -> Iterator[dict[int, list[int]]]:
    """The same batch by batch, by the prompts' indices; batches whose prompts are all in `done` are passed over."""
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: less padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if all(i in done for i in batch):
            continue
        inputs = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
        set_seed(seed + start)
        output = model.generate(**inputs, generation_config=generation, tokenizer=tokenizer)
        completions = {}
        for i, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):  # (B, T)
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            completions[i] = ids[:end]
        yield completions
