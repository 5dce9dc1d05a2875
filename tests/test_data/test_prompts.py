"""Prompts of the user's own: each form of row to the right prompt and reference, and what is odd in them."""

import gzip
import json
import re
import shutil
import subprocess
import sys

import datasets
import pytest
from conftest import ROOT, ok, read_json, refused, rows_of

from phi2_grpo.common.cli import UserError
from phi2_grpo.data import prompts, sources, store

USER, BOT, SYSTEM = ({"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So."), ("system", "Be brief.")))  # fmt: skip
MORE = {"role": "user", "content": "And?"}
SHAREGPT = [{"from": who, "value": text} for who, text in (("system", "Be brief."), ("human", "Why?"), ("gpt", "So."))]
SUMS = ROOT / "sample" / "sums"


def parse(row: dict, prompt_column="", reference_column="", system_prompt="") -> dict | None:
    form = prompts.find_form([row], prompt_column, reference_column)
    return prompts.parse_row(row, form, system_prompt, "row-1")


@pytest.mark.parametrize(("row", "prompt", "reference"), [
    ({"prompt": "  Why?\n", "answer": " So. "}, [USER], "So."), ({"prompt": [SYSTEM, USER], "completion": [BOT]}, [SYSTEM, USER], "So."),
    ({"prompt": [USER, BOT, MORE], "reference": "Hm."}, [USER, BOT, MORE], "Hm."),
    ({"messages": [SYSTEM, USER, BOT, MORE, BOT]}, [SYSTEM, USER, BOT, MORE], "So."),
    ({"messages": [USER, BOT, MORE]}, [USER, BOT, MORE], None),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, BOT]}, [USER], "So."),
    ({"conversations": SHAREGPT}, [SYSTEM, USER], "So."), ({"instruction": "Why?", "input": "", "output": "So."}, [USER], "So."),
    ({"instruction": "Why?", "input": "Sky\ud800", "output": "So."}, [{"role": "user", "content": "Why?\n\nSky?"}], "So."),
    ({"question": "Why?", "answer": 18}, [USER], "18"), ({"question": "Why?", "answer": 0.00005}, [USER], "0.00005"),
    ({"question": "Why?", "context": "Sky", "answer": ["So.", "Hm."]}, [{"role": "user", "content": "Why?\n\nSky"}], "So."),
    ({"prompt": "Why?", "messages": [SYSTEM, USER, BOT]}, [SYSTEM, USER], "So."), ({"system": "Be brief.", "question": "Why?", "answer": True}, [SYSTEM, USER], "True"),
    ({"messages": json.dumps([SYSTEM, USER, BOT])}, [SYSTEM, USER], "So."),
    ({"messages": str([USER, BOT]).replace("}, {", "}\n {")}, [USER], "So."),  # as pandas writes it
    ({"messages": json.dumps([{"role": "user", "content": "{1} {2}"}])}, [{"role": "user", "content": "{1} {2}"}], None),
    ({"messages": None, "prompt": "Why?", "answer": "So."}, [USER], "So."), ({"prompt": "[{[1]: 2}]"}, [{"role": "user", "content": "[{[1]: 2}]"}], None),
    ({"question": "Why?", "context": {"a": ["b"]}}, [USER], None), ({"prompt": "\n\nHuman: Why?\n\nAssistant:"}, [USER], None),
    ({"prompt": "[{'a': 1}]"}, [{"role": "user", "content": "[{'a': 1}]"}], None), ({"prompt": "Why?", "completion": "No.", "label": "False"}, [USER], None), ({"prompt": "Why?", "completion": json.dumps([BOT])}, [USER], "So."),
    # odd ones
    ({"prompt": None}, None, None), ({"prompt": 7}, [{"role": "user", "content": "7"}], None),
    ({"prompt": {"text": "Why?"}}, None, None), ({"messages": [BOT]}, None, None),
    ({"messages": [BOT, USER]}, [USER], None),  # no question stands before that answer
    ({"messages": [USER, MORE, BOT]}, [{"role": "user", "content": "Why?\n\nAnd?"}], "So."),
    ({"messages": [USER, {"role": "assistant", "content": None}, MORE]}, [{"role": "user", "content": "Why?\n\nAnd?"}], None),
    ({"messages": [USER, {"role": "tool", "content": "{}"}]}, None, None), ({"messages": [[USER, BOT]]}, None, None),
    ({"messages": "Why?"}, [USER], None), ({"messages": [{"role": "User", "content": "Why?"}]}, [USER], None),
    ({"question": "Why?", "answer": float("nan")}, [USER], None),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, BOT, MORE]}, None, None),
    ({"prompt": "Why?\ud800"}, [{"role": "user", "content": "Why??"}], None),
])  # fmt: skip
def test_forms(row, prompt, reference):
    parsed = parse(row)
    assert (parsed and parsed["prompt"], parsed and parsed["reference"]) == (prompt, reference)


def test_other_columns_are_kept_and_named_ones_win():
    row = {"ask": "Why?", "right": "So.", "prompt": "no", "level": 3, "lang": "en", "id": 9, "answers": ["x"]}
    parsed = parse(row, "ask", "right", "Be brief.")
    assert parsed["prompt"] == [SYSTEM, USER] and parsed["reference"] == "So." and parsed["level"] == 3
    assert parsed["lang"] == "en" and parsed["message_id"] == "9" and "answers" not in parsed
    assert parse({"prompt": [SYSTEM, USER]}, system_prompt="Another.")["prompt"] == [SYSTEM, USER]
    nested = {"prompt": "Why?", "reward_model": {"ground_truth": "So."}}  # verl's
    assert parse(nested, "", "reward_model.ground_truth")["reference"] == "So."
    with pytest.raises(UserError, match="reward_model.ground_truth"):
        parse(nested, "", "reward_model.truth")
    with pytest.raises(UserError, match="ask, right"):
        parse({"ask": "Why?", "right": "So."})
    with pytest.raises(UserError, match="--reference_column rihgt.*ask, right"):
        parse({"ask": "Why?", "right": "So."}, "ask", "rihgt")


def test_chosen_and_rejected_become_pairs():
    pair = {"chosen": [BOT], "rejected": [{"role": "assistant", "content": "No."}]}
    both = {side: [USER, *turns] for side, turns in pair.items()}
    texts = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    talk = {side: f"\n\nHuman: Why?\n\nAssistant: {texts[side]}" for side in pair}  # HH-RLHF's
    alone = {"prompt": "Why?", **{side: turns[0] for side, turns in pair.items()}}
    for row in (texts, {"prompt": [USER], **pair}, both, {"prompt": "Why?", **both}, talk, alone):
        parsed = parse(row)
        assert parsed["prompt"] == [USER] and parsed["pairs"] == [pair] and parsed["reference"] == "So.", row
    longer = {side: [USER, BOT, MORE, *turns] for side, turns in pair.items()}
    assert parse({"prompt": "Why?", **longer})["prompt"] == [USER, BOT, MORE]
    rows = [parse({**texts, "chosen": good}) for good in ("So.", "Because.")]
    kept, pairs, _ = prompts.deduplicate(rows, set())
    assert prompts.deduplicate([parse({"prompt": "Why?"}), *rows], set())[0][0]["reference"] == "So."
    assert len(kept) == 1 and [pair["chosen"][0]["content"] for pair in pairs] == ["So.", "Because."]


QUESTIONS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(10)]
TABLE = "\r\n".join(["question;answer", *(f'"{row["question"]}";{row["answer"]}' for row in QUESTIONS)])
FILES = {
    "q.jsonl": "\r\n".join(map(json.dumps, QUESTIONS)), "q.json": json.dumps(QUESTIONS, indent=1), "q.csv": TABLE,
    "Q.CSV": f"sep=;\r\n{TABLE}", "data.json": json.dumps({"version": 1, "columns": ["question"], "data": QUESTIONS}),
    "lines.json": "\n".join(map(json.dumps, QUESTIONS)),
    "txt.json": "\n" + json.dumps([row["question"] for row in QUESTIONS]), "q.tsv": TABLE.replace(";", "\t"),
    "q.txt": "\r\n".join(row["question"] for row in QUESTIONS),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FILES, "q.parquet", "q.csv.gz", "q.jsonl.gz"])
def test_files(name, tmp_path):
    """With what Windows and Excel add to them."""
    path = tmp_path / name
    if name == "q.parquet":
        datasets.Dataset.from_list(QUESTIONS).to_parquet(path)
    else:
        data = ("\ufeff" + FILES[name.removesuffix(".gz")]).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = list(sources.read_rows(str(path), "main")[0][""])
    read = prompts.read({"": rows}, prompts.find_form(rows, "", ""), "")[""]
    assert [row["prompt"][0]["content"] for row in read] == [row["question"] for row in QUESTIONS]
    assert [row["reference"] for row in read] == [None if "txt" in name else row["answer"] for row in QUESTIONS]


def test_a_folder_keeps_its_splits(tmp_path):
    for name in ("dev/gsm8k_Train.csv", "eval/0.csv", "trains.csv", "more.csv", ".ipynb_checkpoints/train-0.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TABLE)
    splits, _ = sources.read_rows(str(tmp_path), "main")
    assert {split: len(list(rows)) for split, rows in splits.items()} == {"train": 10, "validation": 10}


def test_prepared_under_the_source_s_name_with_all_columns(call, micro, tmp_path):
    """From a file to what the training reads, and from one source to another in the same place."""
    rows = [{**row, "level": i % 3} for i, row in enumerate(QUESTIONS)]
    (tmp_path / "My sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--model", micro, "--data_dir", tmp_path / "d", "--validation_fraction", 0.3, "--max_prompt_tokens", 500)
    done = call("prepare_data", "--dataset", tmp_path / "My sums.jsonl", *flags, "--max_turns", 2)
    assert done.code == 0 and "prompt = question, reference = answer, for rewards = level" in done.out, done.err
    assert "Not used: --max_turns, for" in done.out
    tables = datasets.load_from_disk(str(tmp_path / "d" / "My-sums_prompts"))
    assert len(tables["train"]) == 7 and "pairs" not in tables["train"].features
    assert set(tables["validation"]["level"]) <= {0, 1, 2}
    (tmp_path / "other.txt").write_text("Why?\nHow?\nWho?\n")
    ok(call("prepare_data", "--dataset", tmp_path / "other.txt", *flags, "--overwrite"))
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"other_prompts", "other_preferences", store.FUNNEL}


def test_rows_with_the_same_question_are_held_out_together():
    """Several answers to a question, as in most preference data; equal pairs count once."""
    rows = [{"prompt": f"Why {i}?", "chosen": f"{k}", "rejected": "x"} for i in range(40) for k in (0, 1, 2, 2)]
    rows = [*map(parse, rows), None]
    splits, again, other = (prompts.split(rows, 0.25, seed, prompts.same_prompts(rows)) for seed in (0, 0, 1))
    assert splits == again != other
    held_out = {row["prompt"][0]["content"] for row in splits["validation"] if row}
    assert 9 <= len(held_out) <= 11 and not held_out & {row["prompt"][0]["content"] for row in splits["train"] if row}
    kept, pairs, _ = prompts.deduplicate([row for row in splits["train"] if row], set())
    assert len(pairs) == 3 * len(kept) == 3 * (40 - len(held_out))


def test_the_row_numbers_of_pandas_are_no_language(tmp_path):
    (tmp_path / "q.csv").write_text(",prompt,answer\n0,Why?,So.\n")
    rows = list(sources.read_rows(str(tmp_path / "q.csv"), "main")[0][""])
    assert rows == [{"prompt": "Why?", "answer": "So."}] and parse({"": "0", **rows[0]})["lang"] == prompts.UNKNOWN


def test_what_cannot_be_prepared(call, micro, tmp_path):
    flags = ("--model", micro, "--data_dir", tmp_path / "d", "--dataset")
    (tmp_path / "b.jsonl").write_text('{"prompt": "Why?", "n": 1}\n{"prompt": "How?", "n": "two"}\n')
    refused(call("prepare_data", *flags, tmp_path / "b.jsonl", "--validation_fraction", 0), "column n")
    (tmp_path / "c.json").write_text("5\n")
    refused(call("prepare_data", *flags, tmp_path / "c.json"), "holds no rows")
    for text, expected in (({"train": QUESTIONS, "test": QUESTIONS}, "train, test"), ({"question": {"0": "Why?"}}, "orient")):
        (tmp_path / "o.json").write_text(json.dumps(text))
        refused(call("prepare_data", *flags, tmp_path / "o.json"), expected)
    refused(call("prepare_data", *flags, tmp_path, "--dataset_config", "main"), f"{tmp_path}/main")
    (tmp_path / "w.csv").write_bytes(b"PK\3\4 an Excel workbook")
    refused(call("prepare_data", *flags, tmp_path / "w.csv"), "workbook", "CSV UTF-8")
    (tmp_path / "d.csv").write_text('question,answer\nWhy?,So.\n"Unclosed, and\n')
    refused(call("prepare_data", *flags, tmp_path / "d.csv"), "past row 1", "end of data", "doubled")
    (tmp_path / "t.csv").write_text("question,answer,answer\nWhy?,So.,\n")
    refused(call("prepare_data", *flags, tmp_path / "t.csv"), "answer twice")
    (tmp_path / "e.csv").write_bytes("question\nGrüße?\n".encode("cp1252"))
    refused(call("prepare_data", *flags, tmp_path / "e.csv"), "e.csv is not UTF-8", "iconv")
    refused(call("prepare_data", *flags, tmp_path / "f.csv"), "f.csv: there is no such file")
    other = shutil.copytree(micro, tmp_path / "other")  # as Gemma's
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    (other / "chat_template.jinja").write_text(template)
    system = ("--system_prompt", "Be brief.", "--model", other)
    refused(call("prepare_data", *flags, tmp_path / "b.jsonl", *system), "no system", "--system_prompt")


def test_languages_are_guessed_where_some_are_wanted(call, micro, tmp_path):
    (tmp_path / "q.txt").write_text("Why is the sky blue in the morning?\n¿Por qué el cielo es azul por la mañana?\n" * 2)
    flags = ("--model", micro, "--data_dir", tmp_path / "d", "--dataset", tmp_path / "q.txt", "--max_prompt_tokens", 500)
    ok(call("prepare_data", *flags, "--languages", "es", "--validation_fraction", 0))
    assert datasets.load_from_disk(str(tmp_path / "d" / "q_prompts"))["train"]["lang"][:] == ["es"]


def test_the_sums_are_what_their_script_makes_and_hold_out_whole_addends(tmp_path):
    copy = tmp_path / "make_sums.py"
    copy.write_text((SUMS / "make_sums.py").read_text())
    subprocess.run([sys.executable, copy], check=True)
    rows = {}
    for split in ("train", "validation"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (SUMS / f"{split}.jsonl").read_bytes()
        rows[split] = rows_of(SUMS, f"{split}.jsonl")
    addends = {split: {word.strip("?.,") for row in of for word in row["prompt"].split()} for split, of in rows.items()}
    assert not {"7", "11"} & addends["train"] and {"7", "11"} <= addends["validation"]


def test_from_a_file_to_a_validated_adapter(call, quick, micro, tmp_path):
    (tmp_path / "q.csv").write_text("question,answer\n" + "".join(f"What is {i} plus {i}?,{2 * i}\n" for i in range(20)))
    where = ("--data_dir", tmp_path / "data")
    ok(call("prepare_data", "--model", micro, "--dataset", tmp_path / "q.csv", *where, "--validation_fraction", 0.3))
    flags = (*quick[:4], *where, *quick[6:], "--rewards", "correct,length:0.1", "--seed", 1)
    assert "correct x 1" in ok(call("train_grpo", 2, *flags, "--output_dir", tmp_path / "o")).out
    measured = ("--adapter", tmp_path / "o-final", "--validation_dir", tmp_path / "v", "--samples_per_prompt", 2)
    done = call("validate_model", *quick[:4], *where, *measured)
    assert done.code == 0 and "pass@2" in done.out and "from wrong to right" in done.out, done.err
    assert len(re.findall(r"What is (\d+) plus \1\?", done.out)) == 3, "held-out prompts are answered as a chat"
    accuracy = read_json(tmp_path / "v" / "report.json")["accuracy"]
    assert set(accuracy["pass@k"]) == {"1", "2"} and "## Accuracy" in (tmp_path / "v" / "report.md").read_text()
