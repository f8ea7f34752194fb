"""`pytest benchmarks --benchmark-enable`: every op as pytest-benchmark measures it.

The first shape of each op, forward and step; ours beside the baselines, a group for each shape.
Choose with `-k`; `--benchmark-compare`, `--benchmark-autosave` and the like work as ever. Each row
is timed by itself: for ratios, `python -m benchmarks` measures them in turn.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import measure, presets, rows
from benchmarks.check import ProxyWorkload, Workload
from benchmarks.rows import PROXY, Row
from molex_kernels.testing import load_ops

DEVICE = presets.default_device()
PRESET = presets.PRESETS["gpu" if DEVICE.type == "cuda" else "quick"]


def _rows() -> list[Row]:
    every = rows.groups(load_ops(), PRESET, DEVICE, presets.dtypes(DEVICE))
    first = {(group.info.name, group.dtype): group for group in reversed(every) if not group.sweep}
    return [row for group in first.values() for row in rows.rows(group)]


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row.name)
def test_op(row: Row, benchmark: Any) -> None:
    benchmark.group = f"{row.group.name} {row.mode}"
    inputs, upstream = measure.make(row.group, row.mode, row.group.case)
    workload = ProxyWorkload if row.kind == PROXY else Workload
    work = workload(row.group.info, row.group.function(row.label), inputs, upstream)

    def call() -> None:
        work.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with torch.set_grad_enabled(row.mode == "step"):
        try:
            call()
        except NotImplementedError as error:
            pytest.skip(str(error))
        benchmark(call)
