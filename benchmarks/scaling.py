"""What time and memory do as one size grows: the sweeps, and the exponents fitted to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.results import Results, Row
from benchmarks.rows import OURS

NAMES = {
    "T": "tokens",
    "E": "experts",
    "N": "sequence length",
    "n": "iterations",
    "S": "segments, the same tokens in all",
    "L": "layers to choose from",
}


FEWEST = 4  # sizes that an exponent is fitted to: through fewer, hardly anything is no line


class Exponent(NamedTuple):
    """b of y ~ size^b, its standard error, and the part of the variance that the line explains."""

    value: float
    error: float
    r_squared: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ±{self.error:.2f}"


@dataclass(frozen=True)
class Fit:
    """One implementation over one size. `time` and `memory` are None with fewer sizes than four."""

    op: str
    letter: str
    mode: str
    impl: str
    kind: str
    points: tuple[Row, ...]

    @property
    def time(self) -> Exponent | None:
        """b of time ~ size^b."""
        return exponent([(self.size(r), r["median_s"]) for r in self.points])

    @property
    def memory(self) -> Exponent | None:
        """b of peak memory ~ size^b."""
        return exponent([(self.size(r), r["peak_bytes"]) for r in self.points])

    def size(self, row: Row) -> int:
        """The size that grows."""
        return row["sizes"][self.letter]


def exponent(points: Sequence[tuple[float, float]]) -> Exponent | None:
    """The slope of a least-squares line through the logarithms; None with fewer than four sizes."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < FEWEST:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    across = sum((x - mean_x) ** 2 for x, _ in logs)
    value = sum((x - mean_x) * (y - mean_y) for x, y in logs) / across
    total = sum((y - mean_y) ** 2 for _, y in logs)
    rest = sum((y - mean_y - value * (x - mean_x)) ** 2 for x, y in logs)
    error = math.sqrt(rest / (len(logs) - 2) / across)
    # What is constant has no variance to explain.
    return Exponent(value, error, 1 - rest / total if total else 1.0)


def sweeps(found: Results) -> list[tuple[str, str]]:
    """(op, letter) of every sweep, in the order measured."""
    return list(dict.fromkeys((row["op"], row["sweep"]) for row in found["sweeps"]))


def fits(found: Results, op: str, letter: str, mode: str) -> list[Fit]:
    """Every implementation with at least two times, ours first."""
    rows = [
        r
        for r in found["sweeps"]
        if (r["op"], r["sweep"], r["mode"]) == (op, letter, mode) and "median_s" in r
    ]
    names = dict.fromkeys((r["impl"], r["kind"]) for r in rows)
    made = [
        Fit(op, letter, mode, impl, kind, tuple(_sorted(rows, impl, letter)))
        for impl, kind in names
    ]
    return sorted((fit for fit in made if len(fit.points) > 1), key=lambda f: f.kind != OURS)


def refused(found: Results, op: str, letter: str, mode: str) -> list[str]:
    """What has no time at some size, and why; each reason once."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in found["sweeps"]:
        if (row["op"], row["sweep"], row["mode"]) == (op, letter, mode) and "median_s" not in row:
            reason = row["impl"], f"{row['status']}: {row['reason']}"
            reasons.setdefault(reason, []).append(row["sizes"][letter])
    return [
        f"{impl} at {letter} = {', '.join(map(str, sizes))}: {reason}"
        for (impl, reason), sizes in reasons.items()
    ]


def _sorted(rows: list[Row], impl: str, letter: str) -> list[Row]:
    return sorted((r for r in rows if r["impl"] == impl), key=lambda r: r["sizes"][letter])
