"""The prepared data on disk, and the three things that are asked of it."""

import shutil
from datetime import datetime
from pathlib import Path

import datasets
import pytest

from config import CONFIG
from phi2_grpo.common.cli import UserError
from phi2_grpo.data import store


@pytest.fixture
def config(micro, prepared, tmp_path) -> dict:
    """Of a copy of the prepared data, in a folder whose name is a pattern too."""
    data_dir = shutil.copytree(prepared, tmp_path / "[v1]" / "a*b $HOME")
    own = {"model": str(micro), "data_dir": str(data_dir), "max_prompt_tokens": 100, "dataset": "./sample/tiny.jsonl"}
    return CONFIG | own


def test_the_fingerprint_is_of_what_was_read(config, tokenizer):
    """One letter, in the bytes of the table: neither its shape nor its ids show it."""
    before = store.load_prompts(config, tokenizer)[1]["fingerprint"]
    file = next((Path(config["data_dir"]) / f"oasst1_{store.PROMPTS}" / "train").glob("*.arrow"))
    assert b"plant" in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(b"plant", b"plank"))
    prompts, funnel = store.load_prompts(config, tokenizer)
    assert funnel["fingerprint"] != before and funnel["funnel"]["train"]["kept"] == len(prompts["train"])


def test_a_column_may_hold_what_is_no_json(config, tokenizer):
    rows = {"prompt": [[{"role": "user", "content": "Why?"}]], "lang": ["en"], "message_id": ["1"], "reference": [None]}
    table = datasets.Dataset.from_dict(rows | {"asked": [datetime(2026, 1, 2)], "sound": [b"\xff"]}, features=datasets.Features(
        store.FEATURES[store.PROMPTS] | {"asked": datasets.Value("timestamp[s]"), "sound": datasets.Value("binary")}))  # fmt: skip
    place = Path(config["data_dir"]) / f"oasst1_{store.PROMPTS}"
    shutil.rmtree(place)
    datasets.DatasetDict(train=table, validation=table).save_to_disk(place)
    assert store.load_prompts(config, tokenizer)[0]["train"]["asked"][0].year == 2026


def replace_pairs(data_dir: Path, table) -> None:
    shutil.rmtree(data_dir / f"oasst1_{store.PREFERENCES}")
    table.save_to_disk(data_dir / f"oasst1_{store.PREFERENCES}")


ROWS = datasets.Dataset.from_list([{"text": "x"}])
HARMS = {
    "gone": shutil.rmtree,
    "killed": lambda data_dir: (data_dir / store.FUNNEL).unlink(),
    "table cut": lambda data_dir: [f.write_bytes(b"ARROW1") for f in data_dir.glob("*/train/*.arrow")],
    "other columns": lambda data_dir: replace_pairs(data_dir, datasets.DatasetDict(train=ROWS, validation=ROWS)),
    "no splits": lambda data_dir: replace_pairs(data_dir, ROWS),
}


@pytest.mark.parametrize("harm", HARMS)
def test_data_that_cannot_be_used(config, tokenizer, harm):
    """The message has the command that mends it, with --overwrite where something is in its way."""
    HARMS[harm](Path(config["data_dir"]))
    with pytest.raises(UserError, match="python prepare_data.py .*--data_dir") as error:
        store.load_prompts(config, tokenizer, store.PREFERENCES)
    assert ("--overwrite" in str(error.value)) == (harm != "gone")


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_prepared_data_is_not_replaced(tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert not store.exists(tmp_path)
    place = tmp_path / f"oasst1_{store.PREFERENCES}"
    copy, link = lambda: shutil.copytree(tmp_path / "mine", place), lambda: place.symlink_to("mine")
    {"file": place.touch, "folder": copy, "link": link}[kind]()
    with pytest.raises(UserError, match="would be replaced"):
        store.exists(tmp_path)
