"""The rows of a run, a line of JSON each, written as they are measured: a cut loses none before it.

The first line says where they come from.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ceilings, environment, presets
from benchmarks.measure import OK, Outcome


class Record:
    """Appends to a file, which begins with the first row."""

    def __init__(
        self,
        path: Path,
        preset: str,
        device: torch.device,
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> None:
        self._path, self._preset, self._device = path, preset, device
        self._dtypes = presets.dtypes(device) if dtypes is None else dtypes
        # Measured before anything else, which may leave the device warm, full or upset.
        self.head = self._head()
        self._begun = False

    def add(self, outcome: Outcome) -> None:
        """Writes a row; of one that ran and was not timed there is nothing to say."""
        if outcome.status == OK and not outcome.samples:
            return
        if not self._begun:
            self._begun = True
            self._path.write_text(_line(self.head))
        with self._path.open("a") as file:
            file.write(_line(_row(outcome)))

    def _head(self) -> dict[str, Any]:
        return {
            "preset": self._preset,
            "environment": environment.describe(self._device),
            "ceilings": {
                presets.dtype_name(dtype): dataclasses.asdict(ceilings.measure(self._device, dtype))
                for dtype in self._dtypes
            },
        }


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the rows have in common, and the rows. A line that was cut off is no row."""
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    head, *rows = map(json.loads, whole)
    return head, rows


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _row(outcome: Outcome) -> dict[str, Any]:
    row = {**outcome.facts, "status": outcome.status}
    if outcome.status != OK:
        return row | {"reason": outcome.reason}
    return row | times(outcome.samples)


def times(samples: Mapping[int, float]) -> dict[str, Any]:
    """What is kept of the seconds per call of a row, which has at least one."""
    taken = list(samples.values())
    quarters = statistics.quantiles(taken, n=4, method="inclusive") if taken[1:] else taken * 3
    return {
        "median_s": statistics.median(taken),
        "min_s": min(taken),
        "q1_s": quarters[0],
        "q3_s": quarters[2],
        "rounds": len(taken),
    }
