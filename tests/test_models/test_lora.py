"""LoRA: what it reaches (at full size: test_memory.py); and adapters from elsewhere, taken as they are or refused."""

import shutil

import pytest
import torch
from conftest import SHAPE, WEIGHTS, change_json, change_weights, make_adapter
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from config import CONFIG
from phi2_grpo.common.cli import UserError
from phi2_grpo.models.base import load_base
from phi2_grpo.models.lora import check_same_base, load_adapter, lora_config, lora_counts, meta_lora_model

CPU = torch.device("cpu")
IDS = torch.arange(40)[None]


def one_layer(kind: str):
    """A base where only names matter."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, vocab_size=99))


@pytest.fixture(scope="module")
def adapter(micro, tmp_path_factory):
    return make_adapter(micro, tmp_path_factory.mktemp("adapter") / "sft")


def test_of_a_model_that_sees_its_language_part_alone():
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sight, "vocab_size": 99, "head_dim": 16}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", text_config=text, vision_config=sight))
    wrapped = get_peft_model(base, lora_config(CONFIG, base))
    adapted = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 7 and all("language_model" in name for name in adapted)


@pytest.mark.parametrize(("kind", "targets", "expected"), [
    ("phi", ["Wqkv", "out_proj"], {"q_proj", "k_proj", "v_proj", "dense"}),
    ("phi", ["all-linear"], {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    ("llama", ["gate_proj", "q_proj"], {"gate_proj", "q_proj"}), ("gpt2", ["c_attn"], {"c_attn"}),  # no nn.Linear
    ("llama", ["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ("phi", ["Wqkv", "fc3"], UserError), ("phi", [], UserError),
    ("llama", ["Wqkv", "q_proj"], UserError)])  # Phi's old names are Phi's alone  # fmt: skip
def test_targets(kind, targets, expected):
    base, config = one_layer(kind), {**CONFIG, "lora_target_modules": targets}
    if expected is UserError:
        with pytest.raises(UserError, match="q_proj .*all-linear"):
            lora_config(config, base)
    else:
        assert set(lora_counts(get_peft_model(base, lora_config(config, base)))[0]) == expected


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "fc1"]},
    {"modules_to_save": ["final_layernorm"]}], ids=["lora", "dora", "embedding", "modules_to_save"])  # fmt: skip
def test_what_peft_alone_saves_is_a_complete_adapter(micro, tmp_path, options):
    """No tokenizer, no generation_config.json, and every form of LoRA: the very model that PEFT makes of it."""
    folder = make_adapter(micro, tmp_path / "sft", **options)
    config = {**CONFIG, "model": str(micro), "init_adapter": str(folder)}
    ours = load_adapter(load_base(config, CPU, torch.float32), str(folder)).eval()
    fresh = AutoModelForCausalLM.from_pretrained(micro).eval()
    with torch.no_grad():
        without = fresh(IDS).logits
        theirs = PeftModel.from_pretrained(fresh, folder).eval()(IDS).logits
        assert torch.equal(ours(IDS).logits, theirs) and not torch.equal(theirs, without)
        with ours.disable_adapter():
            assert torch.equal(ours(IDS).logits, without), "the base is the policy with its adapter off"
    assert lora_counts(meta_lora_model(config))[1] > 0


def change_config(**values):
    return lambda folder: change_json(folder / "adapter_config.json", **values)


BROKEN = {  # what is done to the folder, and what the message names
    "gone": (shutil.rmtree, "no adapter at"), "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    "weights cut": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50]), WEIGHTS),
    "a Git LFS pointer": (lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs"), "git lfs pull"),
    "IA3": (change_config(peft_type="IA3"), "kind IA3"), "biases": (change_config(bias="all"), "bias none"),
    "PiSSA": (change_config(init_lora_weights="pissa_niter_4"), "plain LoRA"),
    "another rank": (change_config(r=3), "--model"),
    "a rank beyond memory": (change_config(r=10**12), "the rank 1000000000000, and its weights have 4"),
    "other targets": (change_config(target_modules=["fc1"]), "--model"),
    "NaN": (change_weights(lambda t: {k: v * float("nan") for k, v in t.items()}), "not finite"),
    "one is missing": (change_weights(lambda t: dict(list(t.items())[1:])), "1 of 8 are missing"),
    "one more": (change_weights(lambda t: {**t, "more.lora_A.weight": torch.zeros(4, 32)}), "more.lora_A"),
    "an embedding of more rows": ( change_weights(lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.zeros(9, 32)}), "embed_tokens",),
    "other names": (change_weights(lambda t: {k.replace("layers.", "h."): v for k, v in t.items()}), "do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_is_refused(micro, adapter, tmp_path, how):
    """When it is loaded; and by the checks of a training that would start from it, without weights."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    harm, expected = BROKEN[how]
    harm(folder)
    config = {**CONFIG, "model": str(micro), "init_adapter": str(folder)}
    for load in (lambda: load_adapter(AutoModelForCausalLM.from_pretrained(micro), folder), lambda: meta_lora_model(config)):
        with pytest.raises(UserError, match=expected) as refused:
            load()
        assert str(folder) in str(refused.value)


def test_adapters_that_are_compared_have_one_base(micro, adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    change_config(base_model_name_or_path="some/other")(other)
    check_same_base([adapter, adapter], {**CONFIG, "model": str(micro)})
    branch = shutil.copytree(adapter, tmp_path / "branch")
    change_config(revision="main")(branch)  # as this project writes it; PEFT leaves it out
    check_same_base([adapter, branch], {**CONFIG, "model": str(micro)})
    for adapters in ([adapter, other], [other]):
        with pytest.raises(UserError, match="different bases.*some/other.*--model"):
            check_same_base(adapters, {**CONFIG, "model": str(micro)})
