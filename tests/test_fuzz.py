"""Anything that can be said to the project: it answers, or refuses in words, and never with a traceback.

300 cases each; FUZZ_CASES=10000 for more (benchmarks/fuzz.py does that, and writes down what it found).
"""

import contextlib
import json
import os
import shutil

import pytest
import serve_app  # noqa: F401, it puts the app's folder on the path
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import CONFIG
from phi2_grpo.common import cli
from phi2_grpo.data import oasst, sources
from phi2_grpo.models.base import load_base, use_adapter_base
from phi2_grpo.models.lora import check_adapter, load_adapter
from phi2_grpo.models.tokenizer import count_tokens, load_tokenizer

ANY = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", "300")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize="FUZZ_CASES" not in os.environ,
)

value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
text = st.text() | st.text(alphabet="\x00\ud800\ufeff\u2028\u202eé中😀<|endoftext|>\n Instruct:Output", max_size=60)
named = st.fixed_dictionaries(
    {},
    optional={
        "message_id": st.sampled_from("abcd") | value,
        "parent_id": st.none() | st.sampled_from("abcd") | value,
        "message_tree_id": st.sampled_from("ab") | value,
        "text": text | value,
        "role": st.sampled_from(("prompter", "assistant")) | value,
        "lang": st.sampled_from(("en", "es")) | value,
        "rank": st.none() | st.integers(0, 3) | value,
        "review_result": st.none() | st.booleans() | value,
        "deleted": st.none() | st.booleans() | value,
        "labels": value | st.fixed_dictionaries({"name": st.lists(st.just("toxicity") | st.text(max_size=4)), "value": value}),
        "detoxify": value | st.fixed_dictionaries({"toxicity": value}),
    },
)
# Mostly right, so that what lies behind the first check is reached too.
right = st.builds(
    lambda i, parent, said, role, rank: {
        "message_id": i, "parent_id": parent, "message_tree_id": "t", "text": said, "role": role, "lang": "en", "rank": rank
    },
    st.sampled_from("abcdef"), st.none() | st.sampled_from("abcdef"), text, st.sampled_from(("prompter", "assistant")),
    st.none() | st.integers(0, 3),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(micro):
    return load_tokenizer({**CONFIG, "model": str(micro)})


@ANY
@given(st.lists(right | named | value, max_size=9), st.integers(1, 3), st.sampled_from((1.0, 0.5)))
def test_rows_of_any_kind(tokenizer, rows, max_turns, max_toxicity):
    """prepare_data: rows to messages, to chunks' lines, to prompts, to the model's text."""
    messages = []
    for row in rows:
        with contextlib.suppress(cli.UserError):
            message = sources._message(json.loads(json.dumps(row)), "row 1,")
            messages.append(sources.Message(*json.loads(json.dumps(message))))
    found, funnel = oasst.filter_prompts(
        messages, lambda talks: count_tokens(tokenizer, talks), None, 50, max_turns, max_toxicity
    )
    prompts, pairs = oasst.deduplicate(found, set(), set())
    assert len(prompts) <= funnel["50 tokens at most"] <= funnel["rows"] == len(messages)
    assert all(row["prompt"][-1]["role"] == "user" and row["prompt"][-1]["content"].strip() for row in prompts)
    assert all(pair["chosen"] != pair["rejected"] and pair["rank_distance"] > 0 for pair in pairs)


@ANY
@given(st.lists(st.binary(max_size=40) | text.map(lambda said: said.encode("utf-8", "replace")), max_size=5))
def test_files_of_any_kind(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    with contextlib.suppress(cli.UserError):
        list(sources.read_messages(str(path), "main", False)[0][""])


@ANY
@given(
    st.lists(st.sampled_from([f"--{key}" for key in CONFIG]) | text | st.integers().map(str) | st.floats().map(str), max_size=5)
)
def test_flags_of_any_kind(words):
    parser = cli.make_parser("", tuple(CONFIG))
    try:
        config, _ = cli.parse(parser, [word for word in words if word not in ("-h", "--help")])
    except cli.UserError:
        return
    assert config.keys() == CONFIG.keys()
    assert all(type(config[key]) is type(CONFIG[key]) for key in CONFIG)


@pytest.fixture(scope="module")
def base(micro):
    return load_base({**CONFIG, "model": str(micro)}, torch.device("cpu"), torch.float32)


@ANY
@given(st.data())
def test_adapters_of_any_kind(base, final, tmp_path_factory, data):
    """A real folder with one of its files replaced, by other JSON or by other bytes."""
    folder = tmp_path_factory.getbasetemp() / "any-adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(final, folder)
    name = data.draw(
        st.sampled_from(("adapter_config.json", "adapter_model.safetensors", "generation_config.json", "run.json"))
    )
    if name.endswith(".json") and data.draw(st.booleans()):
        content = json.loads((folder / name).read_text())
        for key in data.draw(st.lists(st.sampled_from(sorted(content)), max_size=3)):
            content[key] = data.draw(value)
        new = json.dumps(data.draw(value) if data.draw(st.booleans()) else content).encode()
    else:
        old = (folder / name).read_bytes()
        new = data.draw(st.binary(max_size=60)) + old[data.draw(st.integers(0, 400)) :]
    (folder / name).write_bytes(new)
    config = {**CONFIG, "adapter": str(folder)}
    with contextlib.suppress(cli.UserError):
        from types import SimpleNamespace

        from validate_model import TRAINED_WITH, take_settings_of

        take_settings_of(folder, config, SimpleNamespace(**dict.fromkeys(TRAINED_WITH)))
    with contextlib.suppress(cli.UserError):
        use_adapter_base(check_adapter(str(folder)), {**CONFIG})
    try:
        load_adapter(base, str(folder)).unload()
    except cli.UserError:
        for module in base.modules():  # PEFT may have put its layers in before it failed
            for child, layer in list(module.named_children()):
                if hasattr(layer, "base_layer"):
                    setattr(module, child, layer.base_layer)


@pytest.fixture(scope="module")
def engine(loud, micro):
    import engine as app_engine

    made = app_engine.Engine(loud, str(micro))
    yield made
    made.close()


@ANY
@given(
    st.lists(text, min_size=1, max_size=5),
    st.integers(1, 200),
    st.dictionaries(st.sampled_from(("max_new_tokens", "temperature", "top_p", "seed", "sample", "stop")), value, max_size=3),
)
def test_questions_of_any_kind(engine, said, new, given_settings):
    """The app: what is asked becomes a prompt that ends where the answer begins, or is refused in words."""
    import engine as app_engine

    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": each} for i, each in enumerate(said)]
    try:
        prompt, left_out = engine.prompt(messages if len(messages) % 2 else messages[:-1] or messages, new)
    except app_engine.BadInput:
        pass
    else:
        assert prompt.endswith("Output:") and left_out % 2 == 0
        assert len(engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]) + new <= engine.context
    with contextlib.suppress(app_engine.BadInput):
        engine.settings(**given_settings)
