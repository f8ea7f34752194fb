"""Pinned launch configurations of the attention kernels."""

from __future__ import annotations

import torch

from molex_kernels._tuning import Config


def _tiles(rows: int, keys: int, width: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_I": rows, "BLOCK_J": keys, "BLOCK_D": width}, num_warps, num_stages)


def forward(dtype: torch.dtype, width: int, aligned: bool) -> Config:
    """Rows that attend, and keys that they pass over at a time."""
    if dtype == torch.float32:
        return _tiles(32, 32, width, 4, 2)
    if not aligned:
        return _tiles(32, 32, width, 4, 2)
    return _tiles(64, 64, width, 4, 3)


def backward(dtype: torch.dtype, width: int, aligned: bool) -> Config:
    """Tokens that are rows and keys at once, and tokens that they pass over at a time."""
    if dtype == torch.float32:
        return _tiles(32, 32, width, 4 if width <= 64 else 8, 1)
    if not aligned:
        return _tiles(32, 32, width, 4, 1)
    return _tiles(64, 32, width, 4 if width <= 64 else 8, 2)


def rows(width: int) -> Config:
    """Rows to a program of the element-wise steps."""
    return Config({"BLOCK_I": 1024 // width, "BLOCK_D": width}, 4, 1)
