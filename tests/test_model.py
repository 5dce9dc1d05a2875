"""The base, its LoRA and its chat template; with the full size on the meta device."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHARED, make_micro
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import models
from config import CONFIG
from phi2_grpo.common.cli import UserError
from phi2_grpo.models.base import choose_device, load_base
from phi2_grpo.models.lora import load_adapter, lora_config, lora_counts, lora_summary
from phi2_grpo.models.tokenizer import count_tokens, load_tokenizer, render


def full_size():
    with torch.device("meta"):
        return models.full_size_phi2()


def test_full_size_phi2_is_covered_whole():
    base = full_size()
    assert sum(parameter.numel() for parameter in base.parameters()) == 2_779_683_840
    wrapped = get_peft_model(base, lora_config(CONFIG, base))
    kinds, trainable, parameters = lora_counts(wrapped)
    assert kinds == {kind: 32 for kind in ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")}
    assert trainable == 23_592_960 and parameters == 2_779_683_840
    assert "192 modules" in lora_summary(wrapped)


def test_why_the_names_are_mapped():
    """PEFT takes the old names and adapts fc1 and fc2 alone, without a word. If this fails, PEFT has learnt to speak."""
    wrapped = get_peft_model(full_size(), LoraConfig(target_modules=["Wqkv", "out_proj", "fc1", "fc2"], r=16))
    assert set(lora_counts(wrapped)[0]) == {"fc1", "fc2"} and lora_counts(wrapped)[1] == 13_107_200


@pytest.mark.skipif(not SHARED.exists(), reason="the real config is not beside this checkout")
def test_phi2_numbers_are_the_published_ones():
    published = json.loads((SHARED / "phi2" / "config.json").read_text())
    assert {key: published[key] for key in models.PHI2} == models.PHI2


def llama(**sizes):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    return LlamaForCausalLM(LlamaConfig(**shape, **sizes))


@pytest.mark.parametrize(
    ("base", "targets", "kinds"),
    [
        (None, ["Wqkv"], {"q_proj", "k_proj", "v_proj"}),
        (None, ["q_proj", "dense"], {"q_proj", "dense"}),
        (None, ["all-linear"], {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
        (llama, ["gate_proj", "q_proj"], {"gate_proj", "q_proj"}),
        (llama, ["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_targets(micro, base, targets, kinds):
    base = base() if base else AutoModelForCausalLM.from_pretrained(micro)
    wrapped = get_peft_model(base, lora_config({**CONFIG, "model": str(micro), "lora_target_modules": targets}, base))
    assert set(lora_counts(wrapped)[0]) == kinds


@pytest.mark.parametrize(("base", "targets"), [(None, ["Wqkv", "fc3"]), (None, []), (llama, ["Wqkv", "q_proj"])])
def test_a_target_that_matches_nothing_is_an_error(micro, base, targets):
    base = base() if base else AutoModelForCausalLM.from_pretrained(micro)
    with pytest.raises(UserError, match="It has: .*q_proj"):
        lora_config({**CONFIG, "model": str(micro), "lora_target_modules": targets}, base)


def test_chat_template(micro):
    tokenizer = load_tokenizer({"model": str(micro), "model_revision": "main"})
    talk = [
        {"role": "user", "content": " Why?\n"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "And {{ then }}?"},
    ]
    prompt = "Instruct: Why?\nOutput: Because.\nInstruct: And {{ then }}?\nOutput:"
    assert render(tokenizer, [talk[:1], talk]) == ["Instruct: Why?\nOutput:", prompt]
    assert tokenizer.apply_chat_template(talk[:2], tokenize=False) == "Instruct: Why?\nOutput: Because."
    assert count_tokens(tokenizer, [talk]) == [len(tokenizer(prompt)["input_ids"])] and count_tokens(tokenizer, []) == []
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.padding_side == "left"


def test_a_template_of_its_own_stays(micro, tmp_path):
    tokenizer = load_tokenizer({"model": str(micro), "model_revision": "main"})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(micro / "config.json", tmp_path)
    assert load_tokenizer({"model": str(tmp_path), "model_revision": "main"}).chat_template == "{{ messages[0]['content'] }}"


def test_base_is_base_with_the_adapter_off(micro, trained):
    config = {**CONFIG, "model": str(micro)}
    fresh = load_base(config, torch.device("cpu"), torch.float32).eval()
    tuned = load_adapter(load_base(config, torch.device("cpu"), torch.float32), f"{trained}-final").eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad(), tuned.disable_adapter():
        assert torch.equal(tuned(ids).logits, fresh(ids).logits)
    with torch.no_grad():
        assert not torch.equal(tuned(ids).logits, fresh(ids).logits)


def test_adapters_that_do_not_fit(micro, trained, tmp_path):
    config = {**CONFIG, "model": str(micro)}
    final = trained.with_name("grpo-final")

    def refused(folder, base=None, match=""):
        base = base or load_base(config, torch.device("cpu"), torch.float32)
        with pytest.raises(UserError, match=match):
            load_adapter(base, str(folder))

    refused(tmp_path / "none", match="no adapter at")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        partial = shutil.copytree(final, tmp_path / name)
        (partial / name).unlink()
        refused(partial, match=f"{name} missing")
    truncated = shutil.copytree(final, tmp_path / "truncated")
    weights = truncated / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    refused(truncated, match="is broken")
    garbled = shutil.copytree(final, tmp_path / "garbled")
    (garbled / "adapter_config.json").write_text("{")
    refused(garbled, match="is not what PEFT writes")
    wider = make_micro(tmp_path / "wider", hidden_size=64, intermediate_size=128)
    refused(final, AutoModelForCausalLM.from_pretrained(wider), "another base model")
    shallow = make_micro(tmp_path / "shallow", num_hidden_layers=1)
    refused(final, AutoModelForCausalLM.from_pretrained(shallow), "another base")
    refused(final, llama(), "another base|has not")


def test_dropout_is_what_facts_say():
    """Phi-2 ships resid_pdrop 0.1, and TRL leaves dropout on by default: hence disable_dropout in train_grpo.py."""
    from trl import GRPOConfig

    assert full_size().config.resid_pdrop == 0.1
    assert GRPOConfig(output_dir="x", bf16=False, use_cpu=True, report_to="none").disable_dropout is False


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cpu", "auto", torch.float32), ("cpu", "bfloat16", torch.bfloat16), ("auto", "auto", None), ("cuda", "auto", None)],
)
def test_device_without_a_gpu(device, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if expected is None:
        with pytest.raises(UserError, match="--preset tiny"):
            choose_device({"device": device, "dtype": dtype})
    else:
        assert choose_device({"device": device, "dtype": dtype}) == (torch.device("cpu"), expected)


@pytest.mark.parametrize(("capability", "good"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_device_with_a_gpu(capability, good, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some card")
    config = {"device": "auto", "dtype": "auto"}
    if good:
        assert choose_device(config) == (torch.device("cuda", 0), torch.bfloat16)
    else:
        with pytest.raises(UserError, match="--dtype float32"):
            choose_device(config)
        assert choose_device({**config, "dtype": "float32"})[1] == torch.float32


@pytest.mark.slow
def test_loading_phi2_takes_little_more_than_its_weights(tmp_path):
    """The most host memory held while the full-size model is loaded and read once: under 1.3 times its weights."""
    code = """
import sys, resource, torch
from phi2_grpo import model
from benchmarks import models
from config import CONFIG
folder = sys.argv[1]
if len(sys.argv) > 2:
    models.full_size_phi2(torch.bfloat16).save_pretrained(folder)
else:
    base = model.load_base({**CONFIG, "model": folder}, torch.device("cpu"), torch.bfloat16)
    size = sum(parameter.nbytes for parameter in base.parameters() if parameter.abs().max() >= 0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / size)
"""
    for more in (["make"], []):
        command = [sys.executable, "-c", code, str(tmp_path / "base"), *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.3
