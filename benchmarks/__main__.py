"""`python -m benchmarks`: the ops, the training runs on text and images, the fine-tune, the report.

Returns non-zero if a result of ours was wrong or anything failed; the report is written in any
case. A run that is told to end (SIGTERM) reports what it has measured by then.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks import compare, environment, presets, report, results, terminal

STORED = "stored"
PARTS = ("ops", "text", "images", "finetune")


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, help="report folder; default: benchmarks/reports/...")
    parser.add_argument(
        "--save-results",
        nargs="?",
        type=Path,
        const=report.SAVED,
        metavar="FOLDER",
        help="keep a JSON in FOLDER/<machine>/; default: benchmarks/results",
    )
    parser.add_argument("--only", choices=PARTS, help="leave the other parts out")
    parser.add_argument("-k", dest="select", help="which rows, as pytest's -k")
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
        before = compare.stored(facts) if options.compare == STORED else Path(options.compare)
        if before is None or not before.exists():
            console.print(f"no stored run of {environment.machine_slug(facts)} to compare with")
            return 2
    console.print(
        f"molex_kernels benchmarks, preset {preset.name}: {facts['chip']}, {facts['cores']} cores, "
        f"torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}"
    )
    start = time.monotonic()
    chosen = ["--preset", preset.name, "--device", device.type]
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        files = _files(options.out or Path(scratch))
        try:
            signal.signal(signal.SIGTERM, _end)
            if options.only in (None, "ops") and _ops(chosen, files["ops"], options.select):
                failed.append("ops")
            for part in PARTS[1:]:
                if options.only in (None, part) and _trained(part, chosen, files[part]):
                    failed.append(part)
        except _Ended:
            failed.append("what was still to come: the run was told to end")
        found = results.collect(*files.values())
    if not found["environment"]:
        console.print("nothing was measured")
        return 1
    report.show(found, console)
    console.print(f"report: {report.write(found, options.out) / 'report.md'}")
    if options.save_results:
        console.print(f"results: {report.save_results(found, options.save_results)}")
    console.print(f"took {time.monotonic() - start:.0f} s")
    if before and not compare.against(found, before, console):
        failed.append("comparison")
    for part in failed:
        console.print(f"[bold red]failed: {part}[/bold red] (see above)")
    return 1 if failed else 0


class _Ended(Exception):
    """SIGTERM came."""


def _end(*_: object) -> NoReturn:
    # `timeout` tells the process and then its group, and the report is still to be written.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Ended


def _files(folder: Path) -> dict[str, Path]:
    """Where each part writes, with nothing there from an earlier run."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    files = {part: folder / f"{part}.json" for part in PARTS[1:]}
    files = {"ops": folder / "ops.jsonl", **files}
    for file in files.values():
        file.unlink(missing_ok=True)
    return files


def _ops(chosen: list[str], target: Path, select: str | None) -> int:
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", str(folder), *chosen, "--progress", "-q", "-s"]
    command += [
        "--no-header",
        "--tb=short",
        "--show-capture=no",
        "-o",
        "console_output_style=classic",
        "-r",
        "fE",
    ]
    command += ["--benchmark-enable", "--benchmark-quiet", f"--rows={target}"]
    command += ["-k", select] if select else []
    return subprocess.run(command, cwd=folder.parent).returncode


def _trained(part: str, chosen: list[str], target: Path) -> int:
    command = [sys.executable, "-m", f"benchmarks.end_to_end.{part}", *chosen]
    command += ["--json", str(target)]
    return subprocess.run(command, cwd=Path(__file__).parents[1]).returncode


if __name__ == "__main__":
    sys.exit(main())
