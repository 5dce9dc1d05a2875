"""test_fuzz.py with many more cases: any input gets an answer or a message that refuses it.

python benchmarks/fuzz.py [--cases 10000]
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    cases = parser.parse_args().cases
    from benchmarks.results import write_section
    from phi2_grpo.common.console import markdown_table

    command = [sys.executable, "-m", "pytest", "tests/test_scripts/test_fuzz.py", "-v", "--disable-warnings"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "FUZZ_CASES": str(cases)}, capture_output=True, text=True)
    results = re.findall(r"^tests/test_scripts/test_fuzz.py::(\w+) (PASSED|FAILED)", done.stdout, re.MULTILINE)
    if not results:
        raise SystemExit(done.stdout + done.stderr)
    rows = [(name.removeprefix("test_").replace("_", " "), f"{cases:,}", "none" if end == "PASSED" else "YES, see the test")
            for name, end in results]  # fmt: skip
    lines = markdown_table(("made-up input", "cases", "traceback or hang"), rows)
    write_section("Fuzzed", f"python benchmarks/fuzz.py --cases {cases}", "\n".join(lines), "hypothesis")
    if done.returncode:
        raise SystemExit(done.stdout)


if __name__ == "__main__":
    main()
