"""Launch configurations of the layer-mixing kernels, by chip and shape class."""

from __future__ import annotations

import torch

from molex_kernels._triton.chips import KIB, Chip
from molex_kernels._triton.sizes import cdiv, next_power_of_2
from molex_kernels._triton.tuning import Config, Options, around, kept

MAX_PROGRAMS = 1024  # of mixing backwards: as many rows of partial sums
TABLE = (Config({}, 1, 1), ())  # the same few stores on every chip
VOTE_ELEMENTS = 4096
MAX_VOTERS = 64
_WITH_ADAPTERS = ((128, 128, 8), (128, 64, 8), (64, 64, 4))  # BLOCK_T, BLOCK_N, warps


_SLOTS = 264  # blocks of an H100, two to a multiprocessor
_PIECE = 512  # rows of a piece, at least
_MAX_PIECES = 32


def pieces(programs: int, tokens: int) -> int:
    """Into how many pieces of rows a gradient's programs are cut, where they would be too few."""
    return max(1, min(cdiv(_SLOTS, max(programs, 1)), tokens // _PIECE, _MAX_PIECES))


@kept
def sums(chip: Chip) -> Options:
    """For the sum of the pieces, in their order."""
    return around(Config({"BLOCK_N": 8, "BLOCK_D": 128}, 4, 2), warps=(2, 8))


@kept
def bias(chip: Chip) -> Options:
    """For the gradient of the biases."""
    return around(Config({"BLOCK_T": 32, "BLOCK_N": 64}, 4, 2), warps=(2, 8))


def _product(rows: int, columns: int, features: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_T": rows, "BLOCK_N": columns, "BLOCK_D": features}
    return Config(blocks, num_warps, num_stages)


@kept
def linear(
    chip: Chip, dtype: torch.dtype, num_tokens: int, num_columns: int, aligned: bool, rank: int
) -> Options:
    """For a branch's product; an adapter holds x A^T beside it."""
    if num_columns <= 32 and not rank:  # an adapter's own product
        columns = max(next_power_of_2(num_columns), 16)
        return around(_product(32, columns, 64 if aligned else 32, 4, 3), warps=(2, 8))
    if not aligned:
        return around(_product(32, 32, 16 if rank else 32, 4, 2), warps=(2, 8))
    if dtype == torch.float32:
        return _product(64, 64, 32, 4, 2), (_product(64, 64, 16, 4, 2),)
    if num_tokens <= 64:
        return around(_product(64, 64, 64, 4, 3), warps=(8,), stages=(2, 4))
    if rank:
        wide, narrow, small = (_product(t, n, 64, w, 3) for t, n, w in _WITH_ADAPTERS)
        # Without wgmma the operands take registers, too.
        if chip.shared < 227 * KIB:
            return (narrow, (small,)) if rank <= 16 else (small, (narrow,))
        return wide, (narrow, small)
    usual, wide = _product(128, 128, 64, 8, 3), _product(128, 256, 64, 8, 3)
    others = (_product(64, 128, 64, 4, 4), _product(128, 64, 64, 4, 4))
    if chip.shared >= 227 * KIB and num_tokens >= 1024 and num_columns % 256 == 0:
        return wide, (usual, *others)
    return usual, (wide, *others)


def rank_block(rank: int, aligned: bool) -> int:
    """Ranks that are accumulated beside the product."""
    return min(max(next_power_of_2(rank), 16), 32 if aligned else 16)


@kept
def wgrad(chip: Chip, dtype: torch.dtype, aligned: bool) -> Options:
    """For the parameters' gradient; BLOCK_T is the depth of the product here."""
    if not aligned:
        return around(_product(32, 32, 32, 4, 2), warps=(8,))
    if dtype == torch.float32:
        return around(_product(32, 64, 64, 4, 2), warps=(8,))
    usual, wide = _product(64, 128, 64, 8, 3), _product(64, 128, 128, 8, 3)
    small = _product(64, 64, 64, 4, 3)
    # Without wgmma the operands take registers, too.
    return (wide, (usual, small)) if chip.shared >= 227 * KIB else (usual, (wide, small))


@kept
def mix(chip: Chip, num_features: int, has_norm: bool, *, backward: bool) -> Options:
    """Whole rows to a program for a norm, else pieces of rows.

    8 elements to a thread; 4 backwards through a norm, which holds more of them.
    """
    if not has_norm:
        width = 512 if num_features >= 1024 else 128
        return around(Config({"BLOCK_T": 1024 // width, "BLOCK_D": width}, 4, 1), warps=(2, 8))
    width = max(next_power_of_2(num_features), 128)
    each = 32 * (4 if backward else 8)
    warps = min(max(width // each, 4), 32)
    pinned = Config({"BLOCK_T": max(each * warps // width, 1), "BLOCK_D": width}, warps, 1)
    return around(pinned, warps=(max(warps // 2, 1), min(2 * warps, 32)))


@kept
def vote(chip: Chip, num_layers: int) -> Options:
    """Programs read their tokens in long steps."""
    block_l, rows = _ballot(num_layers)
    return around(Config({"BLOCK_T": min(rows, 512), "BLOCK_L": block_l}, 8, 2), warps=(4, 16))


@kept
def voters(tokens: int, block_t: int) -> int:
    """Programs: one where a second launch would take longer than the steps that it saves."""
    steps = cdiv(tokens, block_t)
    return 1 if steps <= 2 else min(steps, MAX_VOTERS)


@kept
def winner(chip: Chip, num_layers: int) -> Options:
    """For the sum over the voters."""
    block_l, rows = _ballot(num_layers)
    sizes = {"BLOCK_P": min(rows, MAX_VOTERS), "BLOCK_L": block_l}
    return around(Config(sizes, 4, 1), warps=(1, 8))


def _ballot(num_layers: int) -> tuple[int, int]:
    """Columns and rows of a tile of scores."""
    block_l = max(next_power_of_2(num_layers), 2)
    return block_l, max(VOTE_ELEMENTS // block_l, 1)
