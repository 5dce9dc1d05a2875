"""The demo's commands on the embedded default, as the Makefile and the README have them."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, script


def test_the_tiny_chain(call, tmp_path):
    """Prepare, inspect, train and validate the real tiny model: after 25 steps it is better on prompts it has not seen."""
    where = ("--data_dir", tmp_path / "data")
    assert call("prepare_data", "--preset", "tiny", *where).code == 0
    assert call("inspect_data", "--preset", "tiny", *where).code == 0
    options = ("--output_dir", tmp_path / "grpo", "--report_to", "none")
    trained = script("train_grpo", "25", "--preset", "tiny", *where, *options, "--learning_rate", "2e-3")
    assert trained.code == 0, trained.err
    checked = ("--adapter", tmp_path / "grpo-final", "--validation_dir", tmp_path / "v", "--samples_per_prompt", "2")
    done = call("validate_model", "--preset", "tiny", *where, *checked)
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "v" / "report.json").read_text())["metrics"]
    assert metrics["length"]["low"] > 0 and metrics["length"]["verdict"] == "better"
    assert metrics["ending"]["difference"] > 0
    for printed in (trained.err, done.err):
        assert "Warning" not in printed
    assert "collapse:" not in trained.out, "a sound run raises no alarm"


def test_readme_names_real_files_and_flags():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|jsonl|txt|md|png))`", readme):
        made = (
            "reward.png",
            "metrics.jsonl",
            "run.json",
            "inspect.png",
            "report.json",
            "report.md",
            "samples.jsonl",
            "evaluation.jsonl",
            "messages.jsonl.gz",
            "my_rewards.py",
        )
        assert (
            (ROOT / path).exists()
            or path.split("/")[-1] in made
            or any((ROOT / folder / path).exists() for folder in ("phi2_grpo", "hf_app"))
        ), path
    from config import CONFIG

    own = {"against", "preset", "check", "resume", "overwrite", "help", "language", "samples", "search", "prompt"}
    own |= {"dry_run", "out", "push_to_hub", "merged", "host", "share"}
    own |= {"torch-backend", "extra-index-url", "with_samples", "outfile"}  # uv's, pip's and llama.cpp's
    own |= {"judge"}  # a benchmark's
    own |= {"multi_gpu", "num_processes", "nproc_per_node"}  # accelerate's and torchrun's
    for flag in re.findall(r"(?<!-)--([a-z][a-z_-]*)", readme):
        assert flag in CONFIG or flag in own, f"README names --{flag}"
    assert "make demo" in readme and "make test" in readme
    listed = readme.partition("phi2_grpo/           how")[2].partition("sample/tiny.jsonl")[0]
    assert set(re.findall(r"\w+\.py", listed)) == {path.name for path in (ROOT / "phi2_grpo").glob("[a-z]*.py")}


def test_the_readme_s_reward_runs_as_it_stands_there(call, quick, tmp_path, monkeypatch):
    """Five lines in a file of one's own, and the command below them."""
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(def sentences.+?)```", readme, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 5
    command = re.search(r"^python train_grpo.py (--preset tiny --rewards \S*sentences\S*)", readme, re.MULTILINE)[1]
    name = re.search(r"([\w./]+\.py):sentences", command)[1]
    (tmp_path / name).write_text(code)
    flags = command.replace(name, str(tmp_path / name)).split()
    done = call("train_grpo", 1, *flags, *quick[2:], "--output_dir", tmp_path / "o")
    assert done.code == 0 and "sentences x" in done.out, done.err
    names = {}
    exec(code, names)
    assert names["sentences"](answers=["Yes. No. Why? So.", "No"]) == [1.0, 0.0]


def test_readme_s_numbers_are_the_measured_ones():
    """The tables over seeds, and the sentence at the top, are those that the benchmarks wrote."""
    readme, results = ((ROOT / path).read_text() for path in ("README.md", "benchmarks/RESULTS.md"))
    tables = {}
    for title in ("The tiny run, over seeds", "The tiny reward model, over seeds", "A GRPO step, tiny"):
        section = results.split(f"## {title}\n")[1].split("\n## ")[0]
        tables[title] = [line for line in section.splitlines() if line.startswith("|")]
        assert len(tables[title]) >= 5 and all(line in readme for line in tables[title]), title
    for number in re.findall(r"[+-]?\d\.\d+", tables["The tiny run, over seeds"][2]):
        assert number in readme.split("![")[0], f"{number} of seed 0 is missing at the top"


def test_readme_s_sentences_are_the_measured_ones():
    readme, results = (" ".join((ROOT / path).read_text().split()) for path in ("README.md", "benchmarks/RESULTS.md"))
    full = re.search(r"\| 1 \| 16 \|.+?\| (\d\.\d+ \[[^]]+\])", results)[1]
    assert f"no faster than `generate` ({full}, batch 1)" in readme
    for pattern in (r"step \d\.\d+ \[[^]]+\] times stock TRL", r"two processes \d\.\d+ \[[^]]+\] times one",
                    r"\d+ kills \(kill -9\), \d+ of them in a save"):  # fmt: skip
        found = re.findall(pattern, results)
        assert found and all(sentence in readme for sentence in found), pattern
    table = re.search(r"\| values \| prompts \|.+?Share of 2000", results)[0]
    shares = [list(map(float, re.findall(r"([\d.]+)%", row))) for row in table.split("| |")]
    headline, others, _, usual = (max(column) for column in zip(*filter(None, shares), strict=True))
    assert f"at most {headline} % had a false headline and {others} % any other false word" in readme
    assert headline <= 5 and others <= 5 and f"in up to {usual:.0f} %" in readme


@pytest.mark.slow
def test_the_commands_of_two_sections_run_as_they_stand(tmp_path):
    """In a copy of the project, what can run without a card: "If it stops" and "More GPUs"."""
    import os
    import shutil
    import subprocess
    import sys

    readme = (ROOT / "README.md").read_text()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "results" / "tiny-base", tmp_path / "results" / "tiny-base")
    place = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    commands = ["python prepare_data.py --preset tiny"]
    for title in ("If it stops", "More GPUs"):
        block = re.search(rf"## {title}\n.*?```bash\n(.+?)```", readme, re.DOTALL)[1]
        commands += [line.split("  #")[0] for line in block.splitlines() if "--multi_gpu" not in line]
    assert len(commands) == 4
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=place, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
    assert json.loads((tmp_path / "results" / "tiny-grpo-final" / "run.json").read_text())["steps"] == 120
    assert json.loads((tmp_path / "results" / "two-final" / "run.json").read_text())["processes"] == 2


def test_pins_are_exact():
    for line in (ROOT / "requirements.txt").read_text().split() + (ROOT / "requirements-dev.txt").read_text().split()[2:]:
        assert re.fullmatch(r"[\w-]+==[\d.]+", line), line


def test_pictures_the_readme_shows_are_there():
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
