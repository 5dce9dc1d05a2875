"""A reward model: trained, measured, and scoring on the policy's own weights."""

import re
import shutil
from unittest.mock import Mock

import numpy
import pytest
import torch
from conftest import ADAPTER_FILES, WEIGHTS, change_json, change_weights, make_micro, ok, read_json, refused, rows_of, run_main
from datasets import Dataset, load_from_disk
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from config import CONFIG
from phi2_grpo.common.cli import UserError
from phi2_grpo.evaluation import reward_accuracy
from phi2_grpo.models.base import load_base
from phi2_grpo.models.lora import lora_config
from phi2_grpo.models.tokenizer import load_tokenizer
from phi2_grpo.rewards.reward_model import RewardModel, render_conversations

CPU = torch.device("cpu")
CONFIG_FILE = "adapter_config.json"
HEAD = "base_model.model.score.weight"
PROMPTS = [[{"role": "user", "content": text}] for text in ("Why?", "How do I keep a plant alive?", "A")]
ANSWERS = ["Because it is so, and not otherwise.", "Water it.", ""]


@pytest.fixture(scope="module")
def flags(micro, prepared) -> tuple:
    return ("--preset", "tiny", "--model", micro, "--data_dir", prepared, "--report_to", "none", "--reward_epochs", 1)


@pytest.fixture(scope="module")
def trained_reward(flags, tmp_path_factory):
    """A reward model of the micro base: its folder, and what its training printed."""
    folder = tmp_path_factory.mktemp("reward-model") / "reward-model"
    return folder, ok(run_main("train_reward", *flags, "--reward_dir", folder)).out


@pytest.fixture
def config(micro) -> dict:
    return {**CONFIG, "model": str(micro)}


def base_of(config):
    return load_base(config, CPU, torch.float32)


def loaded(folder, config, base=None) -> RewardModel:
    model = RewardModel(str(folder))
    model.load(config, base if base is not None else base_of(config), CPU, torch.float32)
    return model


@torch.no_grad()
def score_alone(model, tokenizer, prompts, answers) -> list[float]:
    """By a whole model, text by text: without padding."""
    texts = render_conversations(tokenizer, prompts, answers)
    return [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


def test_what_is_left_and_printed(trained_reward):
    folder, printed = trained_reward
    expected = ADAPTER_FILES - {"generation_config.json", "evaluation.jsonl", "reward.png"} | {"scores.png"}
    assert {path.name for path in folder.iterdir()} == expected
    assert not folder.with_name("reward-model-run").exists(), "its checkpoints have served"
    run = read_json(folder / "run.json")
    everything = run["validation"]["groups"][0]
    assert run["finished"] and everything["group"] == "all" and f"{everything['model']:.1%}" in printed
    card = (folder / "README.md").read_text()
    assert f"| all | {everything['pairs']} | {100 * everything['model']:.1f}" in card
    tensors = load_file(folder / WEIGHTS)
    assert tensors[HEAD].shape == (1, 32)
    assert sum("lora_B" in name and value.abs().max() > 0 for name, value in tensors.items()) == 12, "each has moved"


def test_scores_are_centred_and_scaled_by_validation(trained_reward, config, prepared):
    """On the replies they were measured on: mean 0, spread 1."""
    model = loaded(trained_reward[0], config)
    pairs = load_from_disk(str(prepared / "oasst1_preferences"))["validation"].to_list()
    scores = [model(prompts=[pair["prompt"]] * 2, answers=[pair[side][0]["content"] for side in ("chosen", "rejected")])
              for pair in pairs]  # fmt: skip
    assert numpy.mean(scores) == pytest.approx(0, abs=1e-4) and numpy.std(scores) == pytest.approx(1, abs=1e-4)
    run = read_json(trained_reward[0] / "run.json")
    agreed = reward_accuracy.agreement(*numpy.array(scores).T).mean()
    assert agreed == pytest.approx(run["validation"]["groups"][0]["model"], abs=1e-4), "the same scores as were measured"


def test_its_texts_are_those_of_the_training(micro):
    """What RewardTrainer makes of a pair, and what a reward model makes of prompt and answer, are the same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(micro)
    pair = {"prompt": PROMPTS[1], "chosen": [{"role": "assistant", "content": "Water it."}],
            "rejected": [{"role": "assistant", "content": "No."}]}  # fmt: skip
    arguments = RewardConfig(output_dir="x", bf16=False, use_cpu=True, report_to="none")
    table = RewardTrainer._prepare_dataset(None, Dataset.from_list([pair]), tokenizer, arguments, "train")
    (text,) = render_conversations(tokenizer, PROMPTS[1:2], ["Water it."])
    assert table[0]["chosen_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_card_s_code_runs(trained_reward, config, monkeypatch, capsys):
    code = re.search(r"```python\n(.+?)```", (trained_reward[0] / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(trained_reward[0])
    exec(code, {})
    (score,) = loaded(trained_reward[0], config)(prompts=PROMPTS[:1], answers=["Because it scatters light."])
    assert float(capsys.readouterr().out) == pytest.approx(score, abs=1e-4)


def test_resumed_it_ends_the_same(call, trained_reward, flags, tmp_path, monkeypatch):
    """Interrupted while it measures, after the last update; and with the newest checkpoint gone, halfway."""
    options = (*flags, "--save_steps", "3")
    with monkeypatch.context() as patch:
        patch.setattr(reward_accuracy, "score_pairs", Mock(side_effect=KeyboardInterrupt))
        first = call("train_reward", *options, "--reward_dir", tmp_path / "rm")
    assert first.code == 130 and "--resume" in first.err
    shutil.copytree(tmp_path / "rm-run", tmp_path / "half-run")
    shutil.rmtree(tmp_path / "half-run" / "checkpoint-9")
    expected = load_file(trained_reward[0] / WEIGHTS)
    for name, step in (("rm", 9), ("half", 6)):
        done = ok(call("train_reward", *options, "--reward_dir", tmp_path / name, "--resume"))
        assert f"resuming at checkpoint-{step}" in done.out
        ended = load_file(tmp_path / name / WEIGHTS)
        assert all(torch.equal(expected[name], ended[name]) for name in expected)
        assert [row["step"] for row in rows_of(tmp_path / name)] == list(range(1, 10))


def test_pairs_that_are_too_few_or_too_long(call, flags, micro, tmp_path):
    where = ("--preset", "tiny", "--model", micro, "--data_dir", tmp_path / "d")
    ok(call("prepare_data", *where, "--validation_fraction", "0"))
    refused(call("train_reward", *where, "--reward_dir", tmp_path / "rm"), "0 validation pairs")
    own = ("train_reward", "--check", *flags, "--reward_dir", tmp_path / "rm", "--reward_max_length")
    assert re.search(r"\d+ too long", " ".join(ok(call(*own, 90)).out.replace("│", " ").split()))
    refused(call(*own, 8), "Raise --reward_max_length")


def test_the_weights_are_shared_and_the_policy_is_untouched(trained_reward, config):
    base, fresh = base_of(config), base_of(config).state_dict()
    random_state = torch.random.get_rng_state()
    model = loaded(trained_reward[0], config, base)
    assert torch.equal(random_state, torch.random.get_rng_state()), "loading draws nothing"
    policy = get_peft_model(base, lora_config(config, base)).train()
    ids = torch.arange(40).view(2, 20)
    policy(input_ids=ids, labels=ids).loss.backward()
    scores = model(prompts=PROMPTS, answers=ANSWERS)
    assert policy.training and all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())
    frozen = {name: value for name, value in policy.get_base_model().state_dict().items() if "lora_" not in name}
    assert all(torch.equal(value, fresh[name.replace(".base_layer", "")]) for name, value in frozen.items())

    places, state = {value.data_ptr() for value in frozen.values()}, model.model.state_dict()
    own = [name for name, value in state.items() if value.data_ptr() not in places]
    assert all("lora_" in name or "score" in name for name in own), own
    assert len(state) - len(own) == len([name for name in fresh if not name.startswith("lm_head")])

    torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0).step()
    assert model(prompts=PROMPTS, answers=ANSWERS) == scores, "the policy learns, the reward model does not change"


def test_in_bfloat16_its_head_stays_in_float32(trained_reward, config):
    model = RewardModel(str(trained_reward[0]))
    model.load(config, load_base(config, CPU, torch.bfloat16), CPU, torch.bfloat16)
    exact = loaded(trained_reward[0], config).score(PROMPTS, ANSWERS)
    assert model.score(PROMPTS, ANSWERS) == pytest.approx(exact, abs=0.05)
    assert model.model.base_model.model.score.modules_to_save["default"].weight.dtype == torch.float32


def test_grpo_on_it(call, quick, trained_reward, tmp_path):
    """The whole run: chosen by its folder, weighed, named; the policy's folder holds the policy's adapter alone."""
    flags = ("--rewards", f"{trained_reward[0]}:0.5,ending", "--output_dir", tmp_path / "o")
    printed = " ".join(ok(call("train_grpo", 3, *quick, *flags)).out.replace("│", " ").split())
    assert "on the policy's own weights" in printed and "reward model 0." in printed
    run = read_json(tmp_path / "o-final" / "run.json")
    assert [reward["name"] for reward in run["rewards"]] == ["reward-model", "ending"]
    parts = run["last_metrics"]["rewards/reward-model/mean"] / 2 + run["last_metrics"]["rewards/ending/mean"]
    assert run["last_metrics"]["reward"] == pytest.approx(parts, abs=1e-3)
    assert "| ending | 1 | Rewards ending by itself" in (tmp_path / "o-final" / "README.md").read_text()
    names = load_file(tmp_path / "o-final" / WEIGHTS)
    assert not any("score" in name for name in names) and len(names) == 24
    checked = (*quick[:10], "--adapter", tmp_path / "o-final", "--validation_dir", tmp_path / "v", "--max_prompts", 5)
    ok(call("validate_model", *checked))
    assert "reward-model" in read_json(tmp_path / "v" / "report.json")["metrics"]


def test_on_another_base_it_is_loaded_beside(call, quick, trained_reward, config, micro, tmp_path):
    """Here the same base in another folder; and a whole classification model, with a tokenizer of its own."""
    elsewhere = shutil.copytree(micro, tmp_path / "elsewhere")
    moved = shutil.copytree(trained_reward[0], tmp_path / "reward-model")
    change_json(moved / CONFIG_FILE, base_model_name_or_path=str(elsewhere))
    assert not RewardModel(str(moved)).shares_base_of(config) and RewardModel(str(trained_reward[0])).shares_base_of(config)
    here, there = (loaded(folder, config).score(PROMPTS, ANSWERS) for folder in (trained_reward[0], moved))
    assert here == pytest.approx(there)
    printed = ok(call("train_grpo", 1, *quick, "--rewards", moved, "--output_dir", tmp_path / "o")).out
    assert "loaded beside" in " ".join(printed.replace("│", " ").split())

    texts = ["Quite another vocabulary, with other merges"] * 3
    other = make_micro(tmp_path / "other", seed=3, texts=texts, hidden_size=16, intermediate_size=32)
    whole = AutoModelForSequenceClassification.from_pretrained(other, num_labels=1)
    whole.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(other).save_pretrained(tmp_path / "whole")
    model = loaded(tmp_path / "whole", config)
    assert "raw scores" in model.describe(config) and "raw scores" not in loaded(moved, config).describe(config)
    expected = score_alone(whole.eval(), load_tokenizer({**config, "model": str(other)}), PROMPTS, ANSWERS)
    assert model(prompts=PROMPTS, answers=ANSWERS) == pytest.approx(expected, abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(other)  # Llama's way: no padding token, and answers end by the end token
    tokenizer.pad_token, tokenizer.bos_token = None, "Q"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "whole")
    expected = score_alone(whole, tokenizer, PROMPTS, ANSWERS)
    assert loaded(tmp_path / "whole", config)(prompts=PROMPTS, answers=ANSWERS) == pytest.approx(expected, abs=1e-5)


def change_base(new):
    return lambda folder: change_json(folder / CONFIG_FILE, base_model_name_or_path=str(new(folder)))


SPOILT = {
    "a policy's adapter": (change_weights(lambda t: {k: v for k, v in t.items() if "score" not in k}), "0 outputs"),
    "three labels": (change_weights(lambda t: {**t, HEAD: torch.zeros(3, 32)}), "3 outputs"),
    "a causal model": (lambda folder: (make_micro(folder) / CONFIG_FILE).unlink(), "0 outputs"),
    "cut": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 50), "is broken"),
    "garbled": (lambda folder: (folder / CONFIG_FILE).write_text("{"), "is broken"),
    "no scale": (lambda folder: (folder / "run.json").write_text('{"scores": {"mean": "x"}}'), "is broken"),
    "a negative scale": (lambda folder: (folder / "run.json").write_text('{"scores": {"mean": 0, "std": -1}}'), "std"),
    "base gone": (change_base(lambda folder: "/no/base"), "/no/base"),
    "a shallower base": (change_base(lambda folder: make_micro(folder.with_name("base"), num_hidden_layers=1)), "do not fit"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_no_reward_model(trained_reward, config, tmp_path, how):
    spoil, expected = SPOILT[how]
    folder = shutil.copytree(trained_reward[0], tmp_path / "folder")
    spoil(folder)
    with pytest.raises(UserError) as refused:
        RewardModel(str(folder)).extra_bytes(config, torch.float32)
        loaded(folder, config)
    assert expected in str(refused.value) and str(folder) in str(refused.value)
