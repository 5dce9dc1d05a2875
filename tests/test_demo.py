"""The demo's commands, and what README and docs say: files, flags, numbers and commands are real."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ok, read_json, script

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()
# What the scripts leave, and files of the user's own.
MADE = {"reward.png", "metrics.jsonl", "run.json", "report.json", "report.md", "samples.jsonl", "scores.png",
        "evaluation.jsonl", "funnel.json", "my_rewards.py", "adapter_config.json", "generation_config.json",
        "trainer_state.json", "validation.png", "config.json", "tokenizer_config.json"}  # fmt: skip
# Flags of the scripts that are no settings, and of other programs (accelerate, torchrun, uv, pip, llama.cpp).
FLAGS = {"against", "preset", "check", "resume", "overwrite", "help", "language", "samples", "prompt", "dry_run", "out",
         "push_to_hub", "merged", "host", "share", "port", "base", "update", "private", "hardware", "torch-backend",
         "extra-index-url", "outfile", "multi_gpu", "num_processes", "nproc_per_node", "nnodes", "node_rank", "master_addr",
         "master_port", "config_file", "rdzv-conf", "repo-type", "kills", "turns", "lora_", "generation-config", "type", "sdk",
         "flavor", "ntasks-per-node", "rdzv-backend", "rdzv-endpoint"}  # fmt: skip


@pytest.mark.slow
def test_the_tiny_chain(call, tmp_path):
    """Prepare, inspect, train and validate the real tiny model: after 25 steps it is better on prompts it has not seen."""
    where = ("--data_dir", tmp_path / "data")
    ok(call("prepare_data", "--preset", "tiny", *where))
    ok(call("inspect_data", "--preset", "tiny", *where))
    options = ("--output_dir", tmp_path / "grpo", "--report_to", "none", "--learning_rate", "2e-3")
    trained = ok(script("train_grpo", "25", "--preset", "tiny", *where, *options))
    checked = ("--adapter", tmp_path / "grpo-final", "--validation_dir", tmp_path / "v", "--samples_per_prompt", "2")
    done = ok(call("validate_model", "--preset", "tiny", *where, *checked))
    metrics = read_json(tmp_path / "v" / "report.json")["metrics"]
    assert metrics["length"]["low"] > 0 and metrics["length"]["verdict"] == "better"
    assert metrics["ending"]["difference"] > 0
    assert "Warning" not in trained.err + done.err
    assert "collapse:" not in trained.out, "a sound run raises no alert"


@pytest.mark.parametrize("page", ["README.md", *DOCS])
def test_files_flags_and_pictures_are_real(page):
    from config import CONFIG

    text = {**DOCS, "README.md": README}[page]
    folders = (ROOT, ROOT / "hf_app", ROOT / "docs", *(ROOT / "phi2_grpo").iterdir(), ROOT / "phi2_grpo")
    for path in re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|jsonl|txt|md|png|json))`", text):
        assert path.split("/")[-1] in MADE or any((folder / path).exists() for folder in folders), path
    for flag in re.findall(r"(?<![-\w])--([a-z][a-z_-]*)", text):
        assert flag in CONFIG or flag in FLAGS, f"{page} names --{flag}"
    where = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (where / target).exists(), f"{page} links to {target}"
    assert page == "README.md" or f"{page})" in README + "".join(DOCS.values()), "no page links to it"
    assert len(text.splitlines()) <= (150 if page == "README.md" else 130)


def test_the_readme_s_reward_runs_as_it_stands_there(call, quick, tmp_path):
    """A few lines in a file of one's own, and the command below them."""
    code = re.search(r"```python\n(def sentences.+?)```", README, re.DOTALL)[1]
    command = re.search(r"^python train_grpo.py (--preset tiny --rewards \S*sentences\S*)", README, re.MULTILINE)[1]
    name = re.search(r"([\w./]+\.py):sentences", command)[1]
    (tmp_path / name).write_text(code)
    flags = command.replace(name, str(tmp_path / name)).split()
    assert "sentences x" in ok(call("train_grpo", 1, *flags, *quick[2:], "--output_dir", tmp_path / "o")).out


def test_numbers_are_the_measured_ones():
    """Tables and sentences of README and docs are those that the benchmarks wrote."""
    pages = README + "".join(DOCS.values())
    for title in ("The smollm2 run, over seeds", "The smollm2 reward model, over seeds", "A GRPO step, tiny", "Controls: sums"):
        section = RESULTS.split(f"## {title}\n")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("|")]
        assert len(rows) >= 5 and all(line in pages for line in rows), title
        if title == "The smollm2 run, over seeds":
            assert re.search(r"Over the seeds: (\S+ \[.+?\])", section)[1] in README
            for number in re.findall(r"[+-]?\d\.\d+", rows[2]):
                assert number in README.split("## Two commands")[0], f"{number} of seed 0 is missing at the top"
    tiny = RESULTS.split("## The tiny run, over seeds\n")[1].split("\n| 0 | ")[1].split(" | ")
    assert f"({tiny[0]} to {tiny[1]}, seed 0)" in " ".join(README.split())
    pages, results = " ".join(pages.split()), " ".join(RESULTS.split())
    for pattern in (r"step \d\.\d+ \[[^]]+\] times stock TRL", r"two processes \d\.\d+ \[[^]]+\] times one",
                    r"\d+ kills \(kill -9\), \d+ of them in a save"):  # fmt: skip
        sentences = re.findall(pattern, results)
        assert sentences and all(sentence in pages for sentence in sentences), pattern


@pytest.mark.slow
def test_the_commands_of_two_pages_run_as_they_stand(tmp_path):
    """In a copy of the project, what can run without a GPU: resume.md and multi_gpu.md, up to their first block of commands."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "results" / "tiny-base", tmp_path / "results" / "tiny-base")
    place = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    commands = ["python prepare_data.py --preset tiny"]
    for page in ("resume.md", "multi_gpu.md"):
        block = re.search(r"```bash\n(.+?)```", DOCS[page], re.DOTALL)[1]
        commands += [line.split("  #")[0] for line in block.splitlines() if line and "--multi_gpu" not in line]
    assert len(commands) >= 4
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=place, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
    assert read_json(tmp_path / "results" / "tiny-grpo-final" / "run.json")["steps"] == 120
    assert read_json(tmp_path / "results" / "two-final" / "run.json")["processes"] == 2


def test_pins_are_exact():
    for line in (ROOT / "requirements.txt").read_text().split() + (ROOT / "requirements-dev.txt").read_text().split()[2:]:
        assert re.fullmatch(r"[\w-]+==[\d.]+", line), line
