"""prepare_data.py and inspect_data.py, from a source to what is shown, and the commands that scripts print."""

import re
import shlex

import datasets
import pytest
from conftest import SHARED, make_micro, ok, read_json, refused

import inspect_data
from phi2_grpo.data import store


def test_a_source_with_splits_keeps_them(call, micro, tmp_path):
    parts = {"train_sft": ["Why?", "How?"], "test_sft": ["why?", "Who?"]}
    tables = {split: datasets.Dataset.from_dict({"prompt": texts}) for split, texts in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "s")
    ok(call("prepare_data", "--model", micro, "--dataset", tmp_path / "s", "--data_dir", tmp_path / "out"))
    kept = datasets.load_from_disk(str(tmp_path / "out" / "s_prompts"))
    texts = {split: [prompt[0]["content"] for prompt in table["prompt"]] for split, table in kept.items()}
    assert texts == {"train": ["How?"], "validation": ["why?", "Who?"]}, "what is held out leaves the training"


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


def test_inspect_shows_what_the_model_sees(call, prepared):
    """By the tokenizer of the model that the data was prepared for."""
    options = ("--preset", "tiny", "--data_dir", prepared)
    done = ok(call("inspect_data", *options, "--language", "es", "--samples", 2, "--search", "cómo"))
    assert done.out.count("Instruct: ") == 2 and "Output:" in done.out and "⏎" in done.out and " tokens" in done.out
    assert (prepared / "inspect-selected.png").read_bytes().startswith(b"\x89PNG")
    assert inspect_data.visible("a\tb\u00a0\u200b\r\n") == "a⇥b⍽\\u200b␍⏎\n"


def test_every_printed_command_runs_as_printed(call, tmp_path):
    """From no data to a training on a reward model, in a folder with spaces and a colon, and with another base."""
    drive = tmp_path / "My Drive" / "it's a run: 2"
    own = ("--preset", "tiny", "--model", make_micro(drive / "a base"), "--data_dir", drive / "data", "--report_to", "none")

    def run_printed(text: str, script: str, *more):
        """The command for `script` that stands on one line of a text, split as a shell splits it."""
        (command,) = set(re.findall(rf"python {script}.py.*", text))
        ok(call(script, *shlex.split(command)[2:], *more))

    missing = call("inspect_data", *own[:6])
    assert missing.code == 2
    run_printed(missing.err, "prepare_data")
    quick = ("--max_completion_length", 12, "--target_tokens", 6, "--per_device_train_batch_size", 8, "--eval_prompts", 0)
    trained = ok(call("train_grpo", 1, *own, *quick, "--output_dir", drive / "run"))
    more = ("--max_prompts", 2, "--samples_per_prompt", 1, "--validation_dir", drive / "v")
    run_printed(trained.out, "validate_model", *more)
    assert (drive / "v" / "report.md").is_file()
    trained = ok(call("train_reward", *own, "--reward_epochs", 1, "--reward_dir", drive / "a reward: mine"))
    run_printed(trained.out, "train_grpo", "--check", "--report_to", "none")


@pytest.mark.skipif(not SHARED.exists(), reason="the real rows and the real tokenizer are not beside this checkout")
def test_real_rows_with_the_real_tokenizer(call, tmp_path):
    source, model = SHARED / "oasst1" / "messages.jsonl", SHARED / "phi2"
    ok(call("prepare_data", "--model", model, "--dataset", source, "--data_dir", tmp_path / "d", "--max_turns", 3))
    funnel = read_json(tmp_path / "d" / "funnel.json")["funnel"]
    assert funnel["train"]["rows"] + funnel["validation"]["rows"] == 1050
    assert funnel["train"]["kept"] > 100 and funnel["validation"]["kept"] > 2
