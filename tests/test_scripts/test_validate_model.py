"""validate_model.py on the micro model: its files, its settings, and adapters that it refuses."""

import re
import shutil

import numpy
import pytest
from conftest import change_json, ok, read_json, refused, rows_of

from phi2_grpo.models.tokenizer import SAMPLE_PROMPTS
from phi2_grpo.training import model_card


@pytest.fixture
def options(quick, final, tmp_path) -> tuple:
    return (*quick[:10], "--adapter", final, "--validation_dir", tmp_path / "v", "--max_prompts", 12, "--samples_per_prompt", 2)


def test_report(call, options, tmp_path):
    done = ok(call("validate_model", *options))
    assert {path.name for path in (tmp_path / "v").iterdir()} == {"report.json", "report.md", "validation.png", "samples.jsonl"}
    numbers = read_json(tmp_path / "v" / "report.json")
    assert numbers["prompts"] == 12 and numbers["headline"] == "length"
    assert set(numbers["metrics"]) == {"length", "ending", "repetition", "language", "reference", "answer tokens", "distinct-2",
                                       "KL to base", "reference NLL"}  # fmt: skip
    length, kl = numbers["metrics"]["length"], numbers["metrics"]["KL to base"]
    assert length["trained"] and abs(length["tuned"] - length["base"] - length["difference"]) < 2e-4
    assert length["low"] <= length["difference"] <= length["high"] and kl["base"] == 0 < kl["tuned"]
    assert " ".join(numbers["line"].split()) in " ".join(done.out.split()), "the line to quote is printed"
    samples = rows_of(tmp_path / "v", "samples.jsonl")
    assert len(samples) == 2 * 12 * 2 and all(sample["finish_reason"] for sample in samples)
    mean = numpy.mean([sample["scores"]["length"] for sample in samples if sample["side"] == "tuned"])
    assert mean == pytest.approx(length["tuned"], abs=1e-3), "the report's numbers are those of the samples"
    text = (tmp_path / "v" / "report.md").read_text()
    for part in (numbers["line"], "## Most improved", "## Most harmed", "## At random", "validation.png", *SAMPLE_PROMPTS):
        assert part in text
    explained = set(re.findall(r"^- \*(.+?)\*: \w", text, re.MULTILINE))
    assert explained == set(numbers["metrics"]), "every metric is explained"
    ok(call("validate_model", *options))
    assert read_json(tmp_path / "v" / "report.json")["metrics"] == numbers["metrics"], "the same seed, the same numbers"


def test_the_model_card(call, options, final, tmp_path):
    """It gets the numbers once, where there are prompts enough, measured as the adapter was trained."""
    adapter = shutil.copytree(final, tmp_path / "adapter")
    options, card = (*options, "--adapter", adapter, "--samples_per_prompt", 1), adapter / "README.md"
    data = read_json(adapter / "run.json")["data"]
    change_json(adapter / "run.json", data={**data, "earlier": ["of other data"]})  # of the adapter that it began with
    ok(call("validate_model", *options, "--max_prompts", 25))
    assert model_card.VALIDATED not in card.read_text() and "may have seen" in (tmp_path / "v" / "report.md").read_text()
    change_json(adapter / "run.json", data=data)
    for prompts, flags, validated in ((12, (), 0), (25, ("--temperature", 0.5), 0), (25, (), 1), (25, (), 1)):
        ok(call("validate_model", *options, "--max_prompts", prompts, *flags))
        assert card.read_text().count(model_card.VALIDATED) == validated
        assert (read_json(tmp_path / "v" / "report.json")["line"] in card.read_text()) == bool(validated)


def test_another_adapter_instead_of_the_base(call, options, loud, final, tmp_path):
    ok(call("validate_model", *options, "--against", loud))
    numbers = read_json(tmp_path / "v" / "report.json")
    assert numbers["names"] == [str(loud), str(final)], "the same name: the paths tell them apart"
    assert numbers["metrics"]["KL to base"]["base"] > 0
    twin = shutil.copytree(final, tmp_path / "twin")
    change_json(twin / "run.json", data={"fingerprint": "another"})
    done = call("validate_model", *options, "--against", twin)
    assert done.code == 0 and f"{twin} was trained on other data" in " ".join(done.out.split()), done.err
    numbers = read_json(tmp_path / "v" / "report.json")
    assert numbers["names"] == [twin.name, final.name]
    assert all(metric["difference"] == 0 for metric in numbers["metrics"].values()), "the same, sampled alike"


def test_it_is_measured_as_it_was_trained(call, quick, final, tmp_path, monkeypatch):
    """Base, target, length and temperature come from the adapter's run.json, unless a flag says otherwise; of the chat from its
    generation_config.json, which another program may have written."""
    own = shutil.copytree(final, tmp_path / "a")
    (own / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6}')
    own = (*quick[4:6], "--adapter", own, "--validation_dir", tmp_path / "v", "--max_prompts", 5)  # --data_dir
    monkeypatch.setattr("phi2_grpo.models.embedded.prepare", lambda *_: None)  # the tiny base takes minutes to build
    refused(call("validate_model", "--preset", "tiny", *own), "others than --preset")
    ok(call("validate_model", "--device", "cpu", *own, "--temperature", 0.5))
    config = read_json(tmp_path / "v" / "report.json")["config"]
    assert (config["target_tokens"], config["max_completion_length"], config["temperature"]) == (6, 12, 0.5)
    done = call("validate_model", "--device", "cpu", *own, "--max_completion_length", 500)
    refused(done, "context of 512. Give --max_completion_length ")


def test_a_reward_of_the_user_s_may_be_called_correct(call, options, tmp_path):
    """And need not be 0 or 1, as pass@k has it."""
    (tmp_path / "mine.py").write_text("def correct(answers, **_):\n    return [2.0 for _ in answers]\n")
    ok(call("validate_model", *options, "--rewards", f"{tmp_path}/mine.py:correct"))
    report = read_json(tmp_path / "v" / "report.json")
    assert report["metrics"]["correct"]["tuned"] == 2.0 and "accuracy" not in report


def test_what_is_no_report_is_not_replaced(call, options, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "report.md").write_text("my thesis")
    refused(call("validate_model", *options), str(tmp_path / "v"), "another folder")
    assert (tmp_path / "v" / "report.md").read_text() == "my thesis"


@pytest.mark.parametrize(("name", "text", "flag", "expected"), [
    ("run.json", '{"config": {"temperature": "hot"}}', "--adapter", "--temperature is 'hot'"),
    ("run.json", '{"config": {"rewards": ["theirs.py:steal"]}}', "--adapter", "--rewards theirs.py:steal"),
    ("adapter_model.safetensors", "{", "--against", "damaged")])  # fmt: skip
def test_adapters_that_are_refused(call, options, final, tmp_path, name, text, flag, expected):
    folder = shutil.copytree(final, tmp_path / "damaged")
    (folder / name).write_text(text)
    without_flags = (*options[:6], *options[10:])  # settings come from run.json
    refused(call("validate_model", *without_flags, flag, folder), expected)
