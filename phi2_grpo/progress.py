"""A progress bar in place of what the trainers print."""

import io
from contextlib import redirect_stdout

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TrackioCallback


class ProgressBar(TrainerCallback):
    """A rich progress bar over the steps, in place of the trainer's own printing. Shows nothing where no terminal is."""

    def __init__(self, name: str):
        self.console = Console()
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def on_train_begin(self, args, state, control, **_):
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
        if state.is_world_process_zero:
            self.progress.start()

    def on_step_end(self, args, state, control, **_):
        self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args, state, control, **_):
        self.progress.stop()


class QuietTrackio(TrackioCallback):
    """trackio without its banner: the command there would look in another folder, and nothing is uploaded."""

    def setup(self, *arguments, **keywords):
        with redirect_stdout(io.StringIO()):
            super().setup(*arguments, **keywords)

    def on_train_end(self, *arguments, **keywords):
        with redirect_stdout(io.StringIO()):
            super().on_train_end(*arguments, **keywords)


def quiet(trainer) -> None:
    """What stands here replaces the trainer's own printing of raw dicts, and trackio's of advice."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(TrackioCallback):
        trainer.add_callback(QuietTrackio())
