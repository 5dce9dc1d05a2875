"""The samples of a validation as they are drawn: what a killed one goes on from."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError


class Journal:
    """`found` has the completion ids of (side, index); what is added, after `open`, is on disk when `add` returns.

    Args:
        path: a JSON line for the run, then one for each completion.
        run: what must be the same for a journal to be gone on with.
        overwrite: start anew where the run is another.

    Raises UserError for the unfinished journal of another run.
    """

    def __init__(self, path: Path, run: dict, overwrite: bool = False):
        self.path, self.run, self.found, self.batch = path, run, {}, None
        head, found = _read(path)
        was = head.get("run", {})
        if path.exists() and was != run and not overwrite:
            other = ", ".join(key for key in run if was.get(key) != run[key])
            raise UserError(
                f"{path} is from a validation that was not finished, with another {other}. Finish that, or start anew here: "
                "--overwrite; or choose another --validation_dir."
            )
        if was == run:
            self.batch, self.found = head["batch"], found

    def open(self, batch: int) -> None:
        """`batch`: completions drawn at once. Seeds go by batches, so a journal that is gone on with keeps its own."""
        self.batch = self.batch or batch
        # Rewritten, because the last line may have been cut in the middle.
        kept = [{"side": side, "index": index, "completion_ids": ids} for (side, index), ids in self.found.items()]
        files.write_rows(self.path, [{"run": self.run, "batch": self.batch}, *kept])
        self.file = self.path.open("a", encoding="utf-8")

    def add(self, side: str, completions: dict[int, list[int]]) -> None:
        """Completions by index."""
        self.found.update({(side, index): ids for index, ids in completions.items()})
        lines = [{"side": side, "index": index, "completion_ids": ids} for index, ids in completions.items()]
        self.file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.file.flush()
        os.fsync(self.file.fileno())

    @contextmanager
    def finished_in(self, folder: Path) -> Iterator[Path]:
        """A folder for the report's files, which replace those in `folder` when the block has ended; the journal goes last."""
        new = self.path.parent / "report"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        for path in sorted(new.iterdir(), key=lambda path: path.name == "report.json"):
            os.replace(path, folder / path.name)
        self.file.close()
        self.path.unlink()
        new.rmdir()
        with suppress(OSError):  # not empty: the rest is somebody's
            self.path.parent.rmdir()


def _read(path: Path) -> tuple[dict, dict]:
    """The first line of a journal, and the completions after it; up to what is not whole, {} for what is not there."""
    head, found = {}, {}
    try:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if head:
                found[line["side"], line["index"]] = list(map(int, line["completion_ids"]))
            else:
                head = {"run": dict(line["run"]), "batch": int(line["batch"])}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return head, found
