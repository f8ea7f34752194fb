"""Writes the report folder and prints the summary table.

`python -m benchmarks.report --ops pytest.json --text text.json --images images.json
--finetune finetune.json --out FOLDER` joins existing files.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import environment, markdown, plots, results, terminal
from benchmarks.end_to_end import finetune, images
from benchmarks.end_to_end.verdict import verdict
from benchmarks.formats import percent, ratio, seconds
from benchmarks.results import Results
from benchmarks.rows import MODES, OURS

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


def save_results(found: Results) -> Path:
    """Copies the results to results/<machine>/<date>-<commit>.json, to be committed."""
    facts = found["environment"]
    folder = SAVED / environment.machine_slug(facts)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{environment.run_slug(facts)}.json"
    results.save(found, folder)
    (folder / "results.json").replace(target)
    (folder / "results.csv").unlink()
    return target


def show(found: Results, console: Console) -> None:
    """The summary on the terminal: the fastest of ours against each baseline."""
    names = results.baselines(found)
    table = Table(title="Fastest implementation against each baseline (times faster)")
    table.add_column("shape", overflow="fold", min_width=28)
    for column in ("mode", "impl", "time", *names, "of ceiling"):
        table.add_column(column, justify="right", no_wrap=True)
    for op in results.ops(found):
        table.add_section()
        table.add_row(f"[bold]{op}[/bold]")
        for mode in MODES:
            for shape in results.shapes(found, op, mode):
                table.add_row(shape.split("/")[0], mode, *_summary(found, op, mode, shape, names))
    console.print(table)
    console.print("Times are this machine's; the ratios were measured side by side in this run.")
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


def _summary(found: Results, op: str, mode: str, shape: str, names: list[str]) -> list[str]:
    group = results.members(found, op, mode, shape)
    ours = results.best(group)
    if ours is None:
        untimed = next(r for r in group if r["kind"] == OURS)
        return [untimed["impl"], untimed["status"], *["-"] * len(names), "-"]
    by_name = {r["impl"]: r for r in group}
    cells = []
    for name in names:
        row = by_name.get(name, {})
        gain = results.speedup(ours, row)
        wordless = gain or not row or row is ours
        cells.append(ratio(gain) if wordless else row["status"])
    return [ours["impl"], seconds(ours["median_s"]), *cells, percent(ours["share"])]


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
    parser.add_argument("--ops", type=Path, help="pytest-benchmark's JSON")
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
