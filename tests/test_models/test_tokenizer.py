"""What the model sees, and where its turns end."""

import shutil

import pytest
import torch
from conftest import make_micro, ok, rows_of
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from config import CONFIG
from phi2_grpo.common.cli import UserError
from phi2_grpo.models.answers import chat_generation_config, stop_strings, trim
from phi2_grpo.models.base import load_base
from phi2_grpo.models.tokenizer import QUESTION, check_prompt_format, count_tokens, load_tokenizer, prepare_tokenizer, render
from phi2_grpo.rollout.engine import complete, make_engine
from phi2_grpo.rollout.sampling import rollout_generation_config


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A base with a template of its own, whose turns end with <|end|>: only its generation config, with odd sampling, says so."""
    folder = make_micro(tmp_path_factory.mktemp("chat_model") / "base")
    tokenizer, base = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    base.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        base.lm_head.bias[end] = 4.0
    odd = {"do_sample": True, "top_k": 1, "min_p": 0.9, "repetition_penalty": 1.9}
    base.generation_config = GenerationConfig(eos_token_id=[end, tokenizer.eos_token_id], **odd)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {**CONFIG, "model": str(folder)}, end


def test_chat_template(tokenizer):
    said = (("user", " Why?\n"), ("assistant", "Because."), ("user", "And {{ then }}?"))
    messages = [{"role": role, "content": text} for role, text in said]
    prompt = "Instruct: Why?\nOutput: Because.\nInstruct: And {{ then }}?\nOutput:"
    assert render(tokenizer, [messages[:1], messages]) == ["Instruct: Why?\nOutput:", prompt]
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False) == "Instruct: Why?\nOutput: Because."
    assert count_tokens(tokenizer, [messages]) == [len(tokenizer(prompt)["input_ids"])] and count_tokens(tokenizer, []) == []
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.padding_side == "left"


def test_every_end_token_ends_an_answer(chat_model, tmp_path):
    config, end = chat_model
    tokenizer = load_tokenizer(config)
    eos_ids = [tokenizer.eos_token_id, end]
    assert tokenizer.all_eos_ids == eos_ids and tokenizer.eos_token == "<|endoftext|>"
    assert render(tokenizer, [[{"role": "user", "content": "Why?"}]]) == ["Why?"], "its own template stays"
    assert stop_strings(tokenizer) == [], "Phi-2's stop strings are for its own prompt format"
    word = tokenizer("a plant")["input_ids"]
    answers = trim([[*word, each, *word] for each in eos_ids], tokenizer)
    assert [(answer.text, answer.ended) for answer in answers] == [("a plant", True)] * 2
    assert rollout_generation_config(config, tokenizer).eos_token_id == eos_ids
    assert chat_generation_config(tokenizer, config, 512).eos_token_id == eos_ids


def test_what_a_base_model_s_tokenizer_keeps_to_itself(call, quick, chat_model, tmp_path):
    """The end of a turn that the chat template alone names (Qwen's bases), and the token that begins every text (Llama's)."""
    config, end = chat_model
    folder = shutil.copytree(config["model"], tmp_path / "base")
    (folder / "generation_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer({**config, "model": str(folder)}).all_eos_ids == [tokenizer.eos_token_id, end]
    (tmp_path / "q.txt").write_text("Why?\nHow?\nWho?\n")
    own = ("--model", folder, "--data_dir", tmp_path / "d")
    ok(call("prepare_data", *own, "--dataset", tmp_path / "q.txt", "--validation_fraction", 0))
    ok(call("train_grpo", 1, *quick, *own, "--output_dir", tmp_path / "o"))
    (row,) = rows_of(tmp_path / "o-final")
    assert row["answers/ended"] == 1 - row["completions/clipped_ratio"] > 0, "a rollout ends there, too"
    with pytest.raises(UserError, match="another chat template"):
        check_prompt_format(tmp_path / "o-final", load_tokenizer(config))
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}"
    prepare_tokenizer(tokenizer)
    assert render(tokenizer, [QUESTION]) == ["26 Jul 2024"], "the same on each day"
    tokenizer.chat_template, tokenizer.bos_token = None, "<|end|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", end)])
    prepare_tokenizer(tokenizer)
    assert render(tokenizer, [QUESTION]) == ["<|end|>Instruct: Why?\nOutput:"] and stop_strings(tokenizer)


@pytest.mark.parametrize("engine", ["fast", "generate"])
def test_sampling_is_the_rollout_s_whatever_the_base_asks_for(chat_model, engine):
    """Its top_k of 1 would make all completions of a prompt the same, and its repetition penalty others."""
    config, end = chat_model
    config = {**config, "max_completion_length": 20}
    tokenizer = load_tokenizer(config)
    base = load_base(config, torch.device("cpu"), torch.float32)
    outputs = complete(make_engine(engine, base), tokenizer, ["Why?"] * 40, rollout_generation_config(config, tokenizer), 0)
    eos_ids = set(tokenizer.all_eos_ids)
    assert len({ids[0] for ids in outputs}) > 5
    assert any(end in ids for ids in outputs) and all(not eos_ids & set(ids[:-1]) for ids in outputs)
