"""A merged model as engines of another day read it: transformers 4, on which vLLM and llama.cpp's converter were built."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import make_micro
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow  # it installs transformers 4, from the network

READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), AutoTokenizer.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(40, 100)[None]).logits.log_softmax(-1).detach(), sys.argv[2])
talk = [{"role": "user", "content": "What are plants?"}]
print(json.dumps({"ids": tokenizer("A plant.<|end|> Why?")["input_ids"], "chat": tokenizer.apply_chat_template(talk, tokenize=False)}))
"""


@pytest.fixture(scope="module")
def transformers4(tmp_path_factory):
    """PYTHONPATH of a folder with transformers 4.57 and what it needs."""
    folder = tmp_path_factory.mktemp("transformers4")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", folder, "transformers==4.57.6"], check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


def phi(folder):
    """With Phi-2's own share of rotated dimensions, which is not transformers 4's default."""
    return make_micro(folder, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5000.0,
                                                                      "partial_rotary_factor": 0.25})  # fmt: skip


def llama(folder):
    """With stretched positions and a tied head, as Llama-3.2 has them, and more special tokens."""
    make_micro(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=len(tokenizer), tie_word_embeddings=True, rope_parameters=rope)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [phi, llama])
def test_it_is_the_same_model_and_tokenizer_there(call, transformers4, tmp_path, make):
    base = make(tmp_path / "base")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    done = call("export_model", "--model", base, "--adapter", tmp_path / "adapter", "--out", merged)
    assert done.code == 0, done.err
    command = [sys.executable, "-c", READ, str(merged), str(tmp_path / "there.pt")]
    there = subprocess.run(command, env=transformers4, capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained(merged).eval()(torch.arange(40, 100)[None]).logits.log_softmax(-1)
    assert (torch.load(tmp_path / "there.pt") - here).abs().max() < 1e-3
    tokenizer, read = AutoTokenizer.from_pretrained(merged), json.loads(there.stdout.splitlines()[-1])
    talk = [{"role": "user", "content": "What are plants?"}]
    assert read["ids"] == tokenizer("A plant.<|end|> Why?")["input_ids"]
    assert read["chat"] == tokenizer.apply_chat_template(talk, tokenize=False)
