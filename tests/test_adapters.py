"""Adapters from elsewhere: what fits is taken as it is, what does not is refused by name, in every script and in the app."""

import json
import shutil

import pytest
import torch
from conftest import make_micro
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_bad_input import refused
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from config import CONFIG
from phi2_grpo.common.cli import UserError
from phi2_grpo.models.answers import chat_generation_config, trim
from phi2_grpo.models.base import is_path, load_base, resolve_model
from phi2_grpo.models.lora import load_adapter
from phi2_grpo.models.tokenizer import load_tokenizer
from phi2_grpo.rollout.cache import cache_bytes_per_token
from phi2_grpo.rollout.sampling import rollout_generation_config

CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"


def made_elsewhere(base, folder, **options):
    """An adapter as PEFT alone saves it, with an effect."""
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "fc1"], "task_type": "CAUSAL_LM", **options}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights=False, **options)).save_pretrained(
        folder
    )
    return folder


def everywhere(call, quick, micro, prepared, adapter, tmp_path) -> dict:
    """What each script says of an adapter."""
    own = ("--model", micro, "--data_dir", prepared, "--device", "cpu")
    return {
        "validate": call("validate_model", *own, "--adapter", adapter, "--validation_dir", tmp_path / "v", "--max_prompts", 2),
        "export": call("export_model", "--model", micro, "--adapter", adapter, "--out", tmp_path / "m"),
        "train": call("train_grpo", 1, *quick, "--init_adapter", adapter, "--output_dir", tmp_path / "o", "--check"),
    }


def in_the_app(adapter, base):
    from engine import Engine

    engine = Engine(adapter, str(base))
    engine.close()
    return engine


@pytest.fixture(autouse=True)
def app_on_path(monkeypatch):
    from conftest import ROOT

    monkeypatch.syspath_prepend(ROOT / "hf_app")


CHANGES = {
    "an old Phi-2's names": lambda t: {k.replace("model.model.layers.", "model.transformer.h."): v for k, v in t.items()},
    "torch.compile's names": lambda t: {k.replace("base_model.model.", "base_model.model._orig_mod.", 1): v for k, v in t.items()},
    "one is missing": lambda t: dict(list(t.items())[1:]),
    "one more": lambda t: {**t, "base_model.model.model.layers.9.mlp.fc1.lora_A.weight": torch.zeros(4, 32)},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_weights_of_other_names(call, quick, micro, prepared, final, tmp_path, change):
    adapter = shutil.copytree(final, tmp_path / "adapter")
    save_file(CHANGES[change](load_file(final / WEIGHTS)), adapter / WEIGHTS)
    for done in everywhere(call, quick, micro, prepared, adapter, tmp_path).values():
        refused(done, "do not fit")
    status = in_the_app(adapter, micro).status
    assert status.kind == "broken" and "made for another base" in status.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(call, quick, micro, prepared, final, tmp_path, value):
    adapter = shutil.copytree(final, tmp_path / "adapter")
    weights = load_file(final / WEIGHTS)
    first = next(iter(weights))
    save_file({**weights, first: weights[first] * 0 + value}, adapter / WEIGHTS)
    for name, done in everywhere(call, quick, micro, prepared, adapter, tmp_path).items():
        refused(done, "holds weights that are no finite numbers (1 of")
        assert "learning_rate" not in done.err, name
    status = in_the_app(adapter, micro).status
    assert status.kind == "broken" and "no finite numbers" in status.text


@pytest.mark.parametrize("kind", ["IA3", "PROMPT_TUNING"])
def test_kinds_that_are_not_lora_are_named(call, micro, final, tmp_path, kind):
    adapter = shutil.copytree(final, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": kind}))
    refused(
        call("export_model", "--model", micro, "--adapter", adapter, "--out", tmp_path / "m"), f"of the kind {kind}", "LoRA"
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "fc1"]}, {"modules_to_save": ["final_layernorm"]}],
    ids=["lora", "dora", "embedding", "modules_to_save"],
)
def test_what_peft_alone_saves_is_a_whole_adapter(call, quick, micro, tmp_path, options):
    """No tokenizer, no generation_config.json, and every form of LoRA: the very model that PEFT makes of it."""
    from peft import PeftModel

    adapter = made_elsewhere(micro, tmp_path / "sft", **options)
    assert not (adapter / "tokenizer.json").exists()
    base = load_base({**CONFIG, "model": str(micro)}, CPU, torch.float32)
    ours = load_adapter(base, str(adapter)).eval()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(micro), adapter).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        merged = tmp_path / "merged"
        done = call("export_model", "--model", micro, "--adapter", adapter, "--out", merged)
        assert done.code == 0, done.err
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits, theirs(ids).logits, atol=1e-4)
    done = call("train_grpo", 1, *quick, "--init_adapter", adapter, "--output_dir", tmp_path / "o", "--check")
    assert done.code == 0, done.err
    assert in_the_app(adapter, micro).status.kind == "tuned"


def test_lora_on_the_head_is_refused_before_the_start(call, quick, micro, tmp_path):
    """TRL refuses it, too; but after the base was loaded."""
    own = ("train_grpo", 1, *quick, "--output_dir", tmp_path / "o", "--check")
    refused(call(*own, "--lora_target_modules", "lm_head,fc1"), "LoRA on lm_head is not supported")
    adapter = made_elsewhere(micro, tmp_path / "a", target_modules=["lm_head"])
    refused(call(*own, "--init_adapter", adapter), "LoRA on lm_head is not supported")


def tied(micro, folder):
    base = AutoModelForCausalLM.from_pretrained(micro)
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(micro).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("targets", "still_tied"), [(["lm_head", "fc1"], False), (["embed_tokens"], False), (["fc1"], True)])
def test_a_head_that_is_the_embedding_is_untied_where_they_differ(call, micro, tmp_path, targets, still_tied):
    from peft import PeftModel

    base = tied(micro, tmp_path / "base")
    adapter = made_elsewhere(base, tmp_path / "adapter", target_modules=targets)
    done = call("export_model", "--adapter", adapter, "--out", tmp_path / "merged")
    assert done.code == 0, done.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, tuned(ids).logits, atol=1e-4)
    assert merged.config.tie_word_embeddings is still_tied


def test_a_merged_model_that_is_another_is_not_written(call, micro, final, tmp_path, monkeypatch):
    import export_model

    plain = export_model.merge_untied

    def wrong(tuned):
        merged = plain(tuned)
        merged.lm_head.weight.data *= 1.5
        return merged

    monkeypatch.setattr(export_model, "merge_untied", wrong)
    refused(call("export_model", "--model", micro, "--adapter", final, "--out", tmp_path / "m"), "it is another model")
    assert not (tmp_path / "m").exists()


def test_a_base_whose_folder_moved(call, micro, prepared, tmp_path):
    base = shutil.copytree(micro, tmp_path / "models")
    adapter = made_elsewhere(base, tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    for done in (
        call("export_model", "--adapter", adapter, "--out", tmp_path / "m"),
        call(
            "validate_model",
            "--adapter",
            adapter,
            "--data_dir",
            prepared,
            "--device",
            "cpu",
            "--validation_dir",
            tmp_path / "v",
        ),
    ):
        refused(done, f"{base} is gone", "--model")
        assert "hf download" not in done.err
    done = call("export_model", "--adapter", adapter, "--model", tmp_path / "moved", "--out", tmp_path / "m")
    assert done.code == 0, done.err
    from engine import Engine, NoBase

    with pytest.raises(NoBase, match="the folder is gone"):
        Engine(adapter)


# --- more than one end token, and sampling that the base's own file asks for


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A base whose turn ends with <|end|>, which only its generation config names; it also asks for odd sampling."""
    folder = make_micro(tmp_path_factory.mktemp("chatty") / "base")
    tokenizer, base = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    base.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        base.lm_head.bias[end] = 4.0
    base.generation_config = GenerationConfig(eos_token_id=[end, tokenizer.eos_token_id], do_sample=True, top_k=1, min_p=0.9,
                                              repetition_penalty=1.9)  # fmt: skip
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, end


def test_every_end_token_ends_an_answer(chatty):
    folder, end = chatty
    config = {**CONFIG, "model": str(folder)}
    tokenizer = load_tokenizer(config)
    ends = [tokenizer.eos_token_id, end]
    assert tokenizer.end_token_ids == ends
    word = tokenizer("a plant")["input_ids"]
    answers = trim([[*word, each, *word] for each in ends], tokenizer)
    assert [(answer.text, answer.ended) for answer in answers] == [("a plant", True)] * 2
    assert rollout_generation_config(config, tokenizer).eos_token_id == ends
    assert chat_generation_config(tokenizer, config, 512).eos_token_id == ends


@pytest.mark.parametrize("engine", ["fast", "generate"])
def test_sampling_is_the_rollout_s_whatever_the_base_asks_for(chatty, engine):
    """Its top_k of 1 would make all completions of a prompt the same, and its repetition penalty others."""
    from phi2_grpo.rollout.engine import complete, make_engine

    folder, end = chatty
    config = {**CONFIG, "model": str(folder), "max_completion_length": 20}
    tokenizer = load_tokenizer(config)
    base = load_base(config, CPU, torch.float32)
    drawn = complete(make_engine(engine, base), tokenizer, ["Why?"] * 40, rollout_generation_config(config, tokenizer), 0)
    ends = set(tokenizer.end_token_ids)
    assert len({ids[0] for ids in drawn}) > 5
    assert any(end in ids for ids in drawn) and all(not ends & set(ids[:-1]) for ids in drawn), "nothing goes on behind an end"


def test_a_training_on_it_ends_where_it_ends(call, chatty, tmp_path):
    folder, end = chatty
    own = ("--preset", "tiny", "--model", folder, "--data_dir", tmp_path / "d")
    assert call("prepare_data", *own, "--max_prompt_tokens", 100).code == 0
    more = ("--max_completion_length", 12, "--target_tokens", 6, "--per_device_train_batch_size", 8, "--report_to", "none")
    done = call("train_grpo", 1, *own, *more, "--eval_prompts", 8, "--output_dir", tmp_path / "o")
    assert done.code == 0, done.err
    final = tmp_path / "o-final"
    assert end in json.loads((final / "generation_config.json").read_text())["eos_token_id"]
    assert json.loads((final / "evaluation.jsonl").read_text().splitlines()[0])["eval_ended"] > 0.5
    engine = in_the_app(final, folder)
    assert end in engine.ends and engine.settings().max_new_tokens == 256, "room to end, within half of the context"


def test_old_heads_that_are_wider_than_hidden_by_heads():
    """Qwen3-0.6B: 16 heads of 128 on a hidden size of 1024, 8 key-value heads, 28 layers."""
    from transformers import Qwen3Config

    config = Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128, num_hidden_layers=28)
    assert cache_bytes_per_token(config, torch.bfloat16) == 2 * 28 * 8 * 128 * 2


def test_a_name_that_can_only_be_a_path():
    assert all(map(is_path, ("/data/phi", "./phi", "../phi", "~/phi", "a/b/c", "C:\\models\\phi", "My Drive/phi")))
    assert not any(map(is_path, ("microsoft/phi-2", "gpt2", "tiny")))
    with pytest.raises(UserError, match="is gone"):
        resolve_model({"model": "/data/phi", "model_revision": "main"})
