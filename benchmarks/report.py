"""Writes the report folder and prints the summary table.

`python -m benchmarks.report RUN --out FOLDER` does so for a stored run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks import (
    folders,
    goals,
    markdown,
    noise,
    plots,
    results,
    scaling,
    tables,
    terminal,
)
from benchmarks.formats import gain, ratio, seconds, share
from benchmarks.results import Results
from benchmarks.rows import BASELINES, MODES, OURS
from benchmarks.spread import Ratio
from benchmarks.tables import Column

# What a narrow terminal does without after the ceiling's share and the baselines that few ops have.
DISPENSABLE = ("reference", "compiled", "time", "library", "ours")


def write(found: Results, out: Path | None, until: float = math.inf) -> Path:
    """Fills the folder with the report, its images, the rows as CSV and the data.

    Images that are not begun by `until` are left out.
    """
    folder = folders.for_report(found, out)
    (folder / "results.json").write_text(folders.dump(found))
    results.table(found, folder / "results.csv")
    (folder / "report.md").write_text(markdown.report(found, plots.draw(found, folder, until)))
    return folder


def show(found: Results, console: Console) -> None:
    """The summary on the terminal: the fastest of ours against each baseline, goals, growth."""
    if results.measured(found):
        _speedups(found, console)
        _goals(found, console)
        _growth(found, console)
    if skips := results.skips(found):
        terminal.paragraph(f"[{terminal.ORANGE}]{skips}[/]", console)
    if banner := noise.banner(found):
        terminal.paragraph(f"[bold reverse]{banner}[/bold reverse]", console)


def _speedups(found: Results, console: Console) -> None:
    names = results.baselines(found["rows"])
    others = [name for name in reversed(names) if name not in BASELINES]
    turns = {name: turn for turn, name in enumerate(["of ceiling", *others, *DISPENSABLE])}
    columns = [
        Column("shape", "left"),
        Column("pass", "left"),
        Column("ours", "left", leave=turns["ours"]),
        *(Column(n, leave=turns.get(n)) for n in ("time", *names, "of ceiling")),
    ]
    lines: list[list[str]] = []
    for op in results.ops(found):
        of_op: list[list[str]] = []
        for shape in results.shapes(found, op, MODES[0]):
            first = len(of_op)
            for mode in MODES:
                group = results.members(found, op, mode, shape)
                if any("median_s" in row or row["status"] != "skipped" for row in group):
                    name = shape if len(of_op) == first else ""
                    of_op.append([name, mode, *_summary(group, names)])
        if of_op:
            lines += [[f"[bold]{op}[/bold]"], *of_op]
    tables.show("Fastest implementation: times as fast as each baseline", columns, lines, console)
    for name in names:
        terminal.line(f"against {name}: {goals.against(_gains(found, name))}", console)
    for names_of, backend in results.attentions(found).items():
        terminal.line(f"attention of PyTorch in {names_of}: {backend}", console)
    terminal.paragraph(
        "[dim]Times are this machine's; the ratios were measured side by side in this run, and "
        "± is half of the interval that holds the median nine times in ten. Undecided: it holds "
        "1x.[/dim]",
        console,
    )


def _gains(found: Results, name: str) -> Iterator[Ratio]:
    for op in results.ops(found):
        for mode in MODES:
            for shape in results.shapes(found, op, mode):
                ours = results.best(results.members(found, op, mode, shape))
                if ours and (gain := results.speedup(ours, name)):
                    yield gain


def _summary(group: list[results.Row], names: list[str]) -> list[str]:
    ours = results.best(group)
    if ours is None:
        untimed = next(r for r in group if r["kind"] == OURS)
        return [untimed["impl"], untimed["status"], *["-"] * len(names), "-"]
    by_name = {r["impl"]: r for r in group}
    cells = []
    for name in names:
        row = by_name.get(name, {})
        timed = not row or row is ours or "median_s" in row
        shown = _coloured(results.speedup(ours, name)) if timed else f"[dim]{row['status']}[/dim]"
        cells.append(shown)
    part = share(ours["share"], ours["ceiling"])
    return [ours["impl"], seconds(ours["median_s"]), *cells, part]


def _coloured(found: Ratio | None) -> str:
    """Green above 1x and red below, where the whole interval is."""
    if found is None:
        return "-"
    colour = goals.COLOURS[goals.outcome(found, 1.0)]
    return f"[{colour}]{gain(found)}[/]"


def _goals(found: Results, console: Console) -> None:
    columns = [
        Column("goal", "left"),
        Column("pass", "left"),
        Column("against", "left"),
        Column("at least", leave=0),
        Column("reached"),
        Column("verdict", "left"),
    ]
    lines: list[list[str]] = []
    for goal, shape, mode, reached, outcome in goals.verdicts(found):
        heading = [f"[bold]{goal.op}[/bold]"]
        if heading not in lines:
            lines.append(heading)
        verdict = f"[{goals.COLOURS[outcome]}]{outcome}[/]"
        against = [goal.baseline, ratio(goal.factor), gain(reached)]
        lines.append([shape, mode, *against, verdict])
    if lines:
        title = "Goals of docs/benchmarks.md: undecided where the interval holds the goal"
        tables.show(title, columns, lines, console)


def _growth(found: Results, console: Console) -> None:
    columns = [
        Column("op", "left"),
        Column("size", "left"),
        Column("pass", "left"),
        Column("ours"),
        Column("baseline"),
    ]
    lines, few = [], 0
    for op, letter in scaling.sweeps(found):
        for mode in MODES:
            shown = []
            for fit in scaling.fits(found, op, letter, mode):
                few += fit.time is None
                shown.append("-" if fit.time is None else f"{fit.impl} {fit.time}")
            if any(cell != "-" for cell in shown):
                lines.append([op, letter, mode, *shown, *["-"] * (2 - len(shown))])
    if lines:
        title = "Growth: the exponent b of time ~ size^b, ± its standard error"
        tables.show(title, columns, lines, console)
    if few:
        terminal.line(
            f"No exponent for {few} lines: fewer than {scaling.FEWEST} sizes have a time.", console
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's JSON, or the rows of one that was cut")
    parser.add_argument("--out", type=Path, help="the report folder")
    options = parser.parse_args()
    rows = options.run.suffix == ".jsonl"
    found = results.read(options.run) if rows else json.loads(options.run.read_text())
    console = terminal.console()
    show(found, console)
    terminal.place("report", str(write(found, options.out) / "report.md"), console)


if __name__ == "__main__":
    main()
