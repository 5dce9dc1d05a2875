"""A merged model as engines of another day read it: transformers 4, on which vLLM and llama.cpp's converter were built."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import SHAPE, make_adapter, make_micro, ok
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow  # it installs transformers 4 from the network, unless TF4 names a folder that has it

READ = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), AutoTokenizer.from_pretrained(sys.argv[1])
log_probs = model(torch.arange(40, 100)[None]).logits.log_softmax(-1).detach()
chat = tokenizer.apply_chat_template([{"role": "user", "content": "What are plants?"}], tokenize=False)
torch.save([__version__, log_probs, tokenizer("A plant.<|end|> Why?")["input_ids"], chat], sys.argv[2])
"""


def phi(folder):
    """With Phi-2's own share of rotated dimensions, which is not transformers 4's default."""
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    return make_micro(folder, num_attention_heads=2, rope_parameters=rope)


def llama(folder):
    """With stretched positions and a tied head, as Llama-3.2 has them, and more special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(make_micro(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    config = LlamaConfig(**SHAPE, vocab_size=len(tokenizer), tie_word_embeddings=True, rope_parameters=rope)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [phi, llama])
def test_it_is_the_same_model_and_tokenizer_there(call, tmp_path, make):
    libraries = os.environ.get("TF4") or str(tmp_path / "transformers4")
    if "TF4" not in os.environ:
        install = [sys.executable, "-m", "pip", "install", "-q", "--target", libraries, "transformers==4.57.6"]
        subprocess.run(install, check=True)
    base, merged, read = make(tmp_path / "base"), tmp_path / "merged", []
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    ok(call("export_model", "--model", base, "--adapter", adapter, "--out", merged))
    for path in ({}, {"PYTHONPATH": libraries}):
        command = [sys.executable, "-c", READ, str(merged), str(tmp_path / "read.pt")]
        subprocess.run(command, env={**os.environ, **path}, check=True)
        read.append(torch.load(tmp_path / "read.pt"))
    (_, here, *texts), (version, there, *texts_there) = read
    assert version.startswith("4.57") and (there - here).abs().max() < 1e-3 and texts_there == texts
