"""The console of all parts of a run."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_WIDTH = 140  # a log file has no width of its own, and 80 columns would fold every shape


def console() -> Console:
    """Wraps long lines itself only where a terminal says how wide it is."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)


def training_bar(name: str, console: Console) -> Progress:
    """Steps done, the time left, and whatever the run says of its losses."""
    return Progress(
        TextColumn(f"[bold]{name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
