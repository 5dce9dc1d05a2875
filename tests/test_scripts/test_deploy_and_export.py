"""Deploying to a Space and exporting, against a Hub on loopback."""

import json
import re
import shutil

import pytest
import torch
from conftest import ADAPTER_FILES, ROOT, WEIGHTS, change_json, ok, refused, rows_of
from fake_hub import TOKEN, FakeHub
from huggingface_hub import RepoCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi2_grpo.common import hub as hub_files
from phi2_grpo.models.base import load_base
from phi2_grpo.models.lora import load_adapter

SENT = ADAPTER_FILES - {"evaluation.jsonl"}
APP = {"README.md", "app.py", "engine.py", "requirements.txt"}


@pytest.fixture
def hub():
    server = FakeHub()
    yield server
    server.shutdown()


@pytest.fixture
def adapter(final, tmp_path):
    """The finished adapter, as if it had been trained on the real base, with files that are nobody's business."""
    folder = shutil.copytree(final, tmp_path / "adapter")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"not for anybody")
    change_json(folder / "adapter_config.json", base_model_name_or_path="microsoft/phi-2")
    return folder


@pytest.fixture
def run(call, monkeypatch):
    """A script's main with a token and a Hub (or none that answers), in this process."""

    def ask(name: str, *arguments, hub=None, token: str = TOKEN):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url if hub else "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", token)
        done = call(name, *arguments)
        assert "Traceback" not in done.err and (not token or token not in done.out + done.err), done.err
        return done

    return ask


def test_a_space_gets_exactly_its_files_and_is_replaced_only_by_update(run, hub, adapter):
    dry = run("deploy_space", "me/demo", "--adapter", adapter, "--dry_run", hub=hub)
    assert dry.code == 0 and "adapter_model.safetensors" in dry.out and "optimizer.pt" not in dry.out
    assert not any(request.startswith("POST") for request in hub.requests), "a dry run sends nothing"
    assert "spaces/me/demo" in ok(run("deploy_space", "me/demo", "--adapter", adapter, "--private", hub=hub)).out
    sent, expected = hub.repos[("spaces", "me/demo")], APP | {f"model_adapters/{name}" for name in SENT}
    assert set(sent) == expected
    assert all(sent[name] == (ROOT / "hf_app" / name).read_bytes() for name in APP - {"README.md"})
    assert sent[f"model_adapters/{WEIGHTS}"] == (adapter / WEIGHTS).read_bytes()
    assert b"title: phi-2 GRPO" in sent["README.md"] and sent["README.md"].count(b"- microsoft/phi-2") == 2
    (created,) = hub.created
    assert (created["sdk"], created["hardware"], created["visibility"]) == ("gradio", "zero-a10g", "private")
    sent["old.py"] = b"1"
    refused(run("deploy_space", "me/demo", "--adapter", adapter, "--dry_run", hub=hub), "--update")
    refused(run("deploy_space", "me/demo", "--adapter", adapter, "--update", "--hardware", "x", hub=hub), "are for a new")
    refused(run("deploy_space", "me/demo", "--adapter", adapter, hub=hub), "--update")
    assert set(sent) == {*expected, "old.py"}
    ok(run("deploy_space", "me/demo", "--adapter", adapter, "--update", hub=hub))
    assert set(sent) == expected and len(hub.created) == 1
    assert run("deploy_space", "me/other", "--adapter", adapter, "--update", hub=hub).code == 2


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("adapter_config.json", '{"base_model_name_or_path": "/home/me/base"}', "/home/me/base"),
    ("adapter_config.json", '{"base_model_name_or_path": "nobody/nothing"}', "nobody/nothing"),
    ("adapter_model.safetensors", "version https://git-lfs.github.com", "git lfs pull"),
    ("run.json", '{"config": ', "run.json")])  # fmt: skip
def test_what_would_not_run_there_is_not_sent(run, hub, adapter, name, text, expected):
    (adapter / name).write_text(text)
    refused(run("deploy_space", "me/demo", "--adapter", adapter, hub=hub), expected)
    assert not hub.created


@pytest.mark.parametrize(("name", "token", "refuse", "role", "expected"), [
    ("me/demo", "", {}, "write", "hf auth login"), ("me/demo", "hf_wrong", {}, "write", "401|hf auth login"),
    ("me/demo", TOKEN, {}, "read", "hf auth login"), ("you/demo", TOKEN, {}, "write", "me or lab"),
    ("me/demo", TOKEN, {"/api/repos/create": (402, "Payment required")}, "write", "Payment required.*ZeroGPU"),
    ("me/demo", TOKEN, {"/api/repos/create": (403, "Forbidden")}, "write", "Forbidden.*hf auth login"),
    ("me/demo", TOKEN, {"/api/spaces/me/demo/commit": (500, "Oops")}, "write", "--update.*Oops"),
    ("lab/demo", TOKEN, {"/api/whoami-v2": (429, "Slow down")}, "write", "Wait"),
    ("demo", TOKEN, {}, "write", "USER/NAME"), ("me/../x", TOKEN, {}, "write", "me/../x"),
    ("me/demo", TOKEN, None, "write", "network")])  # no answer at all  # fmt: skip
def test_refusals_of_the_hub_give_the_next_step(run, hub, adapter, name, token, refuse, role, expected):
    hub.refuse, hub.role = refuse, role
    done = run("deploy_space", name, "--adapter", adapter, hub=None if refuse is None else hub, token=token)
    assert done.code == 2 and re.search(expected, done.err), done.err


def test_pins_and_header_of_the_app_are_those_of_the_training():
    paths = (ROOT / "requirements.txt", ROOT / "hf_app" / "requirements.txt")
    pins, app = (dict(re.findall(r"^([\w-]+)==(.+)$", path.read_text(), re.MULTILINE)) for path in paths)
    assert app and app.items() <= pins.items()
    header = RepoCard.load(ROOT / "hf_app" / "README.md").data.to_dict()
    assert (header["sdk"], header["sdk_version"], header["app_file"]) == ("gradio", pins["gradio"], "app.py")
    assert header["title"] and header["python_version"] == "3.12" and len(header["short_description"]) <= 60


def test_merged_weights_are_the_adapter_s_model_for_any_reader(run, hub, final, micro, tmp_path):
    out = tmp_path / "merged"
    push = ("--push_to_hub", "lab/full", "--merged")
    assert "4 of 4" in ok(run("export_model", "--model", micro, "--adapter", final, "--out", out, *push, hub=hub)).out
    assert set(hub.repos[("models", "lab/full")]) == {path.name for path in out.iterdir()}
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    base = load_base({"model": str(micro), "model_revision": "main"}, torch.device("cpu"), torch.float32).eval()
    inputs = tokenizer("Instruct: Why?\nOutput:", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        plain = base(inputs).logits
        tuned = load_adapter(base, str(final)).eval()(inputs).logits
        assert (tuned - plain).abs().max() > 1e-3, "the adapter does nothing, so this test would prove nothing"
        assert (merged(inputs).logits - tuned).abs().max() < 1e-4
    assert tokenizer.chat_template and not merged.generation_config.stop_strings
    card = (out / "README.md").read_text()
    assert card.count("library_name: transformers") == 1 and "reward.png" not in card
    exec(re.search(r"```python\n(.+?)```", card, re.DOTALL)[1].replace('"."', f'"{out}"'), {})


def test_what_is_published_holds_no_path_and_no_held_out_prompt(run, hub, adapter, final, micro, tmp_path, tmp_path_factory):
    private = str(tmp_path_factory.getbasetemp())  # where base, data and outputs of this run are
    prompts = [answer["prompt"] for row in rows_of(final, "evaluation.jsonl") for answer in row["answers"]]
    assert private in (final / "run.json").read_text() and prompts, "there is something to hide"
    push = ("--model", micro, "--adapter", final, "--push_to_hub", "me/adapter")
    assert "changed: run.json" in ok(run("export_model", *push, "--private", hub=hub)).out
    assert set(hub.repos[("models", "me/adapter")]) == SENT and hub.created[0]["visibility"] == "private"
    out = tmp_path / "merged"
    merged = ("--out", out, "--merged", "--push_to_hub", "me/merged")
    ok(run("export_model", "--model", micro, "--adapter", final, *merged, hub=hub))
    ok(run("deploy_space", "me/space", "--adapter", adapter, hub=hub))
    for repo in (("models", "me/adapter"), ("models", "me/merged"), ("spaces", "me/space")):
        texts = {name: content for name, content in hub.repos[repo].items() if not name.endswith((".safetensors", ".png"))}
        assert not [name for name, content in texts.items() if private.encode() in content], repo
        assert not [name for name, content in texts.items() for p in prompts if json.dumps(p)[1:-1].encode() in content], repo
    config = json.loads(hub.repos[("models", "me/adapter")]["run.json"])["config"]
    assert config["model"] == micro.name and config["learning_rate"] > 0
    refused(run("export_model", *push[:-1], "me/merged", "--private", hub=hub), "public")  # it is, since the push above
    refused(run("export_model", *push[:-1], "me/merged", hub=hub), "a name each")


def test_names_that_only_look_like_the_hub_s_are_paths(tmp_path):
    config = {"model": "clients/acme", "init_adapter": "runs/acme", "data_dir": "clients/acme", "learning_rate": 1e-5,
              "rewards": ["clients/acme/rewards.py:polite:0.5", "user/reward-model:2"]}  # fmt: skip
    data = {"dataset": "clients/acme.csv", "commit": None}
    (tmp_path / "run.json").write_text(json.dumps({"config": config, "model_commit": None, "data": data}))
    texts, _ = hub_files.public_files([tmp_path / "run.json"])
    sent = json.loads(texts["run.json"])
    assert sent["config"] == {"model": "acme", "init_adapter": "acme", "data_dir": "acme", "learning_rate": 1e-5,
                              "rewards": ["rewards.py:polite:0.5", "user/reward-model:2"]} and sent["data"]["dataset"] == "acme.csv"  # fmt: skip
    config, data = {"model": "microsoft/phi-2"}, {"dataset": "OpenAssistant/oasst1", "commit": "1" * 40}
    (tmp_path / "run.json").write_text(json.dumps({"config": config, "model_commit": "1" * 40, "data": data}))
    assert hub_files.public_files([tmp_path / "run.json"])[1] == [], "of the Hub's own names nothing is left out"


def test_what_is_there_is_not_replaced_unasked(run, final, micro, tmp_path):
    own = shutil.copytree(final, tmp_path / "own")
    for folder in (tmp_path, own):  # somebody's files, and an adapter
        done = run("export_model", "--model", micro, "--adapter", own, "--out", folder, "--overwrite")
        assert done.code == 2 and str(folder) in done.err and (own / "adapter_model.safetensors").exists(), done.err
    (own / "README.md").write_text("A card without a header.")
    out = tmp_path / "merged"
    out.mkdir()  # an empty folder may be taken
    export = ("export_model", "--model", micro, "--adapter", own, "--out", out)
    assert [run(*export, *more).code for more in ((), (), ("--overwrite",))] == [0, 2, 0]
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers\n---\nA card without")


@pytest.mark.parametrize(("arguments", "expected"), [((), "--out DIR"), (("--merged", "--push_to_hub", "me/x"), "--out DIR"),
    (("--out", "/tmp/x", "--adapter", "results/nope"), "results/nope"), (("--push_to_hub", "x y"), "x y"),
    (("--out", "/dev/null/x"), "/dev/null")])  # fmt: skip
def test_wrong_exports(run, final, arguments, expected):
    refused(run("export_model", "--adapter", final, *arguments, token=""), expected)
