"""Base against tuned."""

import json

import pytest
import torch
from transformers import GenerationConfig

import validate_model
from config import CONFIG
from phi2_grpo import chat, model
from phi2_grpo.loading import load_tokenizer
from phi2_grpo.rollout import complete


@pytest.fixture
def validated(call, quick, trained, tmp_path):
    options = (*quick[:10], "--adapter", trained.with_name("grpo-final"), "--validation_dir", tmp_path / "v")
    done = call("validate_model", *options, "--max_prompts", 12, "--samples_per_prompt", 2)
    assert done.code == 0, done.err
    return done, json.loads((tmp_path / "v" / "report.json").read_text())


def test_report(validated):
    done, found = validated
    assert [sample["prompt"] for sample in found["samples"]] == chat.SAMPLE_PROMPTS
    for prompt in chat.SAMPLE_PROMPTS:
        assert prompt in done.out
    assert found["prompts"] == 12 and set(found["metrics"]) == {"reward", "answer tokens", "ended"}
    reward = found["metrics"]["reward"]
    assert abs(reward["tuned"] - reward["base"] - reward["difference"]) < 2e-4 and reward["half_width"] > 0
    assert f"{reward['base']:.3f}" in done.out and f"{reward['difference']:+.3f}" in done.out
    assert "No difference shown" in done.out or "By its reward" in done.out
    assert all("Instruct:" not in sample[side]["answer"] for sample in found["samples"] for side in ("base", "tuned"))


def test_compare_on_known_numbers():
    found = validate_model.compare([0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0])
    assert found == {"base": 0.0, "tuned": 0.5, "difference": 0.5, "half_width": round(1.96 * (1 / 3) ** 0.5 / 2, 4)}
    assert validate_model.compare([1.0], [2.0])["half_width"] is None
    assert validate_model._mean_per_prompt([1, 3, 5, 7], 2) == [2, 6]


@pytest.mark.parametrize(
    ("difference", "half_width", "words"),
    [(0.3, 0.1, "better"), (-0.3, 0.1, "worse"), (0.1, 0.3, "No difference shown"), (0.1, None, "No difference shown")],
)
def test_verdict(capsys, difference, half_width, words):
    from rich.console import Console

    reward = {"base": 0.5, "tuned": 0.5 + difference, "difference": difference, "half_width": half_width}
    validate_model.show_measured(Console(), {"prompts": 9, "samples_per_prompt": 1, "metrics": {"reward": reward}})
    assert words in capsys.readouterr().out


def test_completions_do_not_depend_on_padding_or_order(micro):
    """Greedy answers to ragged prompts in one batch equal those of each prompt alone."""
    config = {**CONFIG, "model": str(micro)}
    tokenizer = load_tokenizer(config)
    base = model.load_base(config, torch.device("cpu"), torch.float32)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=8, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    prompts = ["Why?", "How do I keep a plant alive, and for how long can I do so?", "A", "Water it once a week."]
    together = complete(base, tokenizer, prompts, greedy, 4, 0)
    alone = [complete(base, tokenizer, [prompt], greedy, 1, 0)[0] for prompt in prompts]
    assert together == alone
