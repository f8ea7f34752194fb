"""Every op of OPS: each implementation beside its baselines, forward and step.

`pytest benchmarks --benchmark-enable --preset quick`; without `--benchmark-enable` the results are
checked and nothing is timed. The group is measured at its first row, all rows side by side; each
test then hands its row's samples to pytest-benchmark.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from benchmarks.measure import FAILED, SKIPPED, WRONG, Outcome
from benchmarks.rows import OURS, Row

_readings: deque[float] = deque()


def recorded_time() -> float:
    """The timer that pytest-benchmark reads: start and end of the next sample already taken."""
    return _readings.popleft()


@pytest.mark.benchmark(timer=recorded_time)
def test_op(row: Row, measured: Callable[[Row], Outcome], request: pytest.FixtureRequest) -> None:
    outcome = measured(row)
    if outcome.status == SKIPPED:
        pytest.skip(outcome.reason)
    if outcome.status == FAILED or (outcome.status == WRONG and row.kind == OURS):
        pytest.fail(f"{row.name}: {outcome.status}: {outcome.reason}")
    if outcome.status == WRONG:
        pytest.skip(f"wrong, so not timed: {outcome.reason}")
    if not outcome.samples:
        return
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group, benchmark.name = row.group.name, row.name
    benchmark.extra_info.update(outcome.facts)
    _readings.clear()
    _readings.extend(reading for sample in outcome.samples.values() for reading in (0.0, sample))
    benchmark.pedantic(lambda: None, rounds=len(outcome.samples))
