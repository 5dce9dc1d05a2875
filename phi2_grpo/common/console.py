"""One kind of table on the terminal, one in Markdown, one kind of figure."""

import os
import sys
from collections.abc import Collection, Iterable

import rich.console
from rich.table import Table

GREY, BLUE, ORANGE, GREEN, RED, PURPLE = "#999999", "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3"


class Console(rich.console.Console):
    """Prints text as it is (a path may hold what rich takes for markup), and goes on where its pipe is closed: `| head` has
    read enough, and a `| tee` dies of the Ctrl-C after which a training still has to save."""

    def __init__(self, **options):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_table(title: str, *columns: str, rows: Iterable[Iterable] = (), words: Collection[int] = (0,), **options) -> Table:
    """A rich table of numbers, aligned to the right; the columns `words` hold words. Its cells are texts, or rich's own."""
    table = Table(*columns, title=title, title_justify="left", **options)
    for i, column in enumerate(table.columns):
        column.justify, column.overflow = "left" if i in words else "right", "fold"  # no name loses its end
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Collection[str], rows: Iterable[Iterable]) -> list[str]:
    head, *lines = (f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows))
    return [head, "|" + "---|" * len(columns), *lines]


def make_figure(rows: int, columns: int, width: float, height: float, **options) -> tuple:
    """A matplotlib figure of `width` x `height` inches, and its axes."""
    from matplotlib.figure import Figure  # no pyplot: nothing to close, no window

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_interval(axes, y: float, value: float, ends, color: str, label: str | None = None) -> None:
    """A value with its interval, `ends`, which may be None or two of None."""
    if ends and ends[0] is not None:
        axes.plot(ends, [y, y], color=color)
    axes.plot(value, y, "o", color=color, label=label)
