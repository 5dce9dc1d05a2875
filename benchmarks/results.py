"""RESULTS.md, which the benchmarks write: a section each, replaced when it is measured again."""

import os
import platform
import re
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

from phi2_grpo.common.files import write_text
from phi2_grpo.training.outputs import git_commit

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = "# Measured\n\nEach section was written by the script it names. Nothing here is an estimate.\n"


def commit() -> str:
    """The commit that was measured; "-dirty" where a file other than RESULTS.md differs from it."""
    others = ["git", "-C", str(RESULTS.parent.parent), "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/RESULTS.md"]
    changed = subprocess.run(others, check=False).returncode
    return str(git_commit()).removesuffix("-dirty") + ("-dirty" if changed else "")


def write_section(title: str, command: str, body: str, *libraries: str) -> None:
    """Replace the section called `title`, or add it; `libraries` are named with their versions."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    made_with = ", ".join(["Python " + platform.python_version(), *(f"{name} {version(name)}" for name in libraries)])
    note = f"`{command}`, {date.today()}, commit {commit()}, {machine}; {made_with}."
    section = f"## {title}\n\n{note}\n\n{body.strip()}\n"
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    write_text(RESULTS, text.rstrip() + "\n")
    print(section)
