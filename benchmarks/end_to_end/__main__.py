"""`python -m benchmarks.end_to_end`: trains on text and images, fine-tunes, and reports.

Each part is a process of its own, `python -m benchmarks.end_to_end.<part>`. What is not done when
`--limit` seconds are over is cut off and counts as failed; the report has the parts that ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import folders, terminal
from benchmarks.end_to_end import markdown, plots

PARTS = ("images", "text", "finetune")
LIMIT = 1800.0


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    folders.add_options(parser)
    parser.add_argument("--only", choices=PARTS, help="leave the other parts out")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds; default: %(default)s")
    options = parser.parse_args()
    console = terminal.console()
    until = time.monotonic() + options.limit
    chosen = ["--preset", options.preset, *(["--device", options.device] if options.device else [])]
    found: dict[str, Any] = {"preset": options.preset, "environment": {}}
    failed = []
    for part in [options.only] if options.only else PARTS:
        outcome, status = run(part, chosen, until - time.monotonic())
        if status:
            failed.append(f"{part}: {status}")
        if outcome:
            found["environment"] = outcome.pop("environment")
            found[part] = outcome
    for line in failed:
        console.print(f"[bold red]failed: {line}[/bold red]")
    if not found["environment"]:
        console.print("nothing was trained")
        return 1
    folder = folders.for_report(found, options.out)
    (folder / "training.json").write_text(folders.dump(found))
    (folder / "training.md").write_text(markdown.report(found, plots.draw(found, folder)))
    console.print(f"report: {folder / 'training.md'}")
    if options.save_results:
        console.print(f"results: {folders.store(found, options.save_results, 'training')}")
    return 1 if failed else 0


def run(part: str, chosen: list[str], seconds: float) -> tuple[dict[str, Any] | None, str]:
    """One part: what it found, and why it failed."""
    if seconds <= 0:
        return None, "the time was over before it began"
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "found.json"
        command = [sys.executable, "-m", f"benchmarks.end_to_end.{part}", *chosen]
        command += ["--json", str(target)]
        try:
            done = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=seconds)
        except subprocess.TimeoutExpired:
            return None, "cut off when the time was over"
        found = json.loads(target.read_text()) if target.exists() else None
    return found, f"exit status {done.returncode}" if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
