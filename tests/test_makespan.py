"""The computed schedule of the grouped products: its tiles are the launches', its bounds hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import makespan
from molex_kernels._triton import chips
from molex_kernels.ops.dispatch.kernels import config, starts

# A few hundred rows: one expert has most, one none.
COUNTS = [300, 1, 0, 64, 65, 90]
DIM, HIDDEN = 512, 256


def test_a_schedule_by_hand():
    assert makespan.makespan([3, 1, 1, 4, 2], 2) == 6
    assert makespan.makespan([0, 5], 1) == makespan.EMPTY + 5
    assert makespan.ideal([3, 1, 1, 4, 2], 2) == 5.5


@pytest.mark.parametrize("chunk", [0, 32, 64])
def test_pieces_cover_every_row_once(chunk):
    found = makespan.pieces(COUNTS, chunk)
    assert sum(rows or 0 for rows in found) == sum(COUNTS)
    assert max(rows or 0 for rows in found) <= (2 * chunk or 300)


@pytest.mark.parametrize("chunk", [0, 32])
def test_no_schedule_is_better_than_ideal_or_worse_than_a_list(chunk, monkeypatch):
    """Giving each tile to the first free slot is at most the longest tile from ideal."""
    monkeypatch.setattr(config, "chunk", lambda *sizes: chunk)
    for product in makespan.products(COUNTS, DIM, HIDDEN):
        empty = product.costs.count(0) * makespan.EMPTY
        work = makespan.ideal(product.costs, product.slots)
        got = makespan.makespan(product.costs, product.slots)
        assert max(math.ceil(work), max(product.costs)) <= got
        assert got <= work + empty / product.slots + max(product.costs)


@pytest.mark.parametrize("chunk", [0, 32])
def test_programs_are_those_that_are_launched(chunk, monkeypatch):
    monkeypatch.setattr(config, "chunk", lambda *sizes: chunk)
    monkeypatch.setattr(chips, "of", lambda device: makespan.CHIP)
    grids = []

    def watch(kernel, grid, arguments, constants, options):
        del arguments, constants
        if kernel.__name__ != "_dispatch_bwd_pieces":
            grids.append(math.prod(grid(options[0].blocks)))

    monkeypatch.setattr(starts, "launch", watch)

    def meta(*sizes):
        return torch.empty(sizes, dtype=torch.bfloat16, device="meta")

    num_rows, num_experts = sum(COUNTS), len(COUNTS)
    rows = starts.Rows(torch.empty(num_experts, dtype=torch.int32, device="meta"), num_rows)
    w_up, w_down = meta(num_experts, 2 * HIDDEN, DIM), meta(num_experts, DIM, HIDDEN)
    x, acted, before = meta(num_rows, DIM), meta(num_rows, HIDDEN), meta(num_rows, 2 * HIDDEN)
    starts.gemm(x, w_up, None, acted, rows, layout="concat")
    starts.gemm(acted, w_down, None, x, rows)
    starts.hidden(
        x, w_down, before, meta(num_rows, 1), before, acted, rows, "silu", "concat", (), False
    )
    starts.wgrad(before, x, w_up, rows)
    starts.wgrad(x, acted, w_down, rows)
    products = list(makespan.products(COUNTS, DIM, HIDDEN))
    assert [len(product.costs) for product in products] == grids


def test_skewed_routing_is_within_the_goal_and_as_the_docs_have_it(capsys):
    makespan.main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) > 2
    assert max(float(row.split("|")[-2]) for row in rows[2:]) <= 1.05
    docs = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    assert "\n".join(rows) in docs
