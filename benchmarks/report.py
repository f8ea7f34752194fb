"""Writes the report folder and prints the summary table.

`python -m benchmarks.report RUN --out FOLDER` does so for a stored run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import folders, markdown, plots, results, scaling, terminal
from benchmarks.formats import gain, percent, seconds
from benchmarks.results import Results
from benchmarks.rows import MODES, OURS
from benchmarks.spread import Ratio


def write(found: Results, out: Path | None) -> Path:
    """Fills the folder with the report, its images, the rows as CSV and the data."""
    folder = folders.for_report(found, out)
    (folder / "results.json").write_text(folders.dump(found))
    results.table(found, folder / "results.csv")
    (folder / "report.md").write_text(markdown.report(found, plots.draw(found, folder)))
    return folder


def show(found: Results, console: Console) -> None:
    """The summary on the terminal: the fastest of ours against each baseline, and growth."""
    if found["rows"]:
        console.print(_speedups(found))
        console.print(
            "Times are this machine's; the ratios were measured side by side in this run, and "
            "± is half of the interval that holds the median nine times in ten."
        )
    growth = _growth(found)
    if growth.row_count:
        console.print(growth)


def _speedups(found: Results) -> Table:
    names = results.baselines(found["rows"])
    table = Table(title="Fastest implementation: times as fast as each baseline")
    table.add_column("shape", overflow="fold", min_width=32)
    for column in ("pass", "ours", "time", *names, "of ceiling"):
        table.add_column(column, justify="right", no_wrap=True)
    for op in results.ops(found):
        table.add_section()
        table.add_row(f"[bold]{op}[/bold]")
        for shape in results.shapes(found, op, MODES[0]):
            for mode in MODES:
                if group := results.members(found, op, mode, shape):
                    name = shape if mode == MODES[0] else ""
                    table.add_row(name, mode, *_summary(group, names))
    return table


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
        cells.append(_coloured(results.speedup(ours, name)) if timed else f"[dim]{row['status']}")
    return [ours["impl"], seconds(ours["median_s"]), *cells, percent(ours["share"])]


def _coloured(found: Ratio | None) -> str:
    """Green above 1x and red below, where the whole interval is."""
    if found is None:
        return "-"
    colour = "green" if found.low > 1 else "red" if found.high < 1 else "default"
    return f"[{colour}]{gain(found)}[/{colour}]"


def _growth(found: Results) -> Table:
    table = Table(title="Growth: the exponent b of time ~ size^b")
    for column in ("op", "size", "pass"):
        table.add_column(column)
    table.add_column("ours", justify="right")
    table.add_column("baselines")
    for op, letter in scaling.sweeps(found):
        for mode in MODES:
            fits = scaling.fits(found, op, letter, mode)
            shown = [f"{fit.impl} {fit.time:.2f}" for fit in fits if fit.time is not None]
            if shown:
                name = scaling.NAMES.get(letter, letter)
                table.add_row(op, name, mode, shown[0], ", ".join(shown[1:]) or "-")
    return table


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
    console.print(f"report: {write(found, options.out) / 'report.md'}")


if __name__ == "__main__":
    main()
