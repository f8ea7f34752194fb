"""Launch configurations of the dispatch kernels, by chip and shape class."""

from __future__ import annotations

from dataclasses import replace

import torch

from molex_kernels._triton.chips import KIB, Chip
from molex_kernels._triton.tuning import Config, Options, around, kept

GROUP = 8  # row tiles that share their columns' weights in the L2 cache


def _gemm(rows: int, columns: int, features: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_T": rows, "BLOCK_N": columns, "BLOCK_D": features}
    return Config(blocks, num_warps, num_stages)


# Rows per expert decide the tile: few are bound by streaming the weights, many by the products.
_HALF = {
    "few": _gemm(16, 128, 64, 4, 4),
    "some": _gemm(64, 128, 64, 4, 4),
    "many": _gemm(128, 128, 64, 8, 3),
}
_HALF_GATED = {
    "few": _gemm(16, 64, 64, 4, 4),
    "some": _gemm(64, 64, 64, 4, 4),
    "many": _gemm(128, 64, 64, 8, 3),
}
# Where a block has 64 KiB of shared memory, as on gfx942.
_SMALL_HALF = {**_HALF, "some": _gemm(64, 128, 64, 4, 3)}
_SMALL_HALF_GATED = {**_HALF_GATED, "some": _gemm(64, 64, 64, 4, 3)}
_SINGLE = {
    "few": _gemm(16, 64, 32, 4, 2),
    "some": _gemm(64, 64, 32, 4, 2),
    "many": _gemm(64, 64, 32, 4, 2),
}
_SINGLE_GATED = {
    "few": _gemm(16, 32, 32, 4, 2),
    "some": _gemm(64, 32, 32, 4, 2),
    "many": _gemm(64, 32, 32, 4, 2),
}
_SINGLE_HIDDEN = {
    "few": _gemm(16, 32, 32, 4, 2),
    "some": _gemm(32, 32, 32, 4, 2),
    "many": _gemm(32, 32, 32, 4, 2),
}
# The product that goes back through the activation holds H beside it, a slice at a time.
_HALF_HIDDEN = {
    "few": (_HALF_GATED["few"], 1),
    "some": (_HALF_GATED["some"], 4),
    "many": (replace(_HALF["many"], max_registers=128), 8),
}
# Rows that start anywhere move element by element, with an address in registers for each.
_UNALIGNED = {
    "few": _gemm(16, 32, 32, 4, 2),
    "some": _gemm(32, 32, 32, 4, 2),
    "many": _gemm(32, 32, 32, 4, 2),
}
_HALF_CANDIDATES = (
    _gemm(32, 128, 64, 4, 4),
    _gemm(64, 128, 64, 4, 4),
    _gemm(64, 256, 64, 8, 3),
    _gemm(128, 128, 64, 8, 3),
    _gemm(128, 256, 64, 8, 3),
)
# Two products, or a product and H, fill the registers sooner.
_HALF_GATED_CANDIDATES = (
    _gemm(32, 64, 64, 4, 4),
    _gemm(64, 64, 64, 4, 3),
    _gemm(64, 64, 64, 8, 4),
    _gemm(64, 128, 64, 8, 3),
    _gemm(128, 64, 64, 8, 3),
)
_SINGLE_CANDIDATES = (_gemm(32, 64, 32, 4, 2), _gemm(64, 64, 16, 4, 2), _gemm(64, 32, 32, 4, 2))


FEW = 32  # rows of an expert


def rows_class(num_rows: int, num_experts: int) -> str:
    """How many rows an expert has on average; more is not known without waiting for the device."""
    average = num_rows / num_experts
    return "few" if average <= FEW else "some" if average <= 96 else "many"


@kept
def gemm(
    chip: Chip, dtype: torch.dtype, rows: str, aligned: bool, *, gated: bool = False
) -> Options:
    """For a product of each expert's rows with its weight."""
    if not aligned:
        return around(_UNALIGNED[rows], warps=(2, 8))
    if dtype == torch.float32:
        return (_SINGLE_GATED if gated else _SINGLE)[rows], _SINGLE_CANDIDATES
    is_small = chip.shared <= 64 * KIB
    if gated:
        return (_SMALL_HALF_GATED if is_small else _HALF_GATED)[rows], _HALF_GATED_CANDIDATES
    return (_SMALL_HALF if is_small else _HALF)[rows], _HALF_CANDIDATES


@kept
def hidden(chip: Chip, dtype: torch.dtype, rows: str, aligned: bool) -> Options:
    """For the product that goes back through the activation, in SLICES of its columns."""
    if not aligned:
        return around(_sliced(_UNALIGNED[rows], 1), warps=(2, 8))
    if dtype == torch.float32:
        return _sliced(_SINGLE_HIDDEN[rows], 1), tuple(_sliced(c, 1) for c in _SINGLE_CANDIDATES)
    candidates = tuple(_sliced(c, 2) for c in _HALF_GATED_CANDIDATES)
    if chip.shared <= 99 * KIB:
        return _sliced(_HALF_GATED[rows], 2), candidates
    return _sliced(*_HALF_HIDDEN[rows]), candidates


def _sliced(product: Config, slices: int) -> Config:
    return replace(product, blocks={**product.blocks, "SLICES": slices})


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
    if average <= FEW:
        return _gemm(32, 128, 128, 8, 3), (_gemm(16, 128, 128, 8, 3),)
    usual, wide = _gemm(64, 128, 128, 8, 3), _gemm(64, 128, 256, 8, 3)
    # A wide tile reads less, and holds a multiprocessor alone: it needs rows enough to be worth it.
    if average >= 1024 and num_features >= 512 and chip.shared > 99 * KIB:
        return wide, (usual, _gemm(32, 128, 128, 8, 4))
    return usual, (wide, _gemm(32, 128, 128, 8, 4))


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
