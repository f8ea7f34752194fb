"""`python -m benchmarks`: every op beside its baselines, measured in turn, and a report.

Returns non-zero if a result of ours was wrong or anything failed; the report is written in any
case. A run that is told to end (SIGTERM), or whose limit is over, reports what it has measured by
then and lists what it has not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks import (
    ceilings,
    compare,
    environment,
    folders,
    goals,
    noise,
    presets,
    report,
    results,
    rows,
    terminal,
)
from benchmarks.formats import seconds
from benchmarks.limit import Limit
from benchmarks.measure import FAILED, OK, WRONG, Meter, Outcomes
from benchmarks.record import Record
from benchmarks.rows import OURS, Group
from molex_kernels.testing import load_ops

STORED = "stored"
STDOUT = "-"


def main() -> int:
    """Command line; the exit status."""
    options = _parser().parse_args()
    start = time.monotonic()
    console = terminal.console(stderr=options.json == STDOUT)
    preset = presets.PRESETS[options.preset]
    limit = Limit(preset.limit_seconds if options.limit is None else options.limit)
    device = torch.device(options.device) if options.device else presets.default_device()
    if preset.needs_cuda and device.type != "cuda":
        console.print(f"--preset {preset.name} needs a CUDA device; none is used here")
        return 2
    dtypes = tuple(
        dict.fromkeys(presets.SPELLED[name] for name in options.dtype)
    ) or presets.dtypes(device)
    ops = load_ops()
    groups = [
        g
        for g in rows.groups(ops, preset, device, dtypes)
        if any(text in g.name for text in options.filter)
    ]
    groups.sort(key=lambda group: not goals.concerns(group))  # a limit cuts what has no goal
    if not groups:
        given = " ".join(options.filter)
        terminal.paragraph(
            f"--filter {given}: expected a part of <op>/<shape>/<dtype>, such as "
            f"one of {', '.join(ops)}; no shape of preset {preset.name} has it",
            console,
        )
        return 2
    facts = environment.describe(device)
    before = None
    if options.compare:
        before = folders.latest(facts) if options.compare == STORED else Path(options.compare)
        if before is None or not before.exists():
            console.print(f"no stored run of {environment.machine_slug(facts)} to compare with")
            return 2
    terminal.paragraph(
        f"molex_kernels benchmarks, preset {preset.name}: {facts['chip']}, {facts['cores']} cores, "
        f"torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}",
        console,
    )
    if sign := noise.loaded(facts):
        terminal.paragraph(f"[bold reverse]BUSY MACHINE: {sign}.[/bold reverse]", console)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.out or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "rows.jsonl"
        file.unlink(missing_ok=True)
        with limit.installed():
            record = Record(file, preset.name, device, dtypes)
            _ceilings(record, console)
            if not measure(groups, Meter(preset, limit=limit), record, console):
                failed.append("an op")
        found = results.read(file)
    if limit.killed:
        failed.append("what was still to come: the run was told to end")
    elif limit.reason:
        terminal.line(f"[{terminal.ORANGE}]{limit.reason}[/]", console)
    if not results.measured(found):
        failed.append("nothing was measured")
    report.show(found, console)
    folder = report.write(found, options.out, limit.end)
    terminal.place("report", _shown(folder / "report.md"), console)
    if options.json == STDOUT:
        sys.stdout.write(folders.dump(found))
    elif options.json:
        Path(options.json).write_text(folders.dump(found))
    if options.save_results:
        stored = folders.store(found, options.save_results)
        terminal.place("results", _shown(stored), console)
    console.print(f"took {time.monotonic() - start:.0f} s")
    if before and not compare.against(found, before, console):
        failed.append("comparison")
    for part in failed:
        terminal.paragraph(f"[bold {terminal.RED}]failed: {part}[/]", console)
    return 1 if failed else 0


def _ceilings(record: Record, console: Console) -> None:
    """What the machine reached by itself, and which products the extension takes."""
    facts = record.head["environment"]
    terminal.paragraph(ceilings.sentence(record.head["ceilings"], facts), console)
    if path := facts.get("products"):
        terminal.paragraph(f"products of the extension: {escape(path)}", console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    folders.add_options(parser)
    parser.add_argument(
        "-k",
        "--filter",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only shapes with one of these in <op>/<shape>/<dtype>, as moe_mlp or "
        "grouped_gemm/T6144",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=[],
        choices=list(presets.SPELLED),
        metavar="DTYPE",
        help="of all shapes, and further ones of the first shapes: bf16, fp16 or fp32, or as "
        "PyTorch spells them; default: fp32 bf16 on a CPU, bf16 fp32 on a GPU. On a CPU a first of "
        "16 bits adds an expert layer at 1, 16, 512 and 4096 tokens",
    )
    parser.add_argument(
        "--limit",
        type=_positive,
        metavar="SECONDS",
        help="wall-clock time of the run with its report; default: the preset's, 300 for quick",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="the results as JSON into FILE; without one to standard output, and all else to "
        "standard error",
    )
    parser.add_argument(
        "--compare",
        nargs="?",
        const=STORED,
        metavar="RUN",
        help="fail where ours became slower than in RUN; default: this machine's latest stored run",
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0 or value == math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


def _shown(path: Path) -> str:
    """From here where it is below, which fits a terminal."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def measure(groups: Sequence[Group], meter: Meter, record: Record, console: Console) -> bool:
    """Measures one group after the other; whether all of ours were right."""
    right = True
    with terminal.measuring_bar(console, lambda: meter.limit.left) as bar:
        task = bar.add_task("", total=len(groups))
        for index, group in enumerate(groups, 1):
            bar.update(task, description=group.name, refresh=True)
            outcomes = meter.group(group)
            for outcome in outcomes.values():
                record.add(outcome)
                ours = outcome.facts["kind"] == OURS
                right &= not (outcome.status == FAILED or (outcome.status == WRONG and ours))
            _show(group, outcomes, f"{index}/{len(groups)}", console)
            bar.update(task, completed=index, refresh=True)
    return right


def _show(group: Group, outcomes: Outcomes, place: str, console: Console) -> None:
    """A line a pass. What was skipped is counted at the end and listed in the report."""
    for mode in group.modes:
        shown = []
        for (label, of_mode), outcome in outcomes.items():
            if of_mode != mode:
                continue
            if outcome.status == OK and outcome.samples:
                shown.append(f"{label} {seconds(statistics.median(outcome.samples.values()))}")
            elif outcome.status in (WRONG, FAILED):
                shown.append(f"[{terminal.RED}]{label}: {outcome.status}[/]")
        if shown:
            line = f"{place} {group.name} [{terminal.CYAN}]{mode}[/]: {', '.join(shown)}"
            terminal.line(line, console)


if __name__ == "__main__":
    sys.exit(main())
