"""Whether other work disturbed a run: what its report warns of."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.results import Results
from benchmarks.rows import OURS

LOADED = 0.5  # of the cores at work for something else when the run begins
WIDE = 0.15  # half of an interval of a ratio, on a logarithmic scale, in the median


def loaded(facts: dict[str, Any]) -> str:
    """What the load average says when a run begins; empty where the machine is free."""
    load, cores = facts.get("load"), facts.get("cores")
    if not load or not cores or load <= LOADED * cores:
        return ""
    return f"a load of {load:.1f} on {cores} cores when the run began"


def spread(found: Results) -> float | None:
    """The median over all ratios of ours: half of the interval, on a logarithmic scale."""
    widths = [
        math.log(high / low) / 2
        for row in found["rows"]
        if row["kind"] == OURS
        for _, low, high in row.get("versus", {}).values()
    ]
    return statistics.median(widths) if widths else None


def banner(found: Results) -> str:
    """A sentence where the load or the intervals say that the machine was busy, else nothing."""
    signs = [sign] if (sign := loaded(found["environment"])) else []
    width = spread(found)
    if width is not None and width > WIDE:
        signs.append(f"intervals of ±{100 * width:.0f}% in the median")
    if not signs:
        return ""
    return f"BUSY MACHINE: {', '.join(signs)}. Run it again when nothing else runs."
