"""What a run shows on the terminal while it measures."""

from __future__ import annotations

import statistics
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from benchmarks import terminal
from benchmarks.formats import seconds
from benchmarks.measure import OK, Outcomes
from benchmarks.rows import Group


class Progress:
    """A bar over the groups and a line for each finished one."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar = Bar(
            TextColumn("[bold]ops"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=terminal.console(),
            disable=not enabled,
        )
        self._task = self._bar.add_task("", total=total)
        self._enabled = enabled

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.update(self._task, description="")
        self._bar.stop()

    def start(self, group: Group) -> None:
        """Names the group under way."""
        self._bar.update(self._task, description=group.name)

    def done(self, group: Group, outcomes: Outcomes) -> None:
        """Prints the group's times and moves the bar."""
        self._bar.advance(self._task)
        if not self._enabled:
            return
        for mode in group.modes:
            shown = []
            for (label, of_mode), outcome in outcomes.items():
                if of_mode != mode:
                    continue
                if outcome.status == OK and outcome.samples:
                    shown.append(f"{label} {seconds(statistics.median(outcome.samples.values()))}")
                else:
                    shown.append(f"[dim]{label}: {outcome.status}[/dim]")
            self._bar.console.print(f"{group.name} [cyan]{mode}[/cyan]: {', '.join(shown)}")
