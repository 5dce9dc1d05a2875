"""What the tuning cost, against values by hand."""

import random

import pytest
import torch

from config import CONFIG
from phi2_grpo.evaluation import measure
from phi2_grpo.models.base import load_base
from phi2_grpo.models.lora import load_adapter
from phi2_grpo.models.tokenizer import render
from phi2_grpo.rollout.engine import complete

ROWS = [{"prompt": [{"role": "user", "content": text}], "lang": "en", "message_id": text, "reference": reply}
        for text, reply in (("Why?", "Because."), ("How do I keep a plant?", "Water it once a week."), ("A", None))]  # fmt: skip


@torch.no_grad()
def by_hand(model, tokenizer, row: dict, ids: list[int]) -> torch.Tensor:
    """Log-probs at the positions of `ids`, (T, V), of one text without padding, in float64."""
    prompt = tokenizer(render(tokenizer, [row["prompt"]])[0])["input_ids"]
    return model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]


def test_costs_against_values_by_hand(micro, tokenizer, final):
    config, done = {**CONFIG, "model": str(micro)}, []
    base, policy = (load_base(config, torch.device("cpu"), torch.float32).eval() for _ in range(2))
    policy = load_adapter(policy, str(final)).eval()
    ids = [tokenizer(text)["input_ids"] for text in (" So it is.", " No", "")]
    kl = measure.kl_to_base(policy, tokenizer, ROWS, ids, done.append)
    assert kl[2] is None, "an empty completion"
    for row, completion, value in zip(ROWS[:2], ids, kl, strict=False):
        p, q = (by_hand(model, tokenizer, row, completion) for model in (policy, base))
        assert value == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3, abs=1e-6)
    nlls = measure.reference_nll(policy, tokenizer, ROWS, done.append)
    assert nlls[2] is None, "no reference"
    for row, value in zip(ROWS[:2], nlls, strict=False):
        reply = tokenizer(f" {row['reference']}")["input_ids"]
        log_probs = by_hand(policy, tokenizer, row, reply)[range(len(reply)), reply]
        assert value == pytest.approx(-log_probs.mean().item(), rel=1e-4)


def test_a_prompt_counts_where_all_its_samples_have_a_value():
    assert measure.mean_per_prompt([1.0, 3.0, None, 3.0], 2) == [2.0, None]


def test_completions_come_back_in_order_from_batches_of_one_size():
    """Each with a seed of its own, so that what is sampled does not depend on the memory that is free."""
    texts, done = [str(number) for number in range(130)], []
    as_ids = lambda texts, **_: {"input_ids": [[int(text)] for text in texts]}  # noqa: E731
    echo = lambda ids, *_: [[*each, random.random()] for each in ids]  # noqa: E731
    first, again = (complete(echo, as_ids, texts, None, 7, done.append) for _ in range(2))
    assert [ids[0] for ids in first] == list(range(130)) and first == again and done == [64, 64, 2] * 2
