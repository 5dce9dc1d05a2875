"""Progress bars, and trainers and trackio without their own printing."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from transformers import PrinterCallback
from transformers.integrations import TrackioCallback
from transformers.integrations.integration_utils import rewrite_logs

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
    """Silent. A run from its start is a new one, also under an old name, and each row stands at the step that it is of."""

    def setup(self, args, state, model, **keywords):
        init = self._trackio.init
        if not state.global_step:
            self._trackio.init = lambda **given: init(**{**given, "resume": "never"})
        try:
            with QUIET:
                super().setup(args, state, model, **keywords)
        finally:
            self._trackio.init = init

    def on_log(self, args, state, control, model=None, logs=None, **_):
        if not self._initialized:  # by the evaluation at step 0
            self.setup(args, state, model)
        if state.is_world_process_zero:
            row = {key: value for key, value in logs.items() if not key.startswith(("train_", "total_"))}  # of the whole run
            self._trackio.log(rewrite_logs(row), step=state.global_step)

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
