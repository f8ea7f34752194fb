"""`python -m benchmarks.compare [NEW] [--against OLD]`: what became slower or wrong since a run.

Compared are the speed-ups against the named baselines, which are measured side by side, and never
times, which are those of a machine at an hour. Ours is slower where the speed-ups fell by more than
their intervals and `MARGIN` together, against the typical baseline: when only one of several fell,
that baseline became faster. Where the interval holds the margin, nothing is decided. Exits with 1
where anything is slower, wrong or failed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks import environment, folders, results, tables, terminal
from benchmarks.results import Results
from benchmarks.rows import BASELINES, MODES
from benchmarks.tables import Column

LATEST = folders.LATEST / "results.json"

MARGIN = 0.15  # of change that two processes show where nothing changed, beyond their intervals
SLOWER, FASTER, SAME, UNDECIDED = "slower", "faster", "same", "undecided"
BROKEN, GONE, NEW = "broken", "gone", "new"
REGRESSIONS = (SLOWER, BROKEN)
COUNTED = (SAME, FASTER, SLOWER, UNDECIDED)


@dataclass(frozen=True)
class Change:
    """One shape in one mode. `factor` is the new speed-up over the old; `noise` its uncertainty."""

    op: str
    mode: str
    shape: str
    status: str
    factor: float | None = None
    noise: float = 0.0
    note: str = ""


def changes(old: Results, new: Results) -> list[Change]:
    """Every shape of either run."""
    places = dict.fromkeys([*_places(new), *_places(old)])
    return [_change(old, new, *place) for place in places]


def regressions(found: list[Change]) -> list[Change]:
    """What fails the comparison."""
    return [change for change in found if change.status in REGRESSIONS]


def _places(found: Results) -> Iterator[tuple[str, str, str]]:
    for op in results.ops(found):
        for mode in MODES:
            for shape in results.shapes(found, op, mode):
                yield op, mode, shape


def _change(old: Results, new: Results, op: str, mode: str, shape: str) -> Change:
    before, after = (results.members(run, op, mode, shape) for run in (old, new))
    place = op, mode, shape
    broken = [r for r in after if r["kind"] == "ours" and r["status"] in ("wrong", "failed")]
    if broken:
        return Change(*place, BROKEN, note=f"{broken[0]['status']}: {broken[0]['reason']}")
    first, second = results.best(before), results.best(after)
    if first is None or second is None:
        return Change(*place, SAME if first is second else GONE if second is None else NEW)
    pairs = [
        (a, b)
        for name in BASELINES
        if (a := results.speedup(first, name)) and (b := results.speedup(second, name))
    ]
    if not pairs:
        return Change(*place, NEW, note="no baseline in both runs")
    logs = [math.log(b.median / a.median) for a, b in pairs]
    moved = statistics.median(logs)
    noise = statistics.median(math.hypot(a.half_width, b.half_width) for a, b in pairs)
    status, margin = UNDECIDED, math.log1p(MARGIN)
    if abs(moved) > noise + margin:
        status = SLOWER if moved < 0 else FASTER
    elif abs(moved) + noise <= margin:
        status = SAME
    return Change(*place, status, math.exp(moved), noise)


def show(found: list[Change], console: Console) -> None:
    """What changed, and how much did not."""
    columns = [
        Column("shape", "left"),
        Column("op", "left"),
        Column("pass", "left", leave=2),
        Column("status", "left"),
        Column("change"),
        Column("noise", leave=1),
    ]
    colours = dict.fromkeys((SLOWER, BROKEN), f"bold {terminal.RED}")
    colours[FASTER] = terminal.GREEN
    lines = []
    for change in found:
        if change.status in (SAME, NEW):
            continue
        colour = colours.get(change.status, terminal.ORANGE)
        factor = "-" if change.factor is None else f"{100 * (change.factor - 1):+.0f}%"
        status = f"[{colour}]{change.status}[/]"
        noise = f"±{100 * change.noise:.0f}%" if change.factor else "-"
        lines.append([change.shape, change.op, change.mode, status, factor, noise])
    if lines:
        tables.show("Speed-ups against the run compared with", columns, lines, console)
    for change in found:
        if change.status == BROKEN:
            place = f"{change.op}/{change.shape}, {change.mode}"
            terminal.paragraph(f"{place}: {escape(change.note)}", console)
    counts = {status: sum(c.status == status for c in found) for status in COUNTED}
    shown = ", ".join(f"{count} {status}" for status, count in counts.items())
    typical = [abs(math.log(c.factor)) for c in found if c.factor]
    if typical:
        shown += f"; the median change either way is {100 * statistics.median(typical):.1f}%"
    terminal.paragraph(f"compared: {shown}", console)


def against(new: Results, path: Path, console: Console) -> bool:
    """Compares with the run in the file and shows it; whether nothing became slower or wrong."""
    old = json.loads(path.read_text())
    if old["preset"] != new["preset"]:
        console.print(f"{path} is of the preset {old['preset']}, this run of {new['preset']}")
    console.print(f"compared with {path.name}, {old['environment']['date']}")
    found = changes(old, new)
    show(found, console)
    return not regressions(found)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("new", nargs="?", type=Path, default=LATEST, help="default: the latest run")
    parser.add_argument("--against", type=Path, help="default: this machine's latest stored run")
    options = parser.parse_args()
    console = terminal.console()
    if not options.new.exists():
        console.print(f"{options.new} is not there: run `make bench` first")
        return 2
    new = json.loads(options.new.read_text())
    old = options.against or folders.latest(new["environment"], but=options.new)
    if old is None or not old.exists():
        machine = environment.machine_slug(new["environment"])
        console.print(f"no stored run of {machine}: name one with --against")
        return 2
    return 0 if against(new, old, console) else 1


if __name__ == "__main__":
    sys.exit(main())
