"""A progress bar in place of what the trainers print."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TrackioCallback

from phi2_grpo.common.console import Console


class ProgressBar(TrainerCallback):
    """A rich progress bar over the steps, in place of the trainer's own printing. Shows nothing where no terminal is."""

    def __init__(self, name: str):
        self.console = Console()
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def on_train_begin(self, args, state, control, **_):
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
        self.console.quiet = not state.is_world_process_zero  # several processes: one speaks
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


def alert(title: str, text: str, serious: bool) -> None:
    """An alarm on trackio's page. It has been said on the terminal already."""
    import trackio

    with redirect_stdout(io.StringIO()):
        trackio.alert(title=title, text=text, level=trackio.AlertLevel.ERROR if serious else trackio.AlertLevel.WARN)


def log_answers(step: int, answers: list[dict]) -> None:
    """A few answers of an evaluation on trackio's page, as a table."""
    import pandas
    import trackio

    table = trackio.Table(dataframe=pandas.DataFrame([{"step": step, **answer} for answer in answers]))
    with redirect_stdout(io.StringIO()):
        trackio.log({"eval/answers": table}, step=step)


@contextmanager
def progress_bar(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` things; yields what is told how many more are done. Shows nothing where no terminal is."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)


def silence_printing(trainer) -> None:
    """What stands here replaces the trainer's own printing of raw dicts, and trackio's of advice."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(TrackioCallback):
        trainer.add_callback(QuietTrackio())
