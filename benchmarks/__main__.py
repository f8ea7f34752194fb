"""`python -m benchmarks`: every op beside its baselines, measured in turn, and a report.

Returns non-zero if a result of ours was wrong or anything failed; the report is written in any
case. A run that is told to end (SIGTERM) reports what it has measured by then.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from benchmarks import compare, environment, folders, presets, report, results, rows, terminal
from benchmarks.formats import seconds
from benchmarks.measure import FAILED, OK, WRONG, Meter, Outcomes
from benchmarks.record import Record
from benchmarks.rows import OURS, Group
from molex_kernels.testing import load_ops

STORED = "stored"


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    folders.add_options(parser)
    parser.add_argument("-k", dest="select", default="", help="part of <op>/<shape>/<dtype>")
    parser.add_argument(
        "--compare",
        nargs="?",
        const=STORED,
        metavar="RUN",
        help="fail where ours became slower than in RUN; default: this machine's latest stored run",
    )
    options = parser.parse_args()

    console = terminal.console()
    preset = presets.PRESETS[options.preset]
    device = torch.device(options.device) if options.device else presets.default_device()
    if preset.needs_cuda and device.type != "cuda":
        console.print(f"--preset {preset.name} needs a CUDA device; none is used here")
        return 2
    facts = environment.describe(device)
    before = None
    if options.compare:
        before = folders.latest(facts) if options.compare == STORED else Path(options.compare)
        if before is None or not before.exists():
            console.print(f"no stored run of {environment.machine_slug(facts)} to compare with")
            return 2
    console.print(
        f"molex_kernels benchmarks, preset {preset.name}: {facts['chip']}, {facts['cores']} cores, "
        f"torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    )
    dtypes = presets.dtypes(device)
    groups = rows.groups(load_ops(), preset, device, dtypes)
    groups = [group for group in groups if options.select in group.name]
    start = time.monotonic()
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.out or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "rows.jsonl"
        file.unlink(missing_ok=True)
        try:
            signal.signal(signal.SIGTERM, _end)
            if not measure(groups, Meter(preset), Record(file, preset.name, device), console):
                failed.append("an op")
        except _Ended:
            failed.append("what was still to come: the run was told to end")
        if not file.exists():
            console.print("nothing was measured")
            return 1
        found = results.read(file)
    report.show(found, console)
    console.print(f"report: {report.write(found, options.out) / 'report.md'}")
    if options.save_results:
        console.print(f"results: {folders.store(found, options.save_results)}")
    console.print(f"took {time.monotonic() - start:.0f} s")
    if before and not compare.against(found, before, console):
        failed.append("comparison")
    for part in failed:
        console.print(f"[bold red]failed: {part}[/bold red] (see above)")
    return 1 if failed else 0


def measure(groups: Sequence[Group], meter: Meter, record: Record, console: Console) -> bool:
    """Measures one group after the other; whether all of ours were right."""
    right = True
    for index, group in enumerate(groups, 1):
        outcomes = meter.group(group)
        for outcome in outcomes.values():
            record.add(outcome)
            ours = outcome.facts["kind"] == OURS
            right &= not (outcome.status == FAILED or (outcome.status == WRONG and ours))
        _show(group, outcomes, f"{index}/{len(groups)}", console)
    return right


def _show(group: Group, outcomes: Outcomes, place: str, console: Console) -> None:
    for mode in group.modes:
        shown = []
        for (label, of_mode), outcome in outcomes.items():
            if of_mode != mode:
                continue
            if outcome.status == OK and outcome.samples:
                shown.append(f"{label} {seconds(statistics.median(outcome.samples.values()))}")
            else:
                shown.append(f"[dim]{label}: {outcome.status}[/dim]")
        console.print(f"{place} {group.name} [cyan]{mode}[/cyan]: {', '.join(shown)}")


class _Ended(BaseException):
    """SIGTERM came. No Exception, which a group that fails is taken for."""


def _end(*_: object) -> NoReturn:
    # `timeout` tells the process and then its group, and the report is still to be written.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Ended


if __name__ == "__main__":
    sys.exit(main())
