"""Adapters and bases from elsewhere in every script and in the app: taken as they are, or refused."""

import contextlib
import shutil

import pytest
import torch
from conftest import make_adapter, ok, refused
from engine import Engine, NoBase
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi2_grpo.training import checkpoints


def test_an_adapter_that_peft_alone_saved(call, quick, micro, prepared, tmp_path):
    adapter = make_adapter(micro, tmp_path / "adapter")
    own = ("--model", micro, "--data_dir", prepared, "--device", "cpu", "--validation_dir", tmp_path / "v", "--max_prompts", 2)
    ok(call("validate_model", *own, "--adapter", adapter, "--samples_per_prompt", 1))
    ok(call("train_grpo", 1, *quick, "--init_adapter", adapter, "--output_dir", tmp_path / "o", "--check"))
    with contextlib.closing(Engine(adapter, str(micro))) as app:
        assert app.kind == "tuned"


def test_lora_that_cannot_be_trained_is_refused_before_the_start(call, quick, micro, trained, tmp_path):
    own = ("train_grpo", 1, *quick, "--check", "--output_dir", tmp_path / "o")
    refused(call(*own, "--lora_target_modules", "lm_head,fc1"), "lm_head")  # TRL refuses it too, but later
    refused(call(*own, "--init_adapter", make_adapter(micro, tmp_path / "adapter", target_modules=["lm_head"])), "lm_head")
    refused(call(*own, "--init_adapter", trained), f"{trained}/checkpoint-")
    shutil.copytree(trained, tmp_path / "o")
    refused(call(*own, "--overwrite", "--init_adapter", tmp_path / "o" / "checkpoint-4"), "output_dir")


@pytest.mark.parametrize("targets", [["lm_head", "fc1"], ["embed_tokens"]])
def test_a_head_that_is_the_embedding_cannot_differ_from_it(call, micro, tmp_path, targets):
    base = AutoModelForCausalLM.from_pretrained(micro)
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(micro).save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=targets)
    refused(call("export_model", "--adapter", adapter, "--out", tmp_path / "merged"), "another model")
    assert not (tmp_path / "merged").exists()


def test_a_base_whose_folder_moved(call, micro, tmp_path):
    base = shutil.copytree(micro, tmp_path / "models")
    adapter = make_adapter(base, tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    for name, place in (("export_model", "--out"), ("validate_model", "--validation_dir")):
        refused(call(name, "--adapter", adapter, place, tmp_path / "out"), str(base), "--model")
    with pytest.raises(NoBase, match="cannot be loaded"):
        Engine(adapter, "")
    ok(call("export_model", "--adapter", adapter, "--model", tmp_path / "moved", "--out", tmp_path / "out"))


def test_a_base_that_is_not_a_number_leaves_no_adapter(call, quick, micro, tmp_path):
    base = shutil.copytree(micro, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    refused(call("train_grpo", 2, *quick, "--model", base, "--eval_prompts", 0, "--output_dir", tmp_path / "o"), "step 1")
    assert not (tmp_path / "o-final").exists() and not checkpoints.complete_checkpoints(tmp_path / "o")
