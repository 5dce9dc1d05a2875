"""The forms that a data set is passed on in."""

import gzip
import json

import datasets
import pytest
from test_oasst import row

from phi2_grpo.common.cli import UserError
from phi2_grpo.data import oasst, sources

LABELS = {"name": ["spam", "toxicity"], "value": [0.0, 0.9], "count": [3, 3]}
TALK = [row("a", "Why is it so?\u2028", labels=LABELS), row("r", "Because.", parent="a", rank=0), row("s", "No.", parent="a", rank=1),
        row("b", "How, then?", labels={**LABELS, "value": [0.0, 0.1]}, review_result=None)]  # fmt: skip


def as_exported(message: dict) -> dict:
    """As OpenAssistant's own exporter writes it: labels by name, and no nulls."""
    if labels := message.get("labels"):
        labels = {name: {"value": value} for name, value in zip(labels["name"], labels["value"], strict=True)}
    return {key: value for key, value in {**message, "labels": labels}.items() if value is not None}


def as_tree(root: dict) -> dict:
    exported = {key: value for key, value in as_exported(root).items() if key not in ("parent_id", "message_tree_id")}
    replies = [as_tree(each)["prompt"] for each in TALK if each["parent_id"] == root["message_id"]]
    return {"message_tree_id": root["message_tree_id"], "prompt": {**exported, "replies": replies}}


def through_pandas(message: dict) -> dict:
    """Its numbers and booleans beside nulls."""
    values = {column: message[column] for column in ("deleted", "review_result", "rank")}
    return {**message, **{column: float("nan" if value is None else value) for column, value in values.items()}}


def lines(rows) -> bytes:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows).encode()


TREES = [as_tree(each) for each in TALK if each["parent_id"] is None]
FORMS = {
    "hub.jsonl": lines(TALK),
    "export.messages.jsonl.gz": gzip.compress(lines(map(as_exported, TALK))),
    "export.trees.jsonl.gz": gzip.compress(lines(TREES)),
    "array.json": json.dumps(TALK, indent=1).encode(),
    "windows.jsonl": b"\xef\xbb\xbf" + lines(TALK).replace(b"\n", b"\r\n"),
    "pandas.jsonl": lines(map(through_pandas, TALK)),
    "with [brackets]: and a colon*.jsonl": lines(TALK),
}


@pytest.mark.parametrize("name", [*FORMS, "saved", "[m].parquet", "trees.parquet"])
def test_every_form_gives_the_same_messages(tmp_path, name):
    path = tmp_path / name
    if name in FORMS:
        path.write_bytes(FORMS[name])
    elif name == "saved":
        datasets.Dataset.from_list(TALK).save_to_disk(path)
    else:
        datasets.Dataset.from_list(TALK if name == "[m].parquet" else TREES).to_parquet(tmp_path / "m")
        (tmp_path / "m").rename(path)
    messages = oasst.read_messages(str(path), "main")[0][""]
    assert sorted(messages) == sorted(message for each in TALK for message in oasst.parse_row(each))
    assert {message.message_id: message.toxicity for message in messages} == {"a": 0.9, "r": None, "s": None, "b": 0.1}


def test_a_folder_as_the_hub_has_it(tmp_path):
    """Splits by the files' names; the exports beside them are the same messages once more."""
    (tmp_path / "data").mkdir()
    for split, rows in (("train", TALK[:3]), ("validation", TALK[3:]), ("test", TALK[:1])):
        plain = [{**each, "labels": LABELS} for each in rows]
        datasets.Dataset.from_list(plain).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001-b42a775f.parquet")
    (tmp_path / "2023.messages.jsonl.gz").write_bytes(FORMS["export.messages.jsonl.gz"])
    messages = oasst.read_messages(str(tmp_path), "main")[0]
    ids = {split: [message.message_id for message in part] for split, part in messages.items()}
    assert ids == {"train": ["a", "r", "s"], "validation": ["b"]}
    (tmp_path / "data" / "train-00000-of-00001-b42a775f.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(UserError, match="Git LFS pointer"):
        sources.read_rows(str(tmp_path), "main")


def test_a_pinned_commit_without_network(monkeypatch):
    table = datasets.Dataset.from_list(TALK[1:3])
    table.info.download_checksums = {f"hf://datasets/a/b@{'b' * 40}/train.parquet": {}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=table))
    for good in ("main", "b" * 40, "bbbbbbb"):
        assert sources.read_rows("a/b", good)[1] == "b" * 40
    with pytest.raises(UserError, match=f"at commit {'b' * 40}"):
        sources.read_rows("a/b", "a" * 40)
    table.info.download_checksums = None
    assert sources.read_rows("a/b", "main")[1] is None
