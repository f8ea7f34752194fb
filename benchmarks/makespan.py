"""How evenly the tiles of the grouped products fill a chip: computed, without a GPU.

    python -m benchmarks.makespan

Takes the tiles that the launches of `moe_mlp` would have on an H100 for each benchmark with Zipf
routing, in the order of their programs, and gives each to the slot that is free first, as the chip
does. A slot is one of the blocks that a multiprocessor holds at once. A tile costs the steps of its
main loop and PROLOGUE more; a program without a tile costs one. `makespan` is when the last slot is
done, `ideal` the work of all tiles over the slots. Padding inside of a tile counts as work.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.formats import cells
from molex_kernels._triton.chips import CHIPS
from molex_kernels._triton.sizes import cdiv
from molex_kernels.ops.dispatch.kernels import config
from molex_kernels.testing import Case, load_ops
from molex_kernels.testing.cases.dispatch import expert_index
from molex_kernels.testing.opinfo import Draw

CHIP = CHIPS["sm_90"]
MULTIPROCESSORS = 132
PROLOGUE = 4  # what a program does before and after its loop, in the loop's steps
EMPTY = 1  # what a program costs that finds no tile
DTYPE = torch.bfloat16
Costs = list[int]


class Product(NamedTuple):
    """One launch: the cost of each program in order, 0 where it finds no tile, and the slots."""

    name: str
    costs: Costs
    slots: int


def makespan(costs: Iterable[int], slots: int) -> int:
    """When the last of the slots is done, each cost going to the one that is free first."""
    free = [0] * slots
    for cost in costs:
        heapq.heapreplace(free, free[0] + (cost or EMPTY))
    return max(free)


def ideal(costs: Iterable[int], slots: int) -> float:
    """The same if tiles could be cut at will."""
    return sum(costs) / slots


def products(counts: Sequence[int], dim: int, hidden: int) -> Iterator[Product]:
    """The five products of a SwiGLU layer in bf16, whose experts have `counts` rows."""
    by_rows = config.rows_class(sum(counts), len(counts))

    def gemm(columns: int) -> config.Config:
        return config.gemm(CHIP, DTYPE, by_rows, columns, True)[0]

    through = config.hidden(CHIP, DTYPE, by_rows, True)[0]
    yield _rows_product("up", counts, 2 * hidden, dim, gemm(2 * hidden))
    yield _rows_product("down", counts, dim, hidden, gemm(dim))
    yield _rows_product("hidden", counts, hidden, dim, through)
    yield _weights_product("dW_up", counts, 2 * hidden, dim)
    yield _weights_product("dW_down", counts, dim, hidden)


def _rows_product(
    name: str, counts: Sequence[int], columns: int, features: int, tile: config.Config
) -> Product:
    """A group of row tiles goes through all columns, so that the tiles there are come first."""
    blocks = tile.blocks
    of_columns = cdiv(columns, blocks["BLOCK_N"])
    there = sum(cdiv(count, blocks["BLOCK_T"]) for count in counts) * of_columns
    programs = (cdiv(sum(counts), blocks["BLOCK_T"]) + len(counts)) * of_columns
    cost = cdiv(features, blocks["BLOCK_D"]) + PROLOGUE
    slots = _slots(blocks["BLOCK_T"], blocks["BLOCK_N"])
    return Product(name, [cost] * there + [0] * (programs - there), slots)


def _weights_product(name: str, counts: Sequence[int], columns: int, features: int) -> Product:
    num_rows, num_experts = sum(counts), len(counts)
    average = cdiv(num_rows, num_experts)
    blocks = config.wgrad(CHIP, DTYPE, average, features, True)[0].blocks
    chunk = config.chunk(num_rows, num_experts, columns, features)
    tiles = cdiv(columns, blocks["BLOCK_N"]) * cdiv(features, blocks["BLOCK_D"])
    costs = [
        0 if rows is None else cdiv(rows, blocks["BLOCK_T"]) + PROLOGUE
        for rows in pieces(counts, chunk)
        for _ in range(tiles)
    ]
    return Product(name, costs, _slots(blocks["BLOCK_N"], blocks["BLOCK_D"]))


def pieces(counts: Sequence[int], chunk: int) -> list[int | None]:
    """Rows of each piece of the weights' gradient in the programs' order; None: there is none."""
    if not chunk:
        return list(counts)
    num_rows = sum(counts)
    behind: list[int | None] = [None] * ((num_rows - 1) // chunk)
    heads: list[int | None] = []
    for start, end in itertools.pairwise([0, *itertools.accumulate(counts)]):
        first_cut = start // chunk + 1
        heads.append(min(end, (first_cut + 1) * chunk) - start)
        for cut in range(first_cut + 1, cdiv(end, chunk)):
            behind[cut - 1] = min(end, (cut + 1) * chunk) - cut * chunk
    return behind + heads


def _slots(rows: int, columns: int) -> int:
    """A sum of 128 x 256 takes most of a multiprocessor's registers; of smaller ones two fit."""
    return MULTIPROCESSORS * (1 if rows * columns >= 128 * 256 else 2)


def counts_of(case: Case) -> list[int]:
    """Rows of each expert, as the benchmark draws them."""
    draw = Draw(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    index = expert_index(case, draw).flatten()
    return torch.bincount(index, minlength=case.sizes["E"]).tolist()


def cases() -> list[Case]:
    """The benchmarks of `moe_mlp` with Zipf routing."""
    every = load_ops()["moe_mlp"].benchmarks
    return [case for case in every if case.options.get("routing") == "zipf"]


def main() -> None:
    """Prints the table."""
    print(cells(["layer", "product", "tiles", "slots", "makespan / ideal"]))
    print("|---|---|---|---|---|")
    for case in cases():
        for p in products(counts_of(case), case.sizes["D"], case.sizes["I"]):
            there = sum(cost > 0 for cost in p.costs)
            ratio = makespan(p.costs, p.slots) / ideal(p.costs, p.slots)
            print(cells([f"`{case.id}`", p.name, str(there), str(p.slots), f"{ratio:.2f}"]))


if __name__ == "__main__":
    main()
