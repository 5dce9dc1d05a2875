"""Anything that can be said to the project: it answers, or refuses in words, and never with a traceback.

80 cases each; FUZZ_CASES=10000 for more (benchmarks/fuzz.py does that, and writes down what it found).
"""

import contextlib
import copy
import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from engine import BadInput
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import CONFIG
from phi2_grpo.common import cli
from phi2_grpo.data import oasst, prompts, sources, store
from phi2_grpo.models.base import load_base, use_adapter_base
from phi2_grpo.models.lora import check_adapter, load_adapter
from phi2_grpo.models.tokenizer import count_tokens
from validate_model import TRAINED_WITH, use_training_settings

ANY = settings(max_examples=int(os.environ.get("FUZZ_CASES", "80")), deadline=None, database=None,
               suppress_health_check=list(HealthCheck), derandomize="FUZZ_CASES" not in os.environ)  # fmt: skip

leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
value = st.recursive(
    leaf, lambda any: st.lists(any, max_size=4) | st.dictionaries(st.text(max_size=8), any, max_size=4), max_leaves=12
)
text = st.text() | st.text(alphabet="\x00\ud800\ufeff\u2028\u202eé中😀<|endoftext|>\n Instruct:Output", max_size=60)
# Mostly right, so that what lies behind the first check is reached too.
right = {"message_id": st.sampled_from("abcd"), "parent_id": st.none() | st.sampled_from("abcd"), "message_tree_id": st.just("t"),
         "text": text, "role": st.sampled_from(("prompter", "assistant")), "lang": st.just("en")}  # fmt: skip
odd = {"rank": st.none() | st.integers(0, 3) | value, "deleted": st.booleans() | value, "review_result": st.booleans() | value,
       "labels": value | st.fixed_dictionaries({"name": st.lists(st.just("toxicity")), "value": value}),
       "detoxify": value | st.fixed_dictionaries({"toxicity": value}), "replies": value, "prompt": value}  # fmt: skip
row = st.fixed_dictionaries(right, optional=odd) | st.fixed_dictionaries(
    {}, optional={key: value | right[key] for key in right} | odd
)


@pytest.fixture(scope="module")
def base(micro):
    return load_base({**CONFIG, "model": str(micro)}, torch.device("cpu"), torch.float32)


@ANY
@given(st.lists(row | value, max_size=9), st.integers(1, 3), st.sampled_from((1.0, 0.5)))
def test_rows_of_any_kind(tokenizer, rows, max_turns, max_toxicity):
    """prepare_data: rows to messages, to prompts, to the model's text."""
    messages = []
    for each in json.loads(json.dumps(rows)):
        with contextlib.suppress(cli.UserError):
            messages += oasst.parse_messages([each], "")
    kept, funnel = oasst.filter_prompts(messages, partial(count_tokens, tokenizer), {"en"}, 50, max_turns, max_toxicity)
    distinct, pairs, _ = prompts.deduplicate(kept, set())
    assert len(distinct) <= funnel["50 tokens at most"] <= funnel["rows"] == len(messages)
    check_prepared(distinct, pairs)


def check_prepared(rows, pairs):
    assert all(row["prompt"][-1]["role"] == "user" and row["prompt"][-1]["content"].strip() for row in rows)
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)


turn = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(("user", "assistant", "system")) | value, "content": text | value,
                  "from": st.sampled_from(("human", "gpt")) | value, "value": text | value}
)  # fmt: skip
own_columns = (*prompts.PROMPT_COLUMNS, *prompts.REFERENCE_COLUMNS, "rejected", "input", "lang", "id", "pairs", "answers")
own_row = st.dictionaries(st.sampled_from(own_columns) | st.text(max_size=8), text | st.lists(turn, max_size=4) | value)


@ANY
@given(st.lists(own_row | value, min_size=1, max_size=6), text)
def test_own_prompts_of_any_kind(tokenizer, tmp_path_factory, rows, system_prompt):
    """The same for prompts of one's own, from a file to the tables that are stored."""
    path = tmp_path_factory.getbasetemp() / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.suppress(cli.UserError):
        splits, _ = sources.read_rows(str(path), "main")
        first, splits = prompts.peek(splits)
        form = prompts.find_form(first, "", "")
        items = prompts.read(splits, form, system_prompt.encode("utf-8", "ignore").decode().strip())[""]  # as cli.py takes it
        kept, funnel = prompts.filter_prompts(items, partial(count_tokens, tokenizer), {prompts.UNKNOWN, "en"}, 50)
        distinct, pairs, _ = prompts.deduplicate(kept, set())
        check_prepared(distinct, pairs)
        store._tables({"train": distinct, "validation": []}, store.FEATURES[store.PROMPTS], with_others=True)


@ANY
@given(st.lists(st.binary(max_size=40) | text.map(lambda said: said.encode("utf-8", "replace")), max_size=5))
def test_files_of_any_kind(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    with contextlib.suppress(cli.UserError):
        oasst.read_messages(str(path), "main")


@ANY
@given(
    st.lists(st.sampled_from([f"--{key}" for key in CONFIG]) | text | st.integers().map(str) | st.floats().map(str), max_size=5)
)
def test_flags_of_any_kind(words):
    parser = cli.make_parser("", tuple(CONFIG))
    with contextlib.suppress(cli.UserError):
        config, _ = cli.parse(parser, [word for word in words if word not in ("-h", "--help")])
        assert {key: type(of) for key, of in config.items()} == {key: type(of) for key, of in CONFIG.items()}


@ANY
@given(st.data())
def test_adapters_of_any_kind(base, final, tmp_path_factory, data):
    """A real folder with one of its files replaced, by other JSON or by other bytes."""
    folder = tmp_path_factory.getbasetemp() / "any-adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(final, folder)
    names = ("adapter_config.json", "adapter_model.safetensors", "generation_config.json", "run.json")
    path = folder / data.draw(st.sampled_from(names))
    if path.suffix == ".json" and data.draw(st.booleans()):
        content = json.loads(path.read_text())
        for key in data.draw(st.lists(st.sampled_from(sorted(content)), max_size=3)):
            content[key] = data.draw(value)
        path.write_text(json.dumps(data.draw(value) if data.draw(st.booleans()) else content))
    else:
        path.write_bytes(data.draw(st.binary(max_size=60)) + path.read_bytes()[data.draw(st.integers(0, 400)) :])
    with contextlib.suppress(cli.UserError):
        use_training_settings({**CONFIG, "adapter": str(folder)}, SimpleNamespace(**dict.fromkeys(TRAINED_WITH)))
    with contextlib.suppress(cli.UserError):
        use_adapter_base(check_adapter(str(folder)), {**CONFIG}, SimpleNamespace(model=None, model_revision=None))
    with contextlib.suppress(cli.UserError):
        load_adapter(copy.deepcopy(base), str(folder))


chat_settings = st.dictionaries(st.sampled_from(("max_new_tokens", "temperature", "top_p", "seed", "sample", "stop")), value)


@ANY
@given(st.lists(text, min_size=1, max_size=5), st.integers(1, 200), chat_settings)
def test_questions_of_any_kind(engine, said, new, given_settings):
    """The app: what is asked becomes a prompt that ends where the answer begins, or is refused in words."""
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": each} for i, each in enumerate(said)]
    with contextlib.suppress(BadInput):
        prompt, left_out = engine.prompt(messages if len(messages) % 2 else messages[:-1], new)
        assert prompt.endswith("Output:") and left_out % 2 == 0
        assert len(engine.tokenizer(prompt, add_special_tokens=False)["input_ids"]) + new <= engine.context
    with contextlib.suppress(BadInput):
        engine.settings(**given_settings)
