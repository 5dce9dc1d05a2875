"""validate_model.py on the micro model: its files, its settings, and adapters that it refuses."""

import json
import shutil

import numpy
import pytest
from conftest import refused

from phi2_grpo.evaluation import report
from phi2_grpo.models.tokenizer import SAMPLE_PROMPTS
from phi2_grpo.training import model_card


@pytest.fixture
def options(quick, final, tmp_path) -> tuple:
    return (*quick[:10], "--adapter", final, "--validation_dir", tmp_path / "v", "--max_prompts", 12, "--samples_per_prompt", 2)


def report_of(folder) -> dict:
    return json.loads((folder / "v" / "report.json").read_text())


def test_report(call, options, tmp_path):
    done = call("validate_model", *options)
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "v").iterdir()} == {"report.json", "report.md", "validation.png", "samples.jsonl"}
    numbers = report_of(tmp_path)
    assert [sample["prompt"] for sample in numbers["samples"]] == SAMPLE_PROMPTS
    assert numbers["prompts"] == 12 and numbers["headline"] == "length"
    assert set(numbers["metrics"]) == {"length", "ending", "repetition", "language", "reference", "answer tokens", "distinct-2",
                                       "KL to base", "reference NLL"}  # fmt: skip
    length, kl = numbers["metrics"]["length"], numbers["metrics"]["KL to base"]
    assert length["trained"] and abs(length["tuned"] - length["base"] - length["difference"]) < 2e-4
    assert length["low"] <= length["difference"] <= length["high"] and kl["base"] == 0 < kl["tuned"]
    assert " ".join(numbers["line"].split()) in " ".join(done.out.split()), "the line to quote is printed"
    samples = [json.loads(line) for line in (tmp_path / "v" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 12 * 2 and all(sample["finish_reason"] for sample in samples)
    mean = numpy.mean([sample["scores"]["length"] for sample in samples if sample["side"] == "tuned"])
    assert mean == pytest.approx(length["tuned"], abs=1e-3), "the report's numbers are those of the samples"
    text = (tmp_path / "v" / "report.md").read_text()
    for part in (numbers["line"], "## Most improved", "## Most harmed", "## At random", "validation.png", *SAMPLE_PROMPTS):
        assert part in text
    assert call("validate_model", *options).code == 0
    assert report_of(tmp_path)["metrics"] == numbers["metrics"], "the same seed, the same numbers"


def test_the_model_card(call, options, final, tmp_path):
    """It gets the numbers once, where there are prompts enough, measured as the adapter was trained."""
    adapter = shutil.copytree(final, tmp_path / "adapter")
    options, card = (*options, "--adapter", adapter, "--samples_per_prompt", 1), adapter / "README.md"
    for prompts, flags, validated in ((12, (), 0), (25, ("--temperature", 0.5), 0), (25, (), 1), (25, (), 1)):
        assert call("validate_model", *options, "--max_prompts", prompts, *flags).code == 0
        assert card.read_text().count(model_card.VALIDATED) == validated
        assert (report_of(tmp_path)["line"] in card.read_text()) == bool(validated)


def test_another_adapter_instead_of_the_base(call, options, loud, final, tmp_path):
    assert call("validate_model", *options, "--against", loud).code == 0
    numbers = report_of(tmp_path)
    assert numbers["names"] == [str(loud), str(final)], "the same name: the paths tell them apart"
    assert numbers["metrics"]["KL to base"]["base"] > 0
    assert call("validate_model", *options, "--against", shutil.copytree(final, tmp_path / "twin")).code == 0
    assert all(m["difference"] == 0 for m in report_of(tmp_path)["metrics"].values()), "the same, sampled alike"


def test_it_is_measured_as_it_was_trained(call, quick, final, tmp_path):
    """Target, length and temperature come from the adapter's run.json, unless a flag says otherwise; so does the base."""
    own = (*quick[4:6], "--adapter", final, "--validation_dir", tmp_path / "v", "--max_prompts", 5)  # --data_dir
    refused(call("validate_model", "--preset", "tiny", *own), "another base")
    assert call("validate_model", "--device", "cpu", *own, "--temperature", 0.5).code == 0
    config = report_of(tmp_path)["config"]
    assert (config["target_tokens"], config["max_completion_length"], config["temperature"]) == (6, 12, 0.5)
    refused(call("validate_model", "--device", "cpu", *own, "--max_completion_length", 500), "context of 512")


def test_rewards_that_cannot_be_computed_are_left_out_and_named(call, micro, final, tmp_path):
    row = {"parent_id": None, "role": "prompter", "lang": "tlh", "rank": None, "review_result": True, "deleted": False}
    rows = [{**row, "message_id": str(i), "message_tree_id": str(i), "text": f"nuq {i}?"} for i in range(30)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ("--preset", "tiny", "--model", micro, "--data_dir", tmp_path / "d")
    assert call("prepare_data", *where, "--dataset", tmp_path / "m.jsonl").code == 0
    options = (*where, "--adapter", final, "--validation_dir", tmp_path / "v", "--max_completion_length", 12)
    done = call("validate_model", *options, "--rewards", "length,reference", "--target_tokens", 6)
    assert done.code == 0 and "reference, language, reference NLL" in " ".join(done.out.split()), done.err
    numbers = report_of(tmp_path)
    assert set(numbers["missing"]) == {"reference", "language", "reference NLL"} and numbers["headline"] == "total reward"


def test_a_full_disk_is_one_message(call, options, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "draw", full)
    refused(call("validate_model", *options, "--max_prompts", 2), "no room is left on a disk")


@pytest.mark.parametrize("reward", ["theirs.py:steal", "os:system", "some/reward-model"])
def test_code_that_an_adapter_names_is_not_run(call, options, final, tmp_path, reward):
    adapter = shutil.copytree(final, tmp_path / "other")
    run = json.loads((adapter / "run.json").read_text())
    run["config"]["rewards"] = [reward]
    (adapter / "run.json").write_text(json.dumps(run))
    refused(call("validate_model", *options, "--adapter", adapter), reward, "--rewards")


@pytest.mark.parametrize(
    ("name", "text", "flag", "expected"),
    [
        ("run.json", '{"config": {"temperature": "hot"}}', "--adapter", "--temperature is 'hot'"),
        ("run.json", '{"config": {"target_tokens": 0}}', "--adapter", "--target_tokens"),
        ("generation_config.json", "{", "--adapter", "generation_config.json is broken"),
        ("adapter_model.safetensors", "{", "--adapter", "damaged"),
        ("adapter_model.safetensors", "{", "--against", "damaged"),
        ("adapter_config.json", '{"base_model_name_or_path": "some/other"}', "--against", "some/other"),
    ],
)
def test_adapters_that_are_refused(call, options, final, tmp_path, name, text, flag, expected):
    folder = shutil.copytree(final, tmp_path / "damaged")
    if name == "adapter_config.json":
        text = json.dumps(json.loads((folder / name).read_text()) | json.loads(text))
    (folder / name).write_text(text)
    without_flags = (*options[:6], *options[10:])  # settings come from run.json
    refused(call("validate_model", *without_flags, flag, folder), expected)
