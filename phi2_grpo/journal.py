"""The samples of a validation as they are drawn: what a killed one goes on from."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi2_grpo.cli import UserError


class Journal:
    """`found` has the completion ids of (side, index); what is added is on disk when `add` returns.

    Args:
        path: a JSON line for the run, then one for each completion.
        run: what must be the same for a journal to be gone on with.
        overwrite: start anew where it is not.

    Raises UserError for the unfinished journal of another run.
    """

    def __init__(self, path: Path, run: dict, overwrite: bool = False):
        self.path, self.found = path, {}
        lines = _whole_lines(path)
        if lines and lines[0] != {"run": run} and not overwrite:
            was = lines[0].get("run") or {}
            other = ", ".join(key for key in run if was.get(key) != run[key])
            raise UserError(
                f"{path} is from a validation that was not finished, with another {other}. Finish that, or start anew here: "
                "--overwrite; or choose another --validation_dir."
            )
        if lines and lines[0] == {"run": run}:
            self.found = {(line["side"], line["index"]): line["completion_ids"] for line in lines[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Rewritten, because the last line may have been cut in the middle.
        kept = [{"side": side, "index": index, "completion_ids": ids} for (side, index), ids in self.found.items()]
        self.file = path.open("w", encoding="utf-8")
        self._write([{"run": run}, *kept])

    def add(self, side: str, completions: dict[int, list[int]]) -> None:
        """Completions by index."""
        self.found.update({(side, index): ids for index, ids in completions.items()})
        self._write([{"side": side, "index": index, "completion_ids": ids} for index, ids in completions.items()])

    def _write(self, lines: list[dict]) -> None:
        self.file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.file.flush()
        os.fsync(self.file.fileno())

    @contextmanager
    def finished_in(self, folder: Path) -> Iterator[Path]:
        """A folder for the report's files, which replace those in `folder` when the block has ended; the journal goes."""
        self.file.close()
        yield self.path.parent
        for new in sorted(self.path.parent.iterdir(), key=lambda path: path.name == "report.json"):  # the report last
            os.replace(new, folder / new.name)
        shutil.rmtree(self.path.parent)


def _whole_lines(path: Path) -> list[dict]:
    """The lines of a journal up to the first that is not whole."""
    lines = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return [line for line in lines if isinstance(line, dict)]
