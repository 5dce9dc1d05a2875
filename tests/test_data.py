"""From message trees to prompts, references and pairs on disk."""

import gzip
import json
from collections import Counter

import datasets
import pytest
from conftest import ROOT, SHARED

import inspect_data
from config import CONFIG, PRESETS
from phi2_grpo.common.cli import UserError
from phi2_grpo.data import oasst, sources, store
from phi2_grpo.models.tokenizer import load_tokenizer


def row(id: str, text: str, parent: str | None = None, **other) -> dict:
    tree = other.pop("tree", id if parent is None else parent)
    role = other.pop("role", "prompter" if parent is None else "assistant")
    base = {"message_id": id, "parent_id": parent, "message_tree_id": tree, "text": text, "role": role, "lang": "en"}
    return {**base, "rank": None, "review_result": True, "deleted": False, **other}


def choose(rows: list[dict], taken: set | None = None, **options):
    settings = {"languages": None, "max_prompt_tokens": 50, "max_turns": 1, "max_toxicity": 1.0, **options}
    messages = [sources._message(each, "row") for each in rows]
    words = lambda talks: [sum(len(turn["content"].split()) for turn in talk) for talk in talks]  # noqa: E731
    rows, funnel = oasst.filter_prompts(messages, words, **settings)
    taken, seen = set() if taken is None else taken, set()
    prompts, pairs = oasst.deduplicate(rows, seen, taken)
    taken |= seen
    return prompts, pairs, {**funnel, "kept": len(prompts)}


def texts(prompts: list[dict]) -> list[str]:
    return [prompt["prompt"][-1]["content"] for prompt in prompts]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row("b", "deleted", deleted=True), "deleted"),
        (row("b", "spam", review_result=False), "rejected"),
        (row("b", "   \n"), "empty"),
        (row("b", "word " * 51), "too long"),
        (row("b", " Why   IS it\u00a0so? "), "a duplicate after folding"),
        (row("b", "answer", role="assistant"), "not a prompt"),
        (row("b", "orphan", parent="nobody", role="prompter"), "an orphan"),
    ],
)
def test_what_is_not_kept(bad, reason):
    prompts, _, funnel = choose([row("a", "Why is it so?"), bad])
    assert texts(prompts) == ["Why is it so?"], reason
    assert funnel["rows"] == 2 and funnel["kept"] == 1


def test_what_is_kept_though_it_looks_odd():
    never_reviewed = row("a", "one", review_result=None)
    no_labels = row("b", "two", labels=None, detoxify=None)
    assert texts(choose([never_reviewed, no_labels], max_toxicity=0.5)[0]) == ["one", "two"]


def test_languages_and_toxicity():
    rows = [
        row("a", "hola", lang="es"),
        row("b", "rude", labels={"name": ["spam", "toxicity"], "value": [0.0, 0.8]}, detoxify={"toxicity": 0.0}),
        row("c", "rude too", labels={"name": ["spam"], "value": [0.0]}, detoxify={"toxicity": 0.9}),
        row("d", "fine", labels={"name": ["toxicity"], "value": [0.1]}),
    ]
    assert texts(choose(rows, languages={"es"})[0]) == ["hola"]
    assert texts(choose(rows, max_toxicity=0.5)[0]) == ["hola", "fine"], "the people's label rules, the classifier's fills in"
    assert len(choose(rows)[0]) == 4


def test_reference_is_the_best_usable_reply_and_pairs_are_the_ranked_ones():
    rows = [
        row("q", "Why?"),
        row("r0", "best, but deleted", "q", rank=0, deleted=True),
        row("r1", "good", "q", rank=1),
        row("r2", "tied", "q", rank=2),
        row("r3", "tied too", "q", rank=2),
        row("r4", "unranked", "q"),
        row("s", "Alone?"),
        row("t0", "the only reply", "s"),
        row("u", "No reply?"),
        row("v", "Two unranked?"),
        row("v0", "x", "v"),
        row("v1", "y", "v"),
    ]
    prompts, pairs, _ = choose(rows)
    assert [prompt["reference"] for prompt in prompts] == ["good", "the only reply", None, None]
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"], p["rank_distance"]) for p in pairs] == [
        ("good", "tied", 1),
        ("good", "tied too", 1),
    ], "equal ranks say nothing"


def test_later_turns_come_with_their_history():
    rows = [
        row("q", "Why?"),
        row("a", "Because.", "q"),
        row("f", "And then?", "a", role="prompter", tree="q"),
        row("b", "Nothing.", "f", tree="q"),
        row("g", "Really?", "b", role="prompter", tree="q"),
    ]
    assert texts(choose(rows)[0]) == ["Why?"]
    prompts, _, _ = choose(rows, max_turns=2)
    assert texts(prompts) == ["Why?", "And then?"] and prompts[1]["reference"] == "Nothing."
    assert [turn["role"] for turn in prompts[1]["prompt"]] == ["user", "assistant", "user"]
    assert len(choose(rows, max_turns=3)[0]) == 3
    rows[1]["deleted"] = True
    assert texts(choose(rows, max_turns=3)[0]) == ["Why?"], "a history with a deleted message is no history"


def test_a_ring_of_parents_ends():
    ring = [row("a", "x", "b", role="prompter"), row("b", "y", "a", role="assistant")]
    assert choose([row("q", "Why?"), *ring], max_turns=5)[2]["kept"] == 1


def test_what_stands_in_validation_leaves_train():
    taken = set()
    assert len(choose([row("a", "Why?")], taken)[0]) == 1
    assert texts(choose([row("b", "why?"), row("c", "How?")], taken)[0]) == ["How?"]


def test_single_source_is_split_by_tree_and_seed():
    trees = {str(tree): tree for tree in range(40)}
    one, again, other = (oasst.validation_trees(trees, 0.25, seed) for seed in (0, 0, 1))
    assert len(one) == 10 and one == again and one != other


def test_follow_ups_of_what_validation_took_leave_train():
    follow_up = [row("b", "Why?"), row("r", "So.", parent="b"), row("f", "How?", parent="r", role="prompter", tree="b")]
    assert len(choose(follow_up, max_turns=2)[0]) == 2
    taken = set()
    choose([row("a", "Why?")], taken)
    assert choose(follow_up, taken, max_turns=2)[0] == []


LABELS = {"name": ["spam", "toxicity"], "value": [0.0, 0.9], "count": [3, 3]}
TALK = [row("a", "Why is it so?", labels=LABELS), row("r", "Because.", parent="a", rank=0), row("s", "No.", parent="a", rank=1),
        row("b", "How, then?", labels={**LABELS, "value": [0.0, 0.1]}, review_result=None)]  # fmt: skip


def as_exported(message: dict) -> dict:
    """As OpenAssistant's own exporter writes it: labels by name, and no nulls."""
    labels = message.get("labels")
    labels = labels and {n: {"value": v, "count": 3} for n, v in zip(labels["name"], labels["value"], strict=True)}
    return {key: value for key, value in {**message, "labels": labels}.items() if value is not None}


def as_tree(root: dict, rows: list[dict]) -> dict:
    def below(message):
        replies = [below(each) for each in rows if each["parent_id"] == message["message_id"]]
        inner = {key: value for key, value in as_exported(message).items() if key not in ("parent_id", "message_tree_id")}
        return {**inner, "replies": replies} if replies else inner

    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": below(root)}


def json_lines(rows: list) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)


FORMS = {
    "hub.jsonl": lambda: json_lines(TALK).encode(),
    "export.messages.jsonl.gz": lambda: gzip.compress(json_lines(map(as_exported, TALK)).encode()),
    "export.trees.jsonl.gz": lambda: gzip.compress(json_lines([as_tree(r, TALK) for r in TALK if not r["parent_id"]]).encode()),
    "array.json": lambda: json.dumps(TALK, indent=1).encode(),
    "windows.jsonl": lambda: b"\xef\xbb\xbf" + json_lines(TALK).replace("\n", "\r\n").encode(),
    "pandas.jsonl": lambda: json_lines(
        [{**r, "deleted": 0.0, "review_result": None if r["review_result"] is None else 1.0,
          "rank": None if r["rank"] is None else float(r["rank"])} for r in TALK]).encode(),
    "with [brackets]: and a colon.jsonl": lambda: json_lines(TALK).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_oasst1_is_passed_on_in(tmp_path, name):
    """The very messages, labels included, whatever the file looks like."""
    (tmp_path / name).write_bytes(FORMS[name]())
    found = sources.read_messages(str(tmp_path / name), "main", with_toxicity=True)[0][""]
    assert sorted(found) == sorted(sources._message(each, "row") for each in TALK)


def test_columns_that_begin_far_into_a_file(tmp_path):
    """Past the first ten megabytes, which is where datasets stops looking by itself."""
    early = [as_exported(row(f"a{i}", "Why? " * 2000)) for i in range(1100)]
    late = {**as_exported(TALK[0]), "message_id": "late"}
    (tmp_path / "m.jsonl").write_text(json_lines([*early, late]))
    *_, last = sources.read_messages(str(tmp_path / "m.jsonl"), "main", with_toxicity=True)[0][""]
    assert (last.id, last.toxicity) == ("late", 0.9)


def test_a_folder_as_the_hub_has_it(tmp_path):
    """Splits by the files' names; the exports beside them are the same messages once more."""
    (tmp_path / "data").mkdir()
    for split, rows in (("train", TALK[:3]), ("validation", TALK[3:])):
        plain = [{**each, "labels": LABELS} for each in rows]
        datasets.Dataset.from_list(plain).to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001-b42a775f.parquet"))
    (tmp_path / "2023.messages.jsonl.gz").write_bytes(FORMS["export.messages.jsonl.gz"]())
    found = sources.read_messages(str(tmp_path), "main", with_toxicity=False)[0]
    assert {split: [m.id for m in messages] for split, messages in found.items()} == {
        "train": ["a", "r", "s"],
        "validation": ["b"],
    }
    (tmp_path / "data" / "train-00000-of-00001-b42a775f.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(UserError, match="Git LFS pointer"):
        sources.read_messages(str(tmp_path), "main", with_toxicity=False)


def test_a_pinned_commit_without_network(monkeypatch):
    table = datasets.Dataset.from_list(TALK[1:3])
    table.info.download_checksums = {f"hf://datasets/a/b@{'b' * 40}/train.parquet": {}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=table))
    for good in ("main", "b" * 40, "bbbbbbb"):
        assert sources.read_messages("a/b", good, False)[1] == "b" * 40
    with pytest.raises(UserError, match=f"is not what is in the cache.*at commit {'b' * 40}"):
        sources.read_messages("a/b", "a" * 40, False)


def test_chunks_hold_whole_trees_in_the_sources_order(tmp_path):
    """Interleaved trees too; and what is read back is what was written."""
    messages = [
        sources._message(row(f"{tree}-{i}", "x\n\u2028y", tree=str(tree)), "row") for i in range(3) for tree in range(7)
    ]
    chunks = sources.Chunks(tmp_path / "c", messages, trees_per_chunk=3)
    parts = [sources.read_chunk(path) for path in chunks.paths]
    assert [{m.tree for m in part} for part in parts] == [{"0", "1", "2"}, {"3", "4", "5"}, {"6"}]
    assert sorted(sum(parts, [])) == sorted(messages) and chunks.languages["en"] == 21
    assert {m.tree for m in sources.read_chunk(chunks.paths[0], {"1", "6"})} == {"1"}
    assert {m.tree for m in sources.read_chunk(chunks.paths[0], {"1", "6"}, inside=False)} == {"0", "2"}


def test_chunks_and_processes_change_nothing(call, micro, prepared, tmp_path, monkeypatch):
    """The sample in chunks of seven trees, by two processes: the very data that one chunk gives."""
    plain = sources.Chunks.__init__
    monkeypatch.setattr(sources.Chunks, "__init__", lambda self, folder, messages: plain(self, folder, messages, 7))
    how = ("--preset", "tiny", "--model", micro, "--max_prompt_tokens", 100, "--num_proc", 2)
    done = call("prepare_data", *how, "--data_dir", tmp_path / "d")
    assert done.code == 0, done.err
    for name in (store.PROMPTS, store.PREFERENCES):
        ours, theirs = (datasets.load_from_disk(str(folder / name)) for folder in (tmp_path / "d", prepared))
        assert {split: table.to_list() for split, table in ours.items()} == {s: t.to_list() for s, t in theirs.items()}
    assert (
        json.loads((tmp_path / "d" / "funnel.json").read_text())["funnel"]
        == json.loads((prepared / "funnel.json").read_text())["funnel"]
    )
    assert {path.name for path in (tmp_path / "d").iterdir()} == {store.PROMPTS, store.PREFERENCES, store.FUNNEL}


def test_the_sample_has_what_it_should():
    rows = [json.loads(line) for line in (ROOT / "tiny" / "messages.jsonl").read_text(encoding="utf-8").splitlines()]
    config = {**CONFIG, **PRESETS["tiny"]}
    messages = [sources._message(each, "row") for each in rows]
    trees = oasst.validation_trees({m.tree for m in messages}, config["validation_fraction"], config["split_seed"])
    roots = {split: [m for m in messages if m.parent is None and (m.tree in trees) == (split == "validation")]
             for split in ("train", "validation")}  # fmt: skip
    assert len(roots["train"]) + len(roots["validation"]) >= 200 and len(roots["validation"]) >= 40
    assert len({m.lang for m in roots["train"]}) >= 5
    ranked = Counter(r["parent_id"] for r in rows if r["rank"] is not None)
    assert sum(2 <= count <= 4 for count in ranked.values()) >= 100
    both = {oasst.normalize([{"content": m.text}]) for m in roots["train"]} & {
        oasst.normalize([{"content": m.text}]) for m in roots["validation"]
    }
    ids = {r["message_id"] for r in rows}
    traps = {
        "deleted": any(r["deleted"] for r in rows),
        "review false": any(r["review_result"] is False for r in rows),
        "review null": any(r["review_result"] is None for r in rows),
        "null labels": any(r["labels"] is None for r in rows),
        "orphan": any(r["parent_id"] is not None and r["parent_id"] not in ids for r in rows),
        "duplicate root": len({oasst.normalize([{"content": m.text}]) for m in roots["train"]}) < len(roots["train"]),
        "over-long": any(len(m.text.split()) > 128 for m in roots["train"] + roots["validation"]),
        "root in both splits": bool(both),
        "follow-up turns": any(r["role"] == "prompter" and r["parent_id"] in ids for r in rows),
    }
    assert all(traps.values()), traps
    from phi2_grpo.models.tokenizer import SAMPLE_PROMPTS

    folded = {oasst.normalize([{"content": r["text"]}]) for r in rows}
    assert not folded & {oasst.normalize([{"content": prompt}]) for prompt in SAMPLE_PROMPTS}


@pytest.mark.skipif(not SHARED.exists(), reason="the real rows are not beside this checkout")
def test_schema_is_oasst1s():
    real = json.loads((SHARED / "oasst1" / "messages.jsonl").open(encoding="utf-8").readline())
    for line in (ROOT / "tiny" / "messages.jsonl").open(encoding="utf-8"):
        ours = json.loads(line)
        assert list(ours) == list(real)
        for column, value in ours.items():
            assert value is None or type(value) is type(real[column]) or real[column] is None, column


def test_every_kind_of_source_gives_the_same_prompts(call, micro, prepared, tmp_path):
    lines = (ROOT / "tiny" / "messages.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in lines.splitlines()]
    with gzip.open(tmp_path / "m.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "m.parquet")
    table.save_to_disk(tmp_path / "saved")
    expected = json.loads((prepared / "funnel.json").read_text())["fingerprint"]
    for source in ("m.jsonl.gz", "m.parquet", "saved"):
        target = tmp_path / f"out-{source}"
        options = ("--preset", "tiny", "--model", micro, "--dataset", tmp_path / source, "--data_dir", target)
        done = call("prepare_data", *options, "--max_prompt_tokens", 100)
        assert done.code == 0, done.err
        assert json.loads((target / "funnel.json").read_text())["fingerprint"] == expected, source


def test_a_source_with_splits_keeps_them(call, micro, tmp_path):
    parts = {"train": [row("a", "Why?"), row("b", "How?")], "validation": [row("c", "why?"), row("d", "Who?")]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(tmp_path / "s")
    done = call("prepare_data", "--model", micro, "--dataset", tmp_path / "s", "--data_dir", tmp_path / "out")
    assert done.code == 0, done.err
    kept = datasets.load_from_disk(str(tmp_path / "out" / "oasst1_prompts"))
    assert kept["train"]["message_id"][:] == ["b"] and kept["validation"]["message_id"][:] == ["c", "d"]


def test_prepared_data_on_disk(prepared, micro):
    prompts = datasets.load_from_disk(str(prepared / "oasst1_prompts"))
    assert set(prompts) == {"train", "validation"} and prompts["train"].features == store.FEATURES["oasst1_prompts"]
    assert all(prompt[-1]["role"] == "user" for prompt in prompts["train"]["prompt"])
    pairs = datasets.load_from_disk(str(prepared / "oasst1_preferences"))
    assert {"prompt", "chosen", "rejected", "lang", "message_id"} <= set(pairs["train"].column_names)
    assert len(pairs["train"]) > 200 and len(pairs["validation"]) > 50
    config = {**CONFIG, "model": str(micro), "data_dir": str(prepared)}
    _, funnel, notes = store.load_prompts(config, load_tokenizer(config))
    assert funnel["funnel"]["train"]["kept"] == len(prompts["train"])
    assert any("max_prompt_tokens was 100" in note for note in notes), "another limit than ours is said"


def test_overwrite_is_needed_and_replaces(call, micro, tmp_path):
    options = ("--preset", "tiny", "--model", micro, "--data_dir", tmp_path / "d")
    assert call("prepare_data", *options, "--languages", "es").code == 0
    before = (tmp_path / "d" / "funnel.json").read_text()
    refused = call("prepare_data", *options)
    assert refused.code == 2 and "--overwrite" in refused.err and (tmp_path / "d" / "funnel.json").read_text() == before
    assert call("prepare_data", *options, "--overwrite").code == 0
    assert set(datasets.load_from_disk(str(tmp_path / "d" / "oasst1_prompts"))["train"]["lang"]) > {"es", "en"}


def test_inspect_shows_what_the_model_sees(call, micro, prepared):
    options = ("--preset", "tiny", "--model", micro, "--data_dir", prepared)
    done = call("inspect_data", *options, "--language", "es", "--samples", 2, "--search", "cómo")
    assert done.code == 0, done.err
    assert done.out.count("Instruct: ") == 2 and "Output:" in done.out and "⏎" in done.out and " tokens" in done.out
    assert (prepared / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert inspect_data.visible("a\tb\u00a0\u200b\r\n") == "a⇥b⍽\\u200b␍⏎\n"


@pytest.mark.skipif(not SHARED.exists(), reason="the real tokenizer is not beside this checkout")
def test_real_rows_with_the_real_tokenizer(call, tmp_path):
    source, model = SHARED / "oasst1" / "messages.jsonl", SHARED / "phi2"
    done = call("prepare_data", "--model", model, "--dataset", source, "--data_dir", tmp_path / "d", "--max_turns", 3)
    assert done.code == 0, done.err
    funnel = json.loads((tmp_path / "d" / "funnel.json").read_text())["funnel"]
    assert funnel["train"]["rows"] + funnel["validation"]["rows"] == 1050
    tokenizer = load_tokenizer({"model": str(model), "model_revision": "main"})
    roots = [json.loads(line)["prompt"] for line in (SHARED / "oasst1" / "root_prompts.jsonl").open(encoding="utf-8")]
    from phi2_grpo.models.tokenizer import count_tokens

    lengths = sorted(count_tokens(tokenizer, [[{"role": "user", "content": text}] for text in roots]))
    assert 20 < lengths[len(lengths) // 2] < 40, "the median oasst1 root has about 26 tokens, and the template adds a few"


def test_a_half_written_folder_is_recognised(micro, prepared, tmp_path):
    import shutil

    shutil.copytree(prepared, tmp_path / "d")
    (tmp_path / "d" / "funnel.json").unlink()
    config = {**CONFIG, "model": str(micro), "data_dir": str(tmp_path / "d")}
    with pytest.raises(UserError, match="half-written"):
        store.load_prompts(config, load_tokenizer(config))
