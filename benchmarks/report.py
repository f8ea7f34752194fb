"""Writes the report folder and prints the summary table.

`python -m benchmarks.report --ops ops.jsonl --text text.json --images images.json
--finetune finetune.json --out FOLDER` joins existing files.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import environment, goals, markdown, plots, results, scaling, terminal
from benchmarks.end_to_end import finetune, images
from benchmarks.end_to_end.verdict import verdict
from benchmarks.formats import gain, percent, seconds
from benchmarks.results import Results
from benchmarks.rows import MODES, OURS
from benchmarks.spread import Ratio

REPORTS = Path(__file__).parent / "reports"
SAVED = Path(__file__).parent / "results"


def write(found: Results, out: Path | None) -> Path:
    """Fills the folder; without `out` it is reports/<date>-<commit>, with `latest` beside it."""
    folder = out or REPORTS / environment.run_slug(found["environment"])
    folder.mkdir(parents=True, exist_ok=True)
    results.save(found, folder)
    (folder / "report.md").write_text(markdown.report(found, plots.draw(found, folder)))
    if out is None:
        _point_latest(folder)
    return folder


def save_results(found: Results, into: Path) -> Path:
    """Copies the results to <into>/<machine>/<date>-<commit>.json, to be committed."""
    facts = found["environment"]
    folder = into / environment.machine_slug(facts)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{environment.run_slug(facts)}.json"
    results.save(found, folder)
    (folder / "results.json").replace(target)
    (folder / "results.csv").unlink()
    return target


def show(found: Results, console: Console) -> None:
    """The summary on the terminal: the fastest of ours against each baseline, goals, growth."""
    if found["rows"]:
        console.print(_speedups(found))
        console.print(
            "Times are this machine's; the ratios were measured side by side in this run, and "
            "± is half of the interval that holds the median nine times in ten."
        )
    if standings := goals.standings(found):
        console.print(_goals(standings))
    growth = _growth(found)
    if growth.row_count:
        console.print(growth)
    if text := found["text"]:
        for run in text["runs"]:
            console.print(
                f"text, {text['labels'][run['variant']]}, seed {run['seed']}: {run['final']:.4f} "
                f"validation bits per byte after {text['steps']} steps, {run['swapped']:.4f} with "
                "swapped words"
            )
        for line in verdict(text):
            console.print(line)
    if found["images"]:
        for line in images.verdict(found["images"]):
            console.print(f"images, {line}")
    if found["finetune"]:
        for line in finetune.verdict(found["finetune"]):
            console.print(f"finetune, {line}")


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
                    name = shape.split("/")[0] if mode == MODES[0] else ""
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


def _goals(standings: list[goals.Standing]) -> Table:
    table = Table(title="Goals")
    for column in goals.COLUMNS:
        table.add_column(column, overflow="fold")
    colours = {goals.MET: "green", goals.MISSED: "red"}
    for standing in standings:
        *shown, status = standing.cells(worst=False)
        colour = colours.get(status, "yellow")
        table.add_row(*shown, f"[{colour}]{status}[/{colour}]")
    return table


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


def _point_latest(folder: Path) -> None:
    latest = folder.parent / "latest"
    if latest.is_symlink() or latest.is_file():
        latest.unlink()
    elif latest.is_dir():
        shutil.rmtree(latest)
    try:
        latest.symlink_to(folder.name, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, latest)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=Path, help="the ops' rows")
    parser.add_argument("--text", type=Path, help="the text run's JSON")
    parser.add_argument("--images", type=Path, help="the images run's JSON")
    parser.add_argument("--finetune", type=Path, help="the fine-tune's JSON")
    parser.add_argument("--out", type=Path, help="the report folder")
    options = parser.parse_args()
    found = results.collect(options.ops, options.text, options.images, options.finetune)
    if not found["environment"]:
        parser.error("give --ops, --text, --images or --finetune, an existing file")
    console = terminal.console()
    show(found, console)
    console.print(f"report: {write(found, options.out) / 'report.md'}")


if __name__ == "__main__":
    main()
