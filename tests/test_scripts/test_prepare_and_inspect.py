"""prepare_data.py and inspect_data.py, from a source to what is shown."""

import json

import datasets
import pytest
from conftest import SHARED, ok, refused

import inspect_data
from phi2_grpo.data import store


def test_a_source_with_splits_keeps_them(call, micro, tmp_path):
    columns = {"parent_id": None, "role": "prompter", "lang": "en"}
    parts = {"train": ["Why?", "How?"], "validation": ["why?", "Who?"]}
    for split, texts in parts.items():
        parts[split] = datasets.Dataset.from_list(
            [{**columns, "message_id": f"{split} {text}", "text": text} for text in texts]
        )
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "s")
    ok(call("prepare_data", "--model", micro, "--dataset", tmp_path / "s", "--data_dir", tmp_path / "out"))
    kept = datasets.load_from_disk(str(tmp_path / "out" / f"oasst1_{store.PROMPTS}"))
    assert kept["train"]["message_id"][:] == ["train How?"]
    assert kept["validation"]["message_id"][:] == ["validation why?", "validation Who?"]


def test_overwrite_is_needed_and_replaces(call, micro, tmp_path):
    options = ("--preset", "tiny", "--model", micro, "--data_dir", tmp_path / "d")
    ok(call("prepare_data", *options, "--languages", "es"))
    (tmp_path / "d" / "notes.txt").write_text("x")
    before = (tmp_path / "d" / "funnel.json").read_text()
    refused(call("prepare_data", *options), "--overwrite")
    assert (tmp_path / "d" / "funnel.json").read_text() == before
    ok(call("prepare_data", *options, "--overwrite"))
    assert set(datasets.load_from_disk(str(tmp_path / "d" / f"oasst1_{store.PROMPTS}"))["train"]["lang"]) > {"es", "en"}
    left = {path.name for path in (tmp_path / "d").iterdir()}
    assert left == {"oasst1_prompts", "oasst1_preferences", store.FUNNEL, "notes.txt"}


def test_inspect_shows_what_the_model_sees(call, micro, prepared):
    options = ("--preset", "tiny", "--model", micro, "--data_dir", prepared)
    done = ok(call("inspect_data", *options, "--language", "es", "--samples", 2, "--search", "cómo"))
    assert done.out.count("Instruct: ") == 2 and "Output:" in done.out and "⏎" in done.out and " tokens" in done.out
    assert (prepared / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert inspect_data.visible("a\tb\u00a0\u200b\r\n") == "a⇥b⍽\\u200b␍⏎\n"


@pytest.mark.skipif(not SHARED.exists(), reason="the real rows and the real tokenizer are not beside this checkout")
def test_real_rows_with_the_real_tokenizer(call, tmp_path):
    source, model = SHARED / "oasst1" / "messages.jsonl", SHARED / "phi2"
    ok(call("prepare_data", "--model", model, "--dataset", source, "--data_dir", tmp_path / "d", "--max_turns", 3))
    funnel = json.loads((tmp_path / "d" / "funnel.json").read_text())["funnel"]
    assert funnel["train"]["rows"] + funnel["validation"]["rows"] == 1050
    assert funnel["train"]["kept"] > 100 and funnel["validation"]["kept"] > 2
