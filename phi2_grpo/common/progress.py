"""Progress bars, and trainers and trackio without their own printing."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from transformers import PrinterCallback
from transformers.integrations import TrackioCallback

from phi2_grpo.common.console import Console

COLUMNS = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
QUIET = redirect_stdout(io.StringIO())  # for trackio: its advice names another folder than ours


@contextmanager
def progress_bar(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` things, on a terminal only; yields a function that takes how many more are done."""
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)


class QuietTrackio(TrackioCallback):
    def setup(self, *arguments, **keywords):
        with QUIET:
            super().setup(*arguments, **keywords)

    def on_train_end(self, *arguments, **keywords):
        with QUIET:
            super().on_train_end(*arguments, **keywords)


def silence_printing(trainer) -> None:
    """Without the trainer's own printing of raw dicts, and trackio's of advice."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(TrackioCallback):
        trainer.add_callback(QuietTrackio())


def finish_trackio() -> None:
    """After a run that ended early. At exit trackio would print that it uploads logs, and means its local file."""
    if trackio := sys.modules.get("trackio"):
        with QUIET, suppress(RuntimeError):  # it raises where no run is open
            trackio.finish()


def alert(title: str, text: str, serious: bool) -> None:
    """An alert on trackio's page; the terminal has shown it already."""
    import trackio

    with QUIET:
        trackio.alert(title=title, text=text, level=trackio.AlertLevel.ERROR if serious else trackio.AlertLevel.WARN)
