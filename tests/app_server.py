"""A running app for the tests: started, waited for, and ended."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class AppServer:
    """`tests/serve_app.py` in a process of its own."""

    def __init__(self, adapter: Path, base: Path, folder: Path):
        self.port, self.journal, self.log = free_port(), folder / "journal", folder / "log"
        self.url = f"http://127.0.0.1:{self.port}"
        self.journal.touch()
        command = [sys.executable, ROOT / "tests" / "serve_app.py", adapter, base, self.journal, "--port", str(self.port)]
        with self.log.open("w") as log:
            settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, cwd=folder)
        deadline = time.monotonic() + 90
        while "Running on" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def steps(self) -> int:
        """Tokens drawn so far."""
        return self.journal.read_text().count("token")

    def idle_within(self, seconds: float) -> bool:
        """Whether all generation ends in that time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = self.steps()
            time.sleep(0.3)
            if self.steps() == before:
                return True
        return False

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
