"""The console of all parts of a run, its lines and its progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

LOG_WIDTH = 140  # a log file has no width of its own, and 80 columns would cut every shape
BAR_WIDTH = 20
# Of the 256 whose red, green and blue are fixed, those that a light and a dark terminal both show:
# a theme's own yellow or cyan cannot be read on white.
GREEN, RED, ORANGE, CYAN, GREY = (f"color({number})" for number in (28, 160, 130, 30, 244))


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal, or as COLUMNS says; a file has `LOG_WIDTH` without it."""
    stream = sys.stderr if stderr else sys.stdout
    own = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(stderr=stderr, width=None if own else LOG_WIDTH, highlight=False)


def line(text: str, console: Console) -> None:
    """One line: cut at a terminal's edge, whole in a file."""
    if console.is_terminal:
        console.print(text, no_wrap=True, overflow="ellipsis")
    else:
        console.print(text, soft_wrap=True)


def place(name: str, text: str, console: Console) -> None:
    """A name and a path, which a terminal may break but not pad, so that it can be copied."""
    console.print(f"{name}: {escape(text)}", soft_wrap=True)


def paragraph(text: str, console: Console) -> None:
    """A sentence: broken between words at a terminal's edge, one line in a file."""
    console.print(text, soft_wrap=not console.is_terminal)


class TimeLeft(ProgressColumn):
    """The time that what is left takes at the pace so far, at most what a limit leaves."""

    def __init__(self, limit: Callable[[], float]) -> None:
        super().__init__()
        self._limit = limit

    def render(self, task: Task) -> Text:
        """ "1:05 left"."""
        seconds = self._limit()
        if task.completed and task.elapsed and task.total is not None:
            seconds = min(seconds, task.elapsed / task.completed * task.remaining)  # type: ignore[operator]
        if seconds == float("inf"):
            return Text("-:-- left")
        minutes, rest = divmod(round(seconds), 60)
        return Text(f"{minutes}:{rest:02d} left", style=CYAN)


def measuring_bar(console: Console, limit: Callable[[], float]) -> Progress:
    """The name of what is measured, how many are done, and the time left; nothing in a file.

    It is drawn when it changes and not in between: a thread that draws would be measured, too.
    """
    return Progress(
        _name("{task.description}"),
        _bar(),
        MofNCompleteColumn(),
        TimeLeft(limit),
        console=console,
        disable=not console.is_terminal,
        expand=True,
        transient=True,
        auto_refresh=False,
    )


class TrainingBar(Progress):
    """What the run says of its losses stands on lines of its own, below the bar."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if task.description:
                yield Text(task.description, style="dim")


def training_bar(name: str, console: Console) -> Progress:
    """Name, steps done and the time left; below, whatever the run says of its losses."""
    return TrainingBar(
        _name(name),
        _bar(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        expand=True,
    )


def _bar() -> BarColumn:
    return BarColumn(BAR_WIDTH, style=GREY, complete_style=RED, finished_style=GREEN)


def _name(text: str) -> TextColumn:
    column = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return TextColumn(f"[bold]{text}", table_column=column)
