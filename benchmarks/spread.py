"""A ratio of times with its interval, from samples that were taken in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Samples = Mapping[int, float]  # seconds per call, by the round in which they were taken

COVERAGE = 0.9


class Ratio(NamedTuple):
    """The median of paired ratios and the interval that holds it nine times in ten."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval on a logarithmic scale: 0.05 is about 5% either way."""
        return math.log(self.high / self.low) / 2


def ratio(others: Samples, ours: Samples) -> Ratio | None:
    """How many times longer `others` take: each sample of the fewer beside its nearest in time."""
    if not others or not ours:
        return None
    fewer, more = sorted((others, ours), key=len)
    rounds = sorted(more)
    pairs = ((r, min(rounds, key=lambda m, r=r: abs(m - r))) for r in fewer)
    if fewer is others:
        values = [others[r] / ours[m] for r, m in pairs]
    else:
        values = [others[m] / ours[r] for r, m in pairs]
    return Ratio(statistics.median(values), *median_interval(values))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The two order statistics between which the median lies with 90% probability.

    Nothing is assumed of the distribution. Fewer than five values do not suffice: they give their
    whole range.
    """
    ordered, count = sorted(values), len(values)
    outside, below = 0, 0.0
    for k in range(1, count // 2 + 1):
        below += math.comb(count, k - 1) / 2**count
        if 1 - 2 * below < COVERAGE:
            break
        outside = k - 1
    return ordered[outside], ordered[count - 1 - outside]
