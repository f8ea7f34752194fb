"""Pinned launch configurations of the attention kernels."""

from __future__ import annotations

import torch

from molex_kernels._triton.tuning import Config


def _tiles(rows: int, keys: int, width: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_I": rows, "BLOCK_J": keys, "BLOCK_D": width}, num_warps, num_stages)


def forward(dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool) -> Config:
    """Rows that attend, and keys that they pass over at a time."""
    if dtype == torch.float32:
        return _tiles(16 if width > 64 else 32, 16, width, 4 if width <= 32 else 8, 2)
    if not aligned:
        return _tiles(32, 32, width, 4 if width <= 32 else 8, 2)
    # A mask of dropout takes as many registers as the scores.
    keys = 32 if has_dropout or width > 64 else 64
    return _tiles(64, keys, width, 4, 2) if width <= 64 else _tiles(64, keys, width, 8, 1)


def backward(dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool) -> Config:
    """Tokens that are rows and keys at once, and tokens that they pass over at a time."""
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


def rows(width: int) -> Config:
    """Rows to a program of the element-wise steps."""
    return Config({"BLOCK_I": 1024 // width, "BLOCK_D": width}, 4, 1)
