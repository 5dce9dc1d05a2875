"""The base: where it is, what is refused, where it runs."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import change_json
from safetensors.torch import load_file

from config import CONFIG
from phi2_grpo.common.cli import UserError
from phi2_grpo.models import base
from phi2_grpo.models.base import choose_device, is_same_base, load_base, meta_model, resolve_model, use_adapter_base
from phi2_grpo.models.tokenizer import check_vocabulary, load_tokenizer

CPU = torch.device("cpu")


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def write(name: str, text: str):
    return lambda base: (base / name).write_text(text)


def pickle(base) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


BROKEN = {  # what is done to the folder, and what the message names
    "weights cut": (lambda base: cut(base / "model.safetensors"), "Copy it again"),
    "weights gone": (lambda base: (base / "model.safetensors").unlink(), "Copy it again"),
    "a pickle": (pickle, "as safetensors"),
    "a shard gone": (write("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors"),
    "a Git LFS pointer": (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "config no object": (write("config.json", "[]"), "Copy it again"),
    "no heads": (lambda base: change_json(base / "config.json", num_attention_heads=0), "Copy it again"),
    "an adapter": (lambda base: (base / "config.json").rename(base / "adapter_config.json"), "--init_adapter"),
    "tokenizer cut": (lambda base: cut(base / "tokenizer.json"), "Copy it again"),
    "no end token": (lambda base: change_json(base / "tokenizer_config.json", eos_token=None), "eos_token"),
    "a template that fails": (write("chat_template.jinja", "{{ 1 / 0 }}"), "division by zero"),
    "quantized": (lambda base: change_json(base / "config.json", quantization_config={"quant_method": "gptq"}), "is quantized"),
    "too small a vocabulary": (lambda base: change_json(base / "config.json", vocab_size=99), "copy both again"),
    "fewer weights than layers": (lambda base: change_json(base / "config.json", num_hidden_layers=4), "model.layers.2"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_base_is_refused(micro, tmp_path, how):
    base = shutil.copytree(micro, tmp_path / "base")
    harm, expected = BROKEN[how]
    harm(base)
    config = {**CONFIG, "model": str(base)}
    with pytest.raises(UserError, match=expected) as refused:
        tokenizer = load_tokenizer(config)
        check_vocabulary(tokenizer, meta_model(config))
        load_base(config, CPU, torch.float32)
    assert str(base) in str(refused.value)


def test_a_base_whose_reward_model_has_more_new_weights_than_a_head(monkeypatch):
    monkeypatch.setattr(base, "load_pretrained", lambda *_, **__: (None, {"missing_keys": ["score.weight", "dense.weight"]}))
    with pytest.raises(UserError, match="no weights for dense.weight"):
        base.load_reward_base({"model": "some/model"}, CPU, torch.float32)


def test_a_hub_model_that_is_not_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="some/model.*some-branch.*cannot be loaded") as refused:
        load_tokenizer({"model": "some/model", "model_revision": "some-branch"})
    assert all(remedy in str(refused.value) for remedy in ("hf download some/model", "HF_HUB_OFFLINE", "--model"))


def test_where_the_base_is(micro, monkeypatch):
    monkeypatch.chdir(micro.parent)
    for name in ("microsoft/phi-2", "gpt2"):
        assert resolve_model({"model": name, "model_revision": "v1"}) == (name, "v1")
    for name in (str(micro), "base", "./base"):
        assert resolve_model({"model": name, "model_revision": "main"}) == (str(micro), None)
    assert resolve_model({"model": "tiny", "model_revision": "main"})[0].endswith("tiny-base")
    for name in ("/data/phi", "./phi", "../phi", "~/phi", "a/b/c", "C:\\models\\phi", "My Drive/phi"):
        with pytest.raises(UserError, match="--model FOLDER"):
            resolve_model({"model": name, "model_revision": "main"})


def test_the_same_base(micro):
    hub = {"model": "microsoft/phi-2", "model_revision": "main"}
    for revision, same in ((None, True), ("main", True), ("v1", False)):  # no revision is main
        assert is_same_base(("microsoft/phi-2", revision), hub) is same
    folder = {**hub, "model": str(micro)}
    assert is_same_base((str(micro), None), folder)
    for name in ("microsoft/phi-1", "/gone", None):
        assert not is_same_base((name, None), hub) and not is_same_base((name, None), folder)


@pytest.mark.parametrize(("given", "expected"), [({}, ("some/base", "v1")), ({"model_revision": "v2"}, ("some/base", "v2")),
    ({"model": "other/base"}, ("other/base", "main")), ({"model": "microsoft/phi-2"}, ("microsoft/phi-2", "main"))])  # fmt: skip
def test_an_adapter_names_its_base(tmp_path, given, expected):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "revision": "v1"}')
    config = {**CONFIG, **given}
    use_adapter_base(tmp_path, config, SimpleNamespace(**{"model": None, "model_revision": None, **given}))
    assert (config["model"], config["model_revision"]) == expected


@pytest.mark.parametrize(("capability", "device", "dtype", "expected"), [
    (None, "auto", "auto", "--preset tiny"), ((7, 5), "auto", "auto", "this is 7.5"),
    ((7, 6), "auto", "auto", ("cuda:0", torch.float32)), ("mps", "auto", "auto", "--dtype bfloat16 takes half"),
    ("small mps", "auto", "auto", ("mps", torch.float32)), ("mps", "auto", "bfloat16", ("mps", torch.bfloat16)),
    ("small", "auto", "auto", ("cpu", torch.float32)), ((7, 5), "auto", "float32", ("cuda:0", torch.float32)),
    ((7, 0), "auto", "float32", "7.0, and this PyTorch is built for 7.5"),
    ((8, 0), "auto", "auto", ("cuda:0", torch.bfloat16)), ((9, 0), "cpu", "auto", ("cpu", torch.float32))])  # fmt: skip
def test_device_and_dtype(capability, device, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: isinstance(capability, tuple))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in str(capability))
    monkeypatch.setattr(base.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    monkeypatch.setattr(base, "_parameters", lambda _: 1e8 if capability in ("small", "small mps", (7, 6)) else 2.7e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8e9, 8e9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_120", "compute_120"])
    monkeypatch.setenv("LOCAL_RANK", "3")  # of a scheduler that shows each process one GPU
    config = {"device": device, "dtype": dtype}
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            choose_device(config)
    else:
        assert choose_device(config) == (torch.device(expected[0]), expected[1])
