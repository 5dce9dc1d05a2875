"""Fifty callers at once on the app's API, for a minute: what comes back, whether answers mix, whether memory grows.

  python benchmarks/callers.py [--callers 50] [--seconds 60]

Starts the app with the demo's adapter (make demo). Each caller asks for a known seed of tuned or base, and again as soon as it
has its answer; an answer is right when it equals the one that a lone caller got.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QUESTION = "What are the benefits of exercise?"
WANTED = [(model, seed) for model in ("tuned", "base") for seed in range(8)]


def ask(url: str, model: str, seed: int) -> str | None:
    """The answer; None where the queue is full, which is a proper answer too. Raises OSError for anything else."""
    data = json.dumps({"data": [QUESTION, model, 32, True, 0.7, 0.9, seed, True]}).encode()
    try:
        request = urllib.request.Request(f"{url}/gradio_api/call/ask", data, {"Content-Type": "application/json"})
        event = json.load(urllib.request.urlopen(request, timeout=120))["event_id"]
    except urllib.error.HTTPError as error:
        if error.code == 503 and b"queue is full" in error.read().lower():
            return None
        raise
    stream = urllib.request.urlopen(f"{url}/gradio_api/call/ask/{event}", timeout=120).read().decode()
    answer = re.search(r"event: complete\ndata: (.*)", stream)
    if not answer:
        raise OSError(f"no answer: {stream[-300:]}")
    return json.loads(answer[1])[0]


def memory(pid: int) -> float:
    """Resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def crowd(url: str, pid: int, callers: int, seconds: float) -> dict:
    """Counts of right, refused, mixed and failed answers, seconds to an answer, and the server's memory early and late."""
    alone = {wanted: ask(url, *wanted) for wanted in WANTED}
    counts = {"right": 0, "refused": 0, "mixed": 0, "failed": 0}
    waits, first_error, lock = [], [], threading.Lock()
    end = time.monotonic() + seconds

    def caller(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            wanted, start = draw.choice(WANTED), time.monotonic()
            try:
                got = ask(url, *wanted)
                kind = "refused" if got is None else "right" if got == alone[wanted] else "mixed"
            except (OSError, ValueError) as error:
                kind = "failed"
                first_error.append(repr(error))
            with lock:
                counts[kind] += 1
                if kind == "right":
                    waits.append(time.monotonic() - start)
            if kind == "refused":
                time.sleep(1)

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    early = memory(pid)
    for thread in threads:
        thread.join()
    return {**counts, "waits": waits, "early": early, "late": memory(pid), "errors": first_error[:3]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--port", type=int, default=7979)
    arguments = parser.parse_args()
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table

    adapter = ("--adapter", "results/tiny-grpo-final", "--base", "results/tiny-base", "--port", str(arguments.port))
    server = subprocess.Popen([sys.executable, "hf_app/app.py", *adapter], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        for line in server.stdout:
            if "Running on" in line:
                break
        threading.Thread(target=server.stdout.read, daemon=True).start()
        counts = crowd(f"http://127.0.0.1:{arguments.port}", server.pid, arguments.callers, arguments.seconds)
    finally:
        server.terminate()
        server.wait(30)
    waits = sorted(counts["waits"])
    columns = ("right answers", "refused, queue full", "mixed up", "failed", "seconds to an answer: median, 95th percentile",
               "server's memory after a quarter, at the end")  # fmt: skip
    took = f"{statistics.median(waits):.1f}, {waits[int(0.95 * len(waits))]:.1f}"
    row = [*(counts[kind] for kind in ("right", "refused", "mixed", "failed")), took,
           f"{counts['early']:.0f} MB, {counts['late']:.0f} MB"]  # fmt: skip
    body = "\n".join(markdown_table(columns, [row])) + (
        f"\n\n{arguments.callers} callers for {arguments.seconds:.0f} s, tiny model, 32 tokens an answer, tuned and base in "
        "turn; the callers share the two cores with the server."
    )
    write_section("Fifty callers on the app", "python benchmarks/callers.py", body, "torch", "transformers", "gradio")


if __name__ == "__main__":
    main()
