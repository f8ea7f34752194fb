"""The command line of one part of the training runs, which is a process of its own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, presets, terminal
from benchmarks.end_to_end.verdict import verdict
from benchmarks.measure import FAILED, WRONG

Run = Callable[[Any, torch.device, Any], dict[str, Any]]


def main(part: str, run: Run, missing: str = "") -> int:
    """Runs it, or says what is missing; not 0 if a step of ours was wrong or failed."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.end_to_end.{part}")
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="quick")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else presets.default_device()
    console = terminal.console()
    if missing:
        console.print(f"{part}: left out, {missing}", markup=False)
        return 0
    found = run(getattr(presets.PRESETS[options.preset], part), device, console)
    for line in verdict(found):
        console.print(line, markup=False)
    if options.json:
        found["environment"] = environment.describe(device)
        options.json.write_text(json.dumps(found))
    return int(any(entry["status"] in (FAILED, WRONG) for entry in found.get("step_times", ())))
