"""From rows, in each form that they are passed on in, to messages; from message trees to prompts, references and pairs."""

import gzip
import json

import datasets
import pytest

from config import CONFIG, PRESETS
from phi2_grpo.common.cli import UserError
from phi2_grpo.data import oasst, sources
from phi2_grpo.data.prompts import deduplicate, normalize, split
from phi2_grpo.models.tokenizer import SAMPLE_PROMPTS


def row(id: str, text: str, parent: str | None = None, **other) -> dict:
    tree = other.pop("tree", id if parent is None else parent)
    role = other.pop("role", "prompter" if parent is None else "assistant")
    base = {"message_id": id, "parent_id": parent, "message_tree_id": tree, "text": text, "role": role, "lang": "en"}
    return {**base, "rank": None, "review_result": True, "deleted": False, **other}


def choose(rows: list[dict], held_out: set | None = None, **options):
    settings = {"languages": {"en", "es"}, "max_prompt_tokens": 50, "max_turns": 1, "max_toxicity": 1.0, **options}
    messages = [message for each in rows for message in oasst.parse_row(each)]
    words = lambda talks: [sum(len(turn["content"].split()) for turn in talk) for talk in talks]  # noqa: E731
    candidates, funnel = oasst.filter_prompts(messages, words, **settings)
    kept, pairs, seen = deduplicate(candidates, held_out or set())
    return [prompt["prompt"][-1]["content"] for prompt in kept], kept, pairs, seen, funnel


NOT_KEPT = {
    "deleted": row("b", "x", deleted=True), "rejected, by pandas": row("b", "spam", review_result=0.0),
    "empty": row("b", "   \n"), "too long": row("b", "word " * 51), "another language": row("b", "Hallo", lang="de"),
    "a duplicate": row("b", " Why   IS it\u00a0so? "), "not a prompt": row("b", "answer", role="assistant"),
    "an orphan": row("b", "x", parent="nobody", role="prompter"),
}  # fmt: skip


@pytest.mark.parametrize("reason", NOT_KEPT)
def test_what_is_not_kept(reason):
    texts, *_, funnel = choose([row("a", "Why is it so?"), NOT_KEPT[reason]])
    assert texts == ["Why is it so?"] and funnel["rows"] == 2


def test_null_is_kept_and_the_peoples_label_comes_before_the_classifiers():
    rows = [
        row("n", "null", review_result=None, labels=None, detoxify=None),
        row("b", "rude", labels={"name": ["spam", "toxicity"], "value": [0.0, 0.8]}, detoxify={"toxicity": 0.0}),
        row("c", "rude too", labels={"name": ["spam"], "value": [0.0]}, detoxify={"toxicity": 0.9}),
        row("d", "rude in an export", labels={"toxicity": {"value": 0.7, "count": 3}}),
        row("e", "fine", labels={"name": ["toxicity"], "value": [0.1]}, detoxify={"toxicity": 0.9}),
    ]
    assert choose(rows, max_toxicity=0.5)[0] == ["null", "fine"]
    assert len(choose(rows)[0]) == 5


@pytest.mark.parametrize(("change", "named"), [
    ({"text": 5}, "text is 5"), ({"rank": "best"}, "rank is 'best'"), ({"role": "user"}, "'user', but it takes prompter or"),
    ({"parent_id": "q", "message_tree_id": None}, "message_tree_id is missing"), ({"deleted": "no"}, "deleted is 'no'"),
    ({"labels": {"name": ["toxicity"], "value": ["very"]}}, "toxicity is 'very'"), ({"detoxify": "x"}, "'get'")])  # fmt: skip
def test_a_row_that_is_not_oasst1s_is_named(tmp_path, change, named):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (row("a", "Why?"), {**row("b", "How?"), **change})))
    with pytest.raises(UserError, match=f"row 2: .*{named}"):
        oasst.read_messages(str(path), "main")


def test_reference_is_the_best_usable_reply_and_pairs_are_the_ranked_ones():
    rows = [row("q", "Why?"), row("s", "Alone?"), row("u", "No reply?"), row("v", "Two unranked?")]
    rows += [row("t0", "the only reply", "s"), row("v0", "x", "v"), row("v1", "y", "v"), row("r0", "unranked", "q")]
    for text, rank, deleted in (("gone", 0, True), ("tied", 2, False), ("good", 1.0, False), ("tied too", 2, False)):
        rows.append(row(text, text, "q", rank=rank, deleted=deleted))
    _, prompts, pairs, *_ = choose(rows)
    assert [prompt["reference"] for prompt in prompts] == ["good", "the only reply", None, None]
    sides = [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]
    assert sides == [("good", "tied"), ("good", "tied too")], "equal ranks say nothing"


def test_later_turns_come_with_their_history():
    rows = [row("q", "Why?"), row("a", "Because.", "q"), row("f", "And then?", "a", role="prompter", tree="q"),
            row("b", "Nothing.", "f", tree="q"), row("g", "Really?", "b", role="prompter", tree="q"),
            row("x", "ring", "y", role="prompter"), row("y", "ring", "x")]  # fmt: skip
    assert [len(choose(rows, max_turns=turns)[0]) for turns in (1, 2, 3, 9)] == [1, 2, 3, 3]
    last = choose(rows, max_turns=2)[1][-1]
    assert [turn["role"] for turn in last["prompt"]] == ["user", "assistant", "user"] and last["reference"] == "Nothing."
    assert choose(rows, {"why?"}, max_turns=3)[0] == [], "a follow-up would show what is held out"
    rows[1]["deleted"] = True
    assert choose(rows, max_turns=3)[0] == ["Why?"], "a history with a deleted message is no history"


@pytest.mark.parametrize(("preset", "roots", "held_out"), [("tiny", 120, 40), ("smollm2", 200, 100)])
def test_the_samples(preset, roots, held_out):
    """Questions enough to train and to measure, and none of the prompts that are shown."""
    config = {**CONFIG, **PRESETS[preset]}
    messages = oasst.read_messages(config["dataset"], "main")[0][""]
    trees = [message.message_tree_id for message in messages]
    splits = split(messages, config["validation_fraction"], config["split_seed"], trees)
    train, validation = ([normalize([{"content": m.text}]) for m in part if m.parent_id is None] for part in splits.values())
    assert len(train) >= roots and len(validation) >= held_out
    assert not {normalize([{"content": text}]) for text in SAMPLE_PROMPTS} & {*train, *validation}


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
    "export.messages.jsonl.gz": gzip.compress(lines(map(as_exported, TALK))),
    "export.trees.jsonl.gz": gzip.compress(lines(TREES)),
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
    for name, rows in (("train", TALK[:3]), ("validation", TALK[3:]), ("test", TALK[:1])):
        plain = [{**each, "labels": LABELS} for each in rows]
        datasets.Dataset.from_list(plain).to_parquet(tmp_path / "data" / f"{name}-00000-of-00001-b42a775f.parquet")
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
