"""A progress bar in place of what the trainers print, and trackio without its banner."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TrackioCallback

from phi2_grpo.common.console import Console

COLUMNS = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
QUIET = redirect_stdout(io.StringIO())  # for trackio: its advice names another folder than ours


def make_bar(console: Console) -> Progress:
    """A bar with the time left, on a terminal only."""
    return Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal)


class ProgressBar(TrainerCallback):
    """A bar over the steps of a training."""

    def __init__(self, name: str):
        self.name, self.console = name, Console()
        self.progress = make_bar(self.console)

    def on_train_begin(self, args, state, control, **_):
        self.task = self.progress.add_task(self.name, total=state.max_steps, completed=state.global_step)
        self.console.quiet = not state.is_world_process_zero
        if state.is_world_process_zero:
            self.progress.start()

    def on_step_end(self, args, state, control, **_):
        self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args, state, control, **_):
        self.progress.stop()


@contextmanager
def progress_bar(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` things; yields a function that takes how many more are done."""
    with make_bar(console) as bar:
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
