"""Own prompts with a right answer, from a file to a validated adapter."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, ok, rows_of

SUMS = ROOT / "sample" / "sums"


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


FORMS = {  # a file of each form, from prepare to two steps of training
    "question.csv": "question,answer\n" + "".join(f"What is {i} plus {i}?,{2 * i}\n" for i in range(20)),
    "chat.jsonl": "".join(
        json.dumps({"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": str(i)}]})
        + "\n"
        for i in range(20)
    ),
    "alpaca.json": json.dumps([{"instruction": "Add.", "input": f"{i} and 1", "output": str(i + 1)} for i in range(20)]),
}


@pytest.mark.parametrize(
    "name", [name if name == "question.csv" else pytest.param(name, marks=pytest.mark.slow) for name in FORMS]
)
def test_each_form_trains_and_is_validated(call, quick, micro, tmp_path, name):
    (tmp_path / name).write_text(FORMS[name])
    where = ("--data_dir", tmp_path / "data")
    ok(call("prepare_data", "--model", micro, "--dataset", tmp_path / name, *where, "--validation_fraction", 0.3))
    flags = (*quick[:4], *where, *quick[6:], "--rewards", "correct,length:0.1", "--seed", 1)
    trained = call("train_grpo", 2, *flags, "--output_dir", tmp_path / "o")
    assert trained.code == 0 and "correct x 1" in trained.out, trained.err
    measured = ("--adapter", tmp_path / "o-final", "--validation_dir", tmp_path / "v", "--samples_per_prompt", 2)
    done = call("validate_model", *quick[:4], *where, *measured)
    assert done.code == 0 and "pass@2" in done.out and "from wrong to right" in done.out, done.err
    accuracy = json.loads((tmp_path / "v" / "report.json").read_text())["accuracy"]
    assert set(accuracy["pass@k"]) == {"1", "2"} and "## Accuracy" in (tmp_path / "v" / "report.md").read_text()
