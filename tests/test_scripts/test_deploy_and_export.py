"""Deploying to a Space and exporting, against a Hub on loopback."""

import json
import re
import shutil

import pytest
from conftest import ROOT
from fake_hub import TOKEN, FakeHub


@pytest.fixture
def hub():
    server = FakeHub()
    yield server
    server.shutdown()


@pytest.fixture
def adapter(final, tmp_path):
    """The finished adapter, as if it had been trained on the real base."""
    folder = tmp_path / "adapter"
    shutil.copytree(final, folder)
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"not for anybody")
    (folder / "notes.txt").write_text("mine")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "microsoft/phi-2"}))
    return folder


@pytest.fixture
def run(call, monkeypatch):
    """A script's main with a token and a Hub (or none that answers), in this process."""
    from huggingface_hub import constants

    def ask(name: str, *arguments, hub=None, token: str = TOKEN):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url if hub else "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", token)
        return call(name, *arguments)

    return ask


APP = {"README.md", "app.py", "engine.py", "requirements.txt"}
OWN = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
       "generation_config.json", "README.md", "run.json", "metrics.jsonl", "evaluation.jsonl", "reward.png"}  # fmt: skip


def test_a_space_gets_exactly_its_files(run, hub, adapter):
    done = run("deploy_space", "me/demo", "--adapter", adapter, "--private", hub=hub)
    assert done.code == 0, done.err
    sent = hub.repos[("spaces", "me/demo")]
    assert set(sent) == APP | {f"model_adapters/{name}" for name in OWN}
    for name in OWN - {"run.json", "evaluation.jsonl", "README.md"}:
        assert sent[f"model_adapters/{name}"] == (adapter / name).read_bytes()
    for name in APP - {"README.md"}:
        assert sent[name] == (ROOT / "hf_app" / name).read_bytes()
    created = hub.created[0]
    assert created["sdk"] == "gradio" and created["hardware"] == "zero-a10g" and created["visibility"] == "private"
    assert {"key": "GRADIO_SSR_MODE", "value": "false"} in created["variables"]
    assert "spaces/me/demo" in done.out and "hf spaces logs me/demo" in done.out
    assert TOKEN not in done.out + done.err and not any(TOKEN.encode() in data for data in sent.values())


MARK = "qqsecretqq"


@pytest.fixture(scope="module")
def private(micro, tmp_path_factory):
    """A run whose every path holds a marker word, on prompts that hold one, too; and its base."""
    from conftest import script

    home = tmp_path_factory.mktemp("home") / f"{MARK} of: mine"
    home.mkdir()
    base = shutil.copytree(micro, home / f"base-{MARK}")
    (home / f"{MARK}.py").write_text("def mine(answers, **_):\n    return [float(len(a)) for a in answers]\n")
    text = (ROOT / "tiny" / "messages.jsonl").read_text(encoding="utf-8").replace("?", f" {MARK}?")
    (home / f"{MARK}.jsonl").write_text(text, encoding="utf-8")
    own = ("--preset", "tiny", "--model", base, "--data_dir", home / "data")
    done = script("prepare_data", *own, "--dataset", home / f"{MARK}.jsonl")
    assert done.code == 0, done.err
    more = ("--max_completion_length", 12, "--target_tokens", 6, "--per_device_train_batch_size", 8, "--report_to", "none")
    done = script("train_grpo", 1, *own, *more, "--rewards", f"{home}/{MARK}.py:mine", "--output_dir", home / "run")
    assert done.code == 0, done.err
    return home / "run-final", base


def marked(sent: dict[str, bytes]) -> list[str]:
    return [name for name, content in sent.items() if MARK.encode() in content]


def names_only(sent: dict[str, bytes], home: bytes) -> bool:
    """Whether no file has more of a path than its last part."""
    return not any(home in content or b"of: mine" in content for content in sent.values())


def test_what_is_published_says_nothing_of_the_machine_or_the_data(run, hub, private, tmp_path):
    final, base = private
    home = str(final.parent.parent).encode()
    assert MARK in (final / "evaluation.jsonl").read_text() and MARK in (final / "run.json").read_text(), (
        "there is something to hide"
    )
    done = run("export_model", "--adapter", final, "--model", base, "--push_to_hub", "me/adapter", "--private", hub=hub)
    assert done.code == 0 and "left out: run.json: paths of this machine" in done.out, done.err
    assert "held-out prompts with their answers (sent with --with_samples)" in " ".join(done.out.split())
    merged = ("--out", tmp_path / "merged", "--merged", "--push_to_hub", "me/merged")
    assert run("export_model", "--adapter", final, "--model", base, *merged, hub=hub).code == 0
    remote = shutil.copytree(final, tmp_path / "remote")
    config = json.loads((remote / "adapter_config.json").read_text())
    (remote / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "microsoft/phi-2"}))
    dry = run("deploy_space", "me/space", "--adapter", remote, "--dry_run", hub=hub)
    assert "left out: evaluation.jsonl" in dry.out and ("spaces", "me/space") not in hub.repos
    assert run("deploy_space", "me/space", "--adapter", remote, hub=hub).code == 0
    for repo in (("models", "me/adapter"), ("models", "me/merged"), ("spaces", "me/space")):
        sent = hub.repos[repo]
        assert names_only(sent, home), repo
        assert not [name for name in marked(sent) if name.endswith("evaluation.jsonl")], "no text of the data"
    kept = json.loads(hub.repos[("models", "me/adapter")]["evaluation.jsonl"].splitlines()[0])
    assert kept["step"] == 0 and "eval_reward" in kept, "the curve's numbers stay"
    assert json.loads(hub.repos[("models", "me/adapter")]["run.json"])["config"]["data_dir"] == "data"
    done = run("export_model", "--adapter", final, "--model", base, "--push_to_hub", "me/adapter", "--with_samples", hub=hub)
    assert done.code == 0 and MARK.encode() in hub.repos[("models", "me/adapter")]["evaluation.jsonl"]


def test_the_local_card_names_a_local_base_by_its_folder(private):
    final, base = private
    card = (final / "README.md").read_text()
    assert f"LoRA adapter for {base.name}" in card and str(base.parent) not in card


def test_again_only_with_update(run, hub, adapter):
    hub.repos[("spaces", "me/demo")] = {"old.py": b"1"}
    refused = run("deploy_space", "me/demo", "--adapter", adapter, hub=hub)
    assert refused.code == 2 and "--update" in refused.err
    assert hub.repos[("spaces", "me/demo")] == {"old.py": b"1"}
    done = run("deploy_space", "me/demo", "--adapter", adapter, "--update", hub=hub)
    assert done.code == 0, done.err
    assert set(hub.repos[("spaces", "me/demo")]) == APP | {f"model_adapters/{name}" for name in OWN}
    assert not hub.created


def test_a_dry_run_sends_nothing_and_says_what_would_stop_it(run, hub, adapter, tmp_path):
    done = run("deploy_space", "me/demo", "--adapter", adapter, "--dry_run", hub=hub)
    assert done.code == 0 and "nothing stands in the way" in done.out
    assert "adapter_model.safetensors" in done.out and "optimizer.pt" not in done.out
    assert not hub.created and not any(request.startswith("POST") for request in hub.requests)
    for folder, expected in ((tmp_path / "none", "no adapter at"), (adapter, "no token")):
        done = run("deploy_space", "me/demo", "--adapter", folder, "--dry_run", token="")
        assert done.code == 0 and expected in done.out and "Traceback" not in done.err


def _spoil(adapter, name, change):
    found = json.loads((adapter / name).read_text())
    change(found)
    (adapter / name).write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda a: _spoil(a, "adapter_config.json", lambda c: c.update(base_model_name_or_path="/home/me/base")), "base: the adapter was trained on the folder /home/me/base"),
        (lambda a: _spoil(a, "adapter_config.json", lambda c: c.update(base_model_name_or_path="nobody/nothing")), "nobody/nothing is not on the Hub"),
        (lambda a: _spoil(a, "run.json", lambda r: r["versions"].update(peft="0.1.0")), "trained with peft 0.1.0"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors missing"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1"), "is a Git LFS pointer"),
    ],
)  # fmt: skip
def test_what_would_not_run_there_is_not_sent(run, hub, adapter, spoil, expected):
    spoil(adapter)
    done = run("deploy_space", "me/demo", "--adapter", adapter, hub=hub)
    assert done.code == 2 and expected in done.err and "Traceback" not in done.err
    assert not hub.created


@pytest.mark.parametrize(
    ("name", "token", "refuse", "role", "expected"),
    [
        ("me/demo", "hf_wrong", {}, "write", "does not know the token"),
        ("me/demo", TOKEN, {}, "read", "can only read"),
        ("you/demo", TOKEN, {}, "write", "not to you"),
        ("me/demo", TOKEN, {"/api/repos/create": (402, "Payment required")}, "write", "ZeroGPU"),
        ("me/demo", TOKEN, {"/api/repos/create": (403, "Forbidden")}, "write", "may not write"),
        ("me/demo", TOKEN, {"/api/spaces/me/demo/commit": (500, "Oops")}, "write", "go on with --update"),
        ("lab/demo", TOKEN, {"/api/whoami-v2": (429, "Slow down")}, "write", "Wait some minutes"),
        ("demo", TOKEN, {}, "write", "Give USER/NAME"),
        ("me/../x", TOKEN, {}, "write", "no name on the Hub"),
    ],
)
def test_refusals_of_the_hub_in_plain_words(run, hub, adapter, name, token, refuse, role, expected):
    hub.refuse, hub.role = refuse, role
    done = run("deploy_space", name, "--adapter", adapter, hub=hub, token=token)
    assert done.code == 2 and expected in done.err, done.err
    assert "Traceback" not in done.err and token not in done.out + done.err


def test_no_way_to_the_hub(run, adapter):
    done = run("deploy_space", "me/demo", "--adapter", adapter)
    assert done.code == 2 and "cannot be reached" in done.err and TOKEN not in done.err
    assert "Traceback" not in done.err


def test_pins_and_header_of_the_app_are_those_of_the_training():
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    app = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "hf_app" / "requirements.txt").read_text(), re.MULTILINE))
    assert app and all(pins[package] == version for package, version in app.items())
    from huggingface_hub import RepoCard

    header = RepoCard.load(ROOT / "hf_app" / "README.md").data.to_dict()
    assert header["sdk_version"] == pins["gradio"] and header["python_version"] == "3.12"
    import deploy_space

    assert deploy_space.check_files(ROOT / "hf_app") == []


def test_the_readmes_list_the_files_that_a_space_gets():
    for readme in (ROOT / "README.md", ROOT / "hf_app" / "README.md"):
        text = readme.read_text()
        assert all(f"`{name}`" in text for name in APP), readme


# --- export_model.py


def test_merged_weights_answer_as_the_adapter_does(run, final, micro, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from phi2_grpo.models.base import load_base
    from phi2_grpo.models.lora import load_adapter

    out = tmp_path / "merged"
    done = run("export_model", "--model", micro, "--adapter", final, "--out", out)
    assert done.code == 0, done.err
    assert done.out.count("the same") == 4 and "Merged model" in done.out
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    config = {"model": str(micro), "model_revision": "main"}
    base = load_base(config, torch.device("cpu"), torch.float32).eval()
    inputs = tokenizer("Instruct: Why?\nOutput:", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        plain = base(inputs).logits
        tuned = load_adapter(base, str(final)).eval()(inputs).logits
        assert (tuned - plain).abs().max() > 1e-3, "the adapter does nothing, so this test would prove nothing"
        assert (merged(inputs).logits - tuned).abs().max() < 1e-4
    merged.generate(inputs, max_new_tokens=4)  # no stop string stands in the way
    assert tokenizer.chat_template and not merged.generation_config.stop_strings
    assert (out / "README.md").read_text().count("library_name: transformers") == 1
    assert not list(out.glob("*.bin")) and list(out.glob("*.safetensors"))


def test_the_merged_model_s_card_runs_as_it_stands_there(run, final, micro, tmp_path):
    out = tmp_path / "merged"
    assert run("export_model", "--model", micro, "--adapter", final, "--out", out).code == 0
    code = re.search(r"```python\n(.+?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    exec(code.replace("DIR or USER/NAME", str(out)), {})


def test_what_is_there_is_not_replaced_unasked(run, final, micro, tmp_path):
    (tmp_path / "mine").write_text("mine")
    options = ("--model", micro, "--adapter", final, "--out", tmp_path)
    for more in ((), ("--overwrite",)):
        done = run("export_model", *options, *more)
        assert done.code == 2 and "and it stays" in done.err and (tmp_path / "mine").exists(), done.err
    own = shutil.copytree(final, tmp_path / "own")
    done = run("export_model", "--model", micro, "--adapter", own, "--out", own, "--overwrite")
    assert done.code == 2 and "and it stays" in done.err and (own / "adapter_model.safetensors").exists(), done.err
    (own / "README.md").write_text("A card without a header.")
    (tmp_path / "merged").mkdir()  # an empty folder may be taken
    for more in ((), ("--overwrite",)):
        done = run("export_model", "--model", micro, "--adapter", own, "--out", tmp_path / "merged", *more)
        assert done.code == 0, done.err
    done = run("export_model", "--model", micro, "--adapter", own, "--out", tmp_path / "merged")
    assert done.code == 2 and "Replace it: --overwrite" in done.err
    assert (tmp_path / "merged" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n---\nA card without")


def test_a_card_that_the_hub_does_not_take():
    from phi2_grpo.common.cli import UserError
    from phi2_grpo.common.hub import clear_errors

    with pytest.raises(UserError, match="does not take this: Invalid metadata in README.md"), clear_errors("me/x"):
        raise ValueError("Invalid metadata in README.md.")  # what huggingface_hub raises before it sends


def test_the_revision_that_was_asked_for(adapter):
    """A flag counts more than what the adapter names; without it the adapter's counts."""
    from config import CONFIG
    from phi2_grpo.models.base import use_adapter_base

    saved = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**saved, "base_model_name_or_path": "a/b", "revision": "then"}))
    for given, taken in (("main", "then"), ("now", "now")):
        config = {**CONFIG, "model_revision": given}
        use_adapter_base(adapter, config)
        assert (config["model"], config["model_revision"]) == ("a/b", taken)


def test_pushing_sends_the_adapter_or_the_merged_weights(run, hub, final, micro, tmp_path):
    options = ("--model", micro, "--adapter", final)
    done = run("export_model", *options, "--push_to_hub", "me/adapter", "--private", hub=hub)
    assert done.code == 0, done.err
    assert set(hub.repos[("models", "me/adapter")]) == OWN and hub.created[0]["visibility"] == "private"
    out = tmp_path / "merged"
    done = run("export_model", *options, "--out", out, "--push_to_hub", "lab/full", "--merged", hub=hub)
    assert done.code == 0, done.err
    assert set(hub.repos[("models", "lab/full")]) == {path.name for path in out.iterdir()}
    assert TOKEN not in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "nothing to do"),
        (("--merged", "--push_to_hub", "me/x"), "give --out"),
        (("--out", "/tmp/x", "--adapter", "results/nope"), "no adapter at results/nope"),
        (("--push_to_hub", "x y"), "no name on the Hub"),
        (("--push_to_hub", "me/x"), "no token"),
        (("--out", "/dev/null/x"), "cannot write"),
    ],
)
def test_wrong_exports(run, final, arguments, expected):
    done = run("export_model", "--adapter", final, *arguments, token="")
    assert done.code == 2 and expected in done.err and "Traceback" not in done.err, done.err
