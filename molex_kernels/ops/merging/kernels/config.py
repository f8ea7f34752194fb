"""Launch configurations of the merging kernels, by chip and shape class."""

from __future__ import annotations

import torch

from molex_kernels._dtypes import HALF_DTYPES
from molex_kernels._triton.chips import KIB, Chip
from molex_kernels._triton.sizes import cdiv
from molex_kernels._triton.tuning import Config, Options, around, kept

MAX_UNROLLED = 8  # experts up to which a tile's merge is one straight run, its loads in flight
MIN_PROGRAMS = 132  # segments go in pairs where that leaves a program for each SM of a large GPU
# Bytes of merged weights, or of segments' fp32 gradients, at a time: an H100's L2 cache has 50 MB.
PIECE = 48 * 1024 * KIB
MAX_BLOCK_E = 8
MAX_BLOCK_S = 8
PARTS = 32  # of the sum behind a factor's gradient: with the experts, enough programs for a GPU


@kept
def mask(chip: Chip) -> Options:
    """For what goes element by element."""
    return around(Config({"BLOCK_O": 4, "BLOCK_D": 128}, 4, 2), warps=(2, 8))


def is_merged_first(dtype: torch.dtype, num_tokens: int, aligned: bool) -> bool:
    """Whether segments' weights are merged before the product, and their gradients kept.

    Inside the product every tile of BLOCK_T tokens merges anew. For few tokens that costs less than
    more launches, and in fp32 the products bind.
    """
    return aligned and dtype in HALF_DTYPES and num_tokens > 64


def has_wide_tiles(chip: Chip, num_segments: int, num_tokens: int, num_columns: int) -> bool:
    """Whether tiles of 128 by 256 give every multiprocessor one; narrow ones are twice as many."""
    tiles = num_segments * cdiv(num_tokens, 128) * cdiv(num_columns, 256)
    return tiles >= chip.multiprocessors


@kept
def slices(
    num_segments: int, num_columns: int, num_features: int, *, gradient: bool
) -> tuple[int, int, int]:
    """(segments, columns, features) of a piece of [S, N, D] in 16 bits; of the gradient in fp32.

    Whole tiles of the products, of 256 by 128: first columns are cut, then features, which a
    product sums over and only its gradient may cut, then segments. One tile is the least.
    """
    room = PIECE // (4 if gradient else 2)
    columns = _piece(num_columns, room // (num_segments * num_features), 256)
    features = num_features
    if gradient:
        features = _piece(num_features, room // (num_segments * columns), 128)
    segments = _piece(num_segments, room // (columns * features), 1)
    return segments, columns, features


def _piece(size: int, most: int, step: int) -> int:
    """Equal pieces in multiples of `step`, the largest that are at most `most` or one step."""
    pieces = cdiv(size, max(most // step, 1) * step)
    return min(cdiv(cdiv(size, pieces), step) * step, size)


@kept
def merge(chip: Chip) -> Options:
    """For merged weights; a tile of all BLOCK_S segments is held in registers."""
    return around(Config({"BLOCK_N": 4, "BLOCK_D": 128}, 4, 2), warps=(2, 8))


@kept
def segments(chip: Chip) -> Options:
    """For the sums of segments' gradients; as many deltas and sums as experts are in registers."""
    return around(Config({"BLOCK_N": 4, "BLOCK_D": 128}, 4, 2), warps=(8,))


def _linear(tokens: int, columns: int, features: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_T": tokens, "BLOCK_N": columns, "BLOCK_D": features}
    return Config(blocks, num_warps, num_stages)


def is_paired(
    dtype: torch.dtype, num_segments: int, num_tokens: int, num_columns: int, aligned: bool
) -> bool:
    """Whether a program serves two segments: it halves what is read, and the programs.

    In fp32 the products bind, and unaligned loads have no registers left for it.
    """
    if not aligned or dtype == torch.float32 or num_segments < 2:
        return False
    programs = -(-num_segments // 2) * -(-num_tokens // 128) * -(-num_columns // 64)
    return programs >= MIN_PROGRAMS


@kept
def linear(chip: Chip, dtype: torch.dtype, num_tokens: int, aligned: bool, paired: bool) -> Options:
    """For the product with merged weights. A stage holds base and deltas, so it is shallow."""
    if not aligned:
        return around(_linear(32, 32, 32, 4, 1), warps=(2, 8))
    if dtype == torch.float32:
        return _linear(64, 64, 16, 4, 2), (_linear(64, 64, 16, 8, 2),)
    if num_tokens <= 32:
        return around(_linear(32, 64, 32, 4, 3), warps=(2, 8), stages=(2,))
    if num_tokens <= 64:
        return around(_linear(64, 64, 32, 4, 3), warps=(8,), stages=(2,))
    if paired:
        return _linear(128, 64, 32, 8, 3), (_linear(64, 64, 32, 4, 3), _linear(128, 64, 64, 8, 2))
    candidates = (
        _linear(64, 64, 32, 4, 3),
        _linear(128, 128, 32, 8, 2),
        _linear(256, 64, 32, 8, 3),
        _linear(128, 64, 64, 8, 2),
    )
    return _linear(128, 64, 32, 4, 3), candidates


@kept
def weights(chip: Chip, dtype: torch.dtype, aligned: bool) -> Options:
    """For the gradient of the weights; BLOCK_T is the depth of the product here.

    A tile of all BLOCK_E experts is held in registers, twice: their deltas and their gradients.
    """
    if dtype == torch.float32:
        blocks = (16, 32, 32) if aligned else (16, 32, 16)
        return around(_linear(*blocks, 4, 2), warps=(8,), stages=(3,))
    if not aligned:
        return around(_linear(32, 32, 32, 4, 2), warps=(8,))
    return _linear(64, 64, 32, 8, 3), (_linear(64, 64, 32, 4, 3), _linear(32, 64, 32, 8, 3))


@kept
def mode(chip: Chip, size: int, inner: int, precision: str) -> Options:
    """For a product along a mode."""
    if precision == "ieee":  # without tensor cores the operands stay in registers
        blocks = {"BLOCK_I": _block(size), "BLOCK_J": 16, "BLOCK_N": 32 if inner == 1 else 64}
        return around(Config(blocks, 4, 2), warps=(8,))
    blocks = {"BLOCK_I": _block(size), "BLOCK_J": 32, "BLOCK_N": 64 if inner == 1 else 128}
    return around(Config(blocks, 4, 3), warps=(8,), stages=(2,))


@kept
def contraction(chip: Chip, size: int, precision: str) -> Options:
    """For a factor's gradient."""
    block = _block(size)
    depth = 32 if precision == "tf32" or block >= 64 else 16
    pinned = Config({"BLOCK_I": block, "BLOCK_J": block, "BLOCK_N": depth}, 4, 2)
    return around(pinned, warps=(2, 8))


def at_a_time(rank: int, num_experts: int) -> tuple[int, int]:
    """How many ranks, and how many experts, share a launch of the curvature.

    All ranks of an expert together need no running sum in memory. Their buffers hold at most
    2 E weights, or as many as the experts themselves in fp32 for 16-bit parameters.
    """
    ranks = min(rank, 2 * num_experts)
    return ranks, min(num_experts, 2 * num_experts // ranks)


def _block(size: int) -> int:
    return 64 if size > 32 else 32 if size > 16 else 16
