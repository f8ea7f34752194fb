"""Launch configurations of the attention kernels, by chip and shape class."""

from __future__ import annotations

import torch

from molex_kernels._triton.chips import Chip
from molex_kernels._triton.tuning import Config, Options, around, kept


def _tiles(rows: int, keys: int, width: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_I": rows, "BLOCK_J": keys, "BLOCK_D": width}, num_warps, num_stages)


@kept
def forward(
    chip: Chip, dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool
) -> Options:
    """Rows that attend, and keys that they pass over at a time."""
    pinned = _forward(dtype, width, aligned, has_dropout)
    return around(pinned, warps=(4, 8), stages=(1, 2, 3))


@kept
def backward(
    chip: Chip, dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool
) -> Options:
    """Tokens that are rows and keys at once, and tokens that they pass over at a time."""
    pinned = _backward(dtype, width, aligned, has_dropout)
    return around(pinned, warps=(4, 8), stages=(1, 2))


def _forward(dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool) -> Config:
    if dtype == torch.float32:
        return _tiles(16 if width > 64 else 32, 16, width, 4 if width <= 32 else 8, 2)
    if not aligned:
        return _tiles(32, 32, width, 4 if width <= 32 else 8, 2)
    # A mask of dropout takes as many registers as the scores.
    keys = 32 if has_dropout or width > 64 else 64
    return _tiles(64, keys, width, 4, 2) if width <= 64 else _tiles(64, keys, width, 8, 1)


def _backward(dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool) -> Config:
    if dtype == torch.float32:
        if width > 32:
            return _tiles(16, 16, width, 8, 1)
        return _tiles(32, 32, width, 4, 1) if width == 16 else _tiles(32, 16, width, 8, 1)
    if not aligned or has_dropout:
        keys = 16 if has_dropout and width > 64 else 32
        return _tiles(32, keys, width, 4 if width <= 32 else 8, 1)
    return _tiles(64, 32, width, 4 if width == 16 else 8, 1 if width > 64 else 2)


def one_role(dtype: torch.dtype, width: int) -> bool:
    """Whether the registers of a backward pass hold one role of the tokens at a time."""
    return dtype == torch.float32 and width > 64


@kept
def rows(chip: Chip, width: int) -> Options:
    """Rows to a program of the element-wise steps."""
    return around(Config({"BLOCK_I": 1024 // width, "BLOCK_D": width}, 4, 1), warps=(2, 8))
