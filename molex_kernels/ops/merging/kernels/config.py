"""Launch configurations of the merging kernels, by chip and shape class."""

from __future__ import annotations

import torch

from molex_kernels._triton.chips import Chip
from molex_kernels._triton.tuning import Config, Options, around, kept

MAX_UNROLLED = 8  # experts up to which a tile's merge is one straight run, its loads in flight
MIN_PROGRAMS = 132  # segments go in pairs where that leaves a program for each SM of a large GPU
PARTS = 32  # of the sum behind a factor's gradient: with the experts, enough programs for a GPU


@kept
def mask(chip: Chip) -> Options:
    """For what goes element by element."""
    return around(Config({"BLOCK_O": 4, "BLOCK_D": 128}, 4, 2), warps=(2, 8))


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
        return around(_linear(16, 32, 16, 4, 3), warps=(8,), stages=(2,))
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
    depth = 16 if precision == "ieee" and block < 64 else 32
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
