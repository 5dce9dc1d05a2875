"""Seconds and memory of prepare_data.py on as many rows as oasst1 has, and on 100,000 prompts of one's own.

  python benchmarks/prepare.py

The rows are made from sample/tiny.jsonl: the same trees, or their questions and answers, again with new ids and a counter in
each text, so that nothing is a duplicate. Whole processes, imports included; memory is the largest of the process (ru_maxrss).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROWS = 88_838  # as many as the ready trees of oasst1 have
OWN_ROWS = 100_000
RUNS = 3


def read_sample() -> list[dict]:
    return [json.loads(line) for line in (ROOT / "sample" / "tiny.jsonl").open(encoding="utf-8")]


def make_trees(path: Path) -> None:
    sample = read_sample()
    with path.open("w", encoding="utf-8") as lines:
        for i in range(ROWS):
            row, copy = dict(sample[i % len(sample)]), i // len(sample)
            for key in ("message_id", "parent_id", "message_tree_id"):
                row[key] = row[key] and f"{row[key]}-{copy}"
            # oasst1's messages are about 500 characters long on average, the sample's 100.
            row["text"] = f"{row['text']} ({copy}) " + (row["text"] + " ") * (3 if row["role"] == "assistant" else 0)
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def make_questions(path: Path) -> None:
    texts = {row["message_id"]: row["text"] for row in read_sample()}
    pairs = [(texts[row["parent_id"]], row["text"]) for row in read_sample() if row["parent_id"] in texts]
    with path.open("w", encoding="utf-8") as lines:
        for i in range(OWN_ROWS):
            question, answer = pairs[i % len(pairs)]
            row = {"question": f"{question} ({i // len(pairs)})", "answer": f"{answer} ({i})"}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(source: Path, folder: Path, *more: str) -> tuple[float, float]:
    """Wall seconds and peak memory in GB of one run."""
    command = [sys.executable, "prepare_data.py", "--preset", "tiny", "--dataset", str(source), "--data_dir", str(folder)]
    started = time.perf_counter()
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen([*command, *more, "--overwrite"], cwd=ROOT, stdout=nothing)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"prepare_data.py failed with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table

    cases = (("oasst1's messages", ROWS, make_trees, ()), ("questions and answers", OWN_ROWS, make_questions, ()),
             ("the same, languages guessed", OWN_ROWS, make_questions, ("--languages", "en,es,de,fr")))  # fmt: skip
    lines = []
    for name, rows, make, more in cases:
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "rows.jsonl"
            make(source)
            seconds, memory = zip(*(measure(source, Path(scratch) / "data", *more) for _ in range(RUNS)), strict=True)
            size, spread = f"{source.stat().st_size / 1e6:.0f} MB", f"{min(seconds):.1f} to {max(seconds):.1f}"
            lines.append((name, f"{rows:,}", size, RUNS, spread, f"{max(memory):.2f} GB"))
    table = markdown_table(("", "rows", "file", "runs", "seconds, lowest to highest", "peak memory"), lines)
    write_section("prepare_data", "python benchmarks/prepare.py", "\n".join(table), "datasets", "tokenizers")


if __name__ == "__main__":
    main()
