"""How a figure is read off a run: the values of the fastest of our implementations, by shape."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks import results, scaling
from benchmarks.results import Results, Row

# One figure per shape, None where the shape has a row and no time.
Figures = list[tuple[str, float | None]]
Read = Callable[[Results, str], Figures]


def _groups(found: Results, op: str, mode: str, patterns: tuple[str, ...]) -> Iterator[list[Row]]:
    for shape in results.shapes(found, op, mode):
        if any(fnmatch.fnmatchcase(shape.split("/")[0], p) for p in patterns):
            yield results.members(found, op, mode, shape)


@dataclass(frozen=True)
class Reading:
    """The figure of the fastest of our implementations at each of the shapes."""

    op: str
    patterns: tuple[str, ...]
    figure: Callable[[Row], float | None]

    def __call__(self, found: Results, mode: str) -> Figures:
        best = self.rows(found, mode)
        return [(shape, self.figure(ours) if ours else None) for shape, ours in best.items()]

    def rows(self, found: Results, mode: str) -> dict[str, Row | None]:
        """The row of that implementation by shape."""
        groups = _groups(found, self.op, mode, self.patterns)
        return {group[0]["shape"]: results.best(group) for group in groups}


def speedup(op: str, against: str, *patterns: str) -> Reading:
    """Times as fast as a baseline, or the share of a yardstick's speed."""
    return Reading(op, patterns, lambda row: (g := results.speedup(row, against)) and g.median)


def slowdown(op: str, against: str, *patterns: str) -> Read:
    """Times as long as a yardstick takes."""
    return Reading(op, patterns, lambda row: (g := results.speedup(row, against)) and 1 / g.median)


def share(op: str, *patterns: str) -> Read:
    """Share of the copy bandwidth, whichever ceiling binds."""

    def of_copy(found: Results, mode: str) -> Figures:
        copy = {dtype: c["copy"] * 1e-9 for dtype, c in found["ceilings"].items()}
        return Reading(op, patterns, lambda row: row["gb_per_s"] / copy[row["dtype"]])(found, mode)

    return of_copy


def fact(op: str, name: str, *patterns: str) -> Read:
    """A figure that the row carries."""
    return Reading(op, patterns, lambda row: row.get(name))


def per(op: str, name: str, unit: Callable[[Row], int], *patterns: str) -> Read:
    """A number of bytes, as a multiple of what the shape implies."""
    return Reading(op, patterns, lambda row: row[name] / unit(row) if name in row else None)


def together(parts: tuple[str, ...], patterns: tuple[str, ...], figure: str) -> Read:
    """Several ops in sequence: the sum of a fact, or for a baseline's name the ratio of times."""

    def read(found: Results, mode: str) -> Figures:
        groups = [
            next(_groups(found, op, mode, (pattern,)), [])
            for op, pattern in zip(parts, patterns, strict=True)
        ]
        ours = [best for group in groups if (best := results.best(group))]
        name = " and ".join(parts)
        if len(ours) < len(parts):
            return [(name, None)]
        if all(figure in row for row in ours):
            return [(name, float(sum(row[figure] for row in ours)))]
        gains = [results.speedup(row, figure) for row in ours]
        if not all(gains):
            return [(name, None)]
        theirs = sum(r["median_s"] * g.median for r, g in zip(ours, gains, strict=True) if g)
        return [(name, theirs / sum(row["median_s"] for row in ours))]

    return read


def against_op(op: str, other: str, pattern: str, others: str) -> Read:
    """Times as long as another op takes."""

    def read(found: Results, mode: str) -> Figures:
        pair = [
            next(_groups(found, name, mode, (p,)), [])
            for name, p in ((op, pattern), (other, others))
        ]
        mine, theirs = (results.best(group) for group in pair)
        value = mine["median_s"] / theirs["median_s"] if mine and theirs else None
        return [(pair[0][0]["shape"] if pair[0] else pattern, value)]

    return read


def growth(op: str, letter: str, of: str) -> Read:
    """The fitted exponent of our time or memory over one size."""

    def read(found: Results, mode: str) -> Figures:
        fits = scaling.fits(found, op, letter, mode)
        return [(f"over {letter}", getattr(fits[0], of) if fits else None)]

    return read


def two_blocks(found: Results, mode: str) -> Figures:
    """A fine-tuning step with both blocks at once against one after the other."""
    run = found["finetune"]
    if mode != "step" or not run:
        return [("fine-tune", None)]
    size = f"{run['plan']['batch']}x{run['plan']['length']} tokens"
    return [(size, run["sequence"]["in_sequence_s"] / run["sequence"]["together_s"])]


def nowhere(found: Results, mode: str) -> Figures:
    """Of what has no function of its own to be timed."""
    return [("", None)]


def _width(row: Row) -> int:
    return {"fp32": 4, "fp64": 8}.get(row["dtype"], 2)


def attention_output(row: Row) -> int:
    """Bytes of an attention's output."""
    return math.prod(row["sizes"][name] for name in "BHNd") * _width(row)


def pre_activation(row: Row) -> int:
    """Bytes of the pre-activations of SwiGLU experts."""
    return 2 * math.prod(row["sizes"][name] for name in "TKI") * _width(row)
