"""Launch configurations of the dispatch kernels, by chip and shape class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from molex_kernels._triton.chips import KIB, Chip
from molex_kernels._triton.sizes import cdiv
from molex_kernels._triton.tuning import Config, Options, around, kept

GROUP = 8  # row tiles that share their columns' weights in the L2 cache


def _gemm(rows: int, columns: int, features: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_T": rows, "BLOCK_N": columns, "BLOCK_D": features}
    return Config(blocks, num_warps, num_stages)


def _sliced(product: Config, slices: int) -> Config:
    return replace(product, blocks={**product.blocks, "SLICES": slices})


# Rows of an expert decide the tile's: few are bound by streaming the weights, many by the products.
_HALF = {
    16: _gemm(16, 128, 128, 4, 3),
    32: _gemm(32, 128, 128, 4, 3),
    64: _gemm(64, 128, 64, 4, 4),
    128: _gemm(128, 128, 64, 8, 3),
}
# Reads a fourth less for each product than 128 columns, and holds a multiprocessor alone.
_WIDE = _sliced(_gemm(128, 256, 64, 8, 4), 4)
# Where a block has 64 KiB of shared memory, as on gfx942.
_SMALL_HALF = {
    16: _gemm(16, 128, 64, 4, 3),
    32: _gemm(32, 128, 64, 4, 3),
    64: _gemm(64, 128, 64, 4, 3),
    128: _gemm(128, 128, 64, 8, 3),
}
_SINGLE = {rows: _gemm(min(rows, 64), 64, 32, 4, 2) for rows in _HALF}
# The product that goes back through the activation holds H beside it, a slice at a time.
_HALF_HIDDEN = {
    16: (_gemm(16, 64, 64, 4, 4), 1),
    32: (_gemm(32, 64, 64, 4, 4), 2),
    64: (_gemm(64, 64, 64, 4, 4), 4),
    128: (replace(_HALF[128], max_registers=128), 8),
}
_SMALL_HALF_HIDDEN = {
    **{rows: (_gemm(rows, 64, 64, 4, 3), 2) for rows in (16, 32, 64)},
    128: (_gemm(128, 64, 64, 8, 3), 2),
}
# Rows that start anywhere move element by element, with an address in registers for each.
_UNALIGNED = {rows: _gemm(min(rows, 32), 32, 32, 4, 2) for rows in _HALF}
# With H beside them, four warps would have registers for half as many warps in all.
_SMALL_HIDDEN = {rows: _gemm(min(rows, 32), 32, 32, 8, 2) for rows in _HALF}
_SINGLE_HIDDEN = {rows: _gemm(min(rows, 64), 32, 32, 4, 2) for rows in _HALF}
_HALF_CANDIDATES = (
    _gemm(32, 128, 64, 4, 4),
    _gemm(64, 128, 64, 4, 4),
    _gemm(64, 256, 64, 8, 3),
    _gemm(128, 128, 64, 8, 3),
)
_HALF_HIDDEN_CANDIDATES = (
    _gemm(32, 64, 64, 4, 4),
    _gemm(64, 64, 64, 4, 3),
    _gemm(64, 64, 64, 8, 4),
    _gemm(64, 128, 64, 8, 3),
    _gemm(128, 64, 64, 8, 3),
)
_SINGLE_CANDIDATES = (_gemm(32, 64, 32, 4, 2), _gemm(64, 64, 16, 4, 2), _gemm(64, 32, 32, 4, 2))


def rows_class(num_rows: int, num_experts: int) -> int:
    """Rows of a tile: about twice an expert's average, which is all that is known on the host."""
    average = num_rows / num_experts
    return 16 if average <= 8 else 32 if average <= 16 else 64 if average <= 64 else 128


@kept
def gemm(
    chip: Chip,
    dtype: torch.dtype,
    rows: int,
    num_columns: int,
    aligned: bool,
    *,
    may_be_wide: bool = True,
) -> Options:
    """For a product of each expert's rows with its weight, of num_columns rows."""
    if not aligned:
        return around(_sliced(_UNALIGNED[rows], 1), warps=(2, 8))
    if dtype == torch.float32:
        return _sliced(_SINGLE[rows], 1), tuple(_sliced(c, 1) for c in _SINGLE_CANDIDATES)
    candidates = (*(_sliced(c, 1) for c in _HALF_CANDIDATES), _WIDE)
    if chip.shared <= 64 * KIB:
        return _sliced(_SMALL_HALF[rows], 1), candidates
    is_wide = may_be_wide and chip.shared >= 227 * KIB and _fills(num_columns, 256)
    if rows == 128 and is_wide:
        return _WIDE, candidates
    return _sliced(_HALF[rows], 4 if rows == 128 else 1), candidates


def takes_blocks(chip: Chip, dtype: torch.dtype, blocks: Mapping[str, int]) -> bool:
    """Whether weights come by a descriptor: for few rows, making one would cost more time."""
    return chip.copies_blocks and dtype.itemsize == 2 and blocks["BLOCK_T"] >= 128


def _fills(num_columns: int, block: int) -> bool:
    """Whether at least 4/5 of the columns of wide tiles exist; more would be lost than won."""
    return 5 * num_columns >= 4 * block * cdiv(num_columns, block)


@kept
def hidden(chip: Chip, dtype: torch.dtype, rows: int, aligned: bool) -> Options:
    """For the product that goes back through the activation, in SLICES of its columns."""
    if not aligned:
        return around(_sliced(_SMALL_HIDDEN[rows], 1), warps=(2, 4))
    if dtype == torch.float32:
        return _sliced(_SINGLE_HIDDEN[rows], 1), tuple(_sliced(c, 1) for c in _SINGLE_CANDIDATES)
    candidates = tuple(_sliced(c, 2) for c in _HALF_HIDDEN_CANDIDATES)
    table = _SMALL_HALF_HIDDEN if chip.shared <= 99 * KIB else _HALF_HIDDEN
    return _sliced(*table[rows]), candidates


@kept
def wgrad(
    chip: Chip, dtype: torch.dtype, average: int, num_features: int, aligned: bool
) -> Options:
    """For the weights' gradient; BLOCK_T is the depth of the product here.

    average: rows of an expert.
    """
    if not aligned:
        return around(_gemm(32, 64, 64, 8, 2), warps=(4,))
    if dtype == torch.float32:
        return _gemm(32, 64, 64, 4, 2), (_gemm(16, 64, 64, 4, 2), _gemm(32, 64, 32, 4, 2))
    if average <= 32:
        return _gemm(32, 128, 128, 8, 3), (_gemm(16, 128, 128, 8, 3),)
    usual, wide = _gemm(64, 128, 128, 8, 3), _gemm(64, 128, 256, 8, 3)
    # A wide tile reads less, and holds a multiprocessor alone: it needs rows enough to be worth it.
    if average >= 1024 and num_features >= 512 and chip.shared > 99 * KIB:
        return wide, (usual, _gemm(32, 128, 128, 8, 4))
    return usual, (wide, _gemm(32, 128, 128, 8, 4))


_CHUNK = 2048  # rows of a piece, at least
_SLOTS = 264  # blocks of an H100, two to a multiprocessor
_MOST_PARTIAL = 256 * 1024 * KIB  # bytes of partial sums


@kept
def chunk(num_rows: int, num_experts: int, num_columns: int, num_features: int) -> int:
    """Rows between the cuts of long experts in the weights' gradient; 0: none is cut.

    One long expert is a tail where its tiles fill no chip. Its pieces are a part of what each
    multiprocessor has to do, and longer than an expert's average, so that even loads stay whole.
    """
    tiles = cdiv(num_columns, 128) * cdiv(num_features, 128)
    if tiles >= _SLOTS or num_rows < 16 * _CHUNK:  # the launch that adds them up would cost more
        return 0
    share = num_rows * tiles // _SLOTS
    average = cdiv(num_rows, num_experts)
    rows = max(_CHUNK, cdiv(min(share // 2, 5 * average // 4), 128) * 128)
    partial = num_rows // rows * num_columns * num_features * 4
    return rows if partial <= _MOST_PARTIAL else 0


@kept
def pieces(chip: Chip) -> Options:
    """For the sums of partial gradients."""
    return around(Config({"BLOCK_N": 16, "BLOCK_D": 128}, 4, 2), warps=(2, 8))


@kept
def combine(chip: Chip, num_features: int) -> Options:
    """About 8 elements to a thread; wide rows are read in long runs."""
    is_wide = num_features >= 1024
    blocks = {"BLOCK_T": 2 if is_wide else 8, "BLOCK_D": 512 if is_wide else 128}
    return around(Config(blocks, 4, 2), warps=(2, 8))


@kept
def bias(chip: Chip) -> Options:
    """For the sums of rows; BLOCK_T of them at a time."""
    return around(Config({"BLOCK_T": 16, "BLOCK_N": 32}, 4, 2), warps=(2, 8))


@kept
def weight(chip: Chip) -> Options:
    """For the gradient of the experts' weights."""
    return around(Config({"BLOCK_T": 16, "BLOCK_D": 128}, 4, 2), warps=(2, 8))
