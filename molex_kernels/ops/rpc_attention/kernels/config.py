"""Launch configurations of the attention kernels, by chip and shape class."""

from __future__ import annotations

from dataclasses import replace

import torch

from molex_kernels._triton.chips import KIB, Chip
from molex_kernels._triton.tuning import Config, Options, around, kept


def _tiles(rows: int, keys: int, width: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_I": rows, "BLOCK_J": keys, "BLOCK_D": width}, num_warps, num_stages)


def length(tokens: int, is_middle: bool) -> str:
    """`ragged` where they fill tiles of 128 less well than tiles of 64, else `short` or `long`.

    Of few tokens an iteration that is neither the first nor the last is `middle`. On an H200, with
    d = 64 and N = 197, tiles that fetch nothing ahead took 0.76 of the time in the first and the
    last iteration together, and about 1.8 times as long in each between.
    """
    if tokens > 512:
        return "long"
    if -tokens % 128 >= 64:
        return "ragged"
    return "middle" if is_middle else "short"


@kept
def forward(
    chip: Chip, dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool, length: str
) -> Options:
    """Rows that attend, keys that they pass over at a time, slices of columns at the end."""
    tile = _forward(chip, dtype, width, aligned, has_dropout, length)
    pinned = replace(tile, blocks={**tile.blocks, "SLICES": width // 16})
    return around(pinned, warps=(4, 8), stages=(1, 2, 3))


@kept
def backward(
    chip: Chip, dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool
) -> Options:
    """Tokens that are rows and keys at once, and tokens that they pass over at a time."""
    pinned = _backward(chip, dtype, width, aligned, has_dropout)
    return around(pinned, warps=(4, 8), stages=(1, 2))


def _forward(
    chip: Chip, dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool, length: str
) -> Config:
    if dtype == torch.float32:
        return _tiles(16 if width > 64 else 32, 16, width, 4 if width <= 32 else 8, 2)
    if not aligned:
        return _tiles(32, 32, width, 4 if width <= 32 else 8, 2)
    if _is_small(chip) and width > 64:
        return _tiles(64, 32, width, 8, 1)
    # A mask of dropout takes as many registers as the scores.
    if has_dropout:
        return _tiles(64, 32, width, 4, 2)
    if not _has_warp_groups(chip) and width > 64:
        return _tiles(64, 64, width, 8, 2)
    if _is_small(chip) or length == "ragged":
        return _tiles(64, 64, width, 4, 2)
    if _has_warp_groups(chip) and width == 64 and length == "short":
        return _tiles(128, 64, width, 8, 1)
    if _has_warp_groups(chip) and width == 64 and length == "long":
        return _tiles(128, 64, width, 4, 3)
    # Two warp groups share the tiles of keys and values.
    return _tiles(128, 64, width, 8, 3 if width <= 64 else 2)


def _backward(
    chip: Chip, dtype: torch.dtype, width: int, aligned: bool, has_dropout: bool
) -> Config:
    if dtype == torch.float32:
        if width > 32:
            return _tiles(16, 16, width, 8, 1)
        return _tiles(32, 32, width, 4, 1) if width == 16 else _tiles(32, 16, width, 8, 1)
    if not aligned or has_dropout:
        keys = 16 if width > 64 else 32
        return _tiles(32, keys, width, 4 if width <= 32 else 8, 1)
    if _is_small(chip) and width > 64:
        return _tiles(64, 32, width, 8, 1)
    if not _has_warp_groups(chip) and width > 64:
        return _tiles(64, 32, width, 8, 2)
    # A warp group for 64 rows: two would halve the products' columns.
    return _tiles(64, 32, width, 4, 2)


def _is_small(chip: Chip) -> bool:
    """Whether a block has too little memory for wide tiles that are fetched ahead."""
    return chip.is_amd or chip.shared < 128 * KIB


def _has_warp_groups(chip: Chip) -> bool:
    """Whether four warps multiply as one; else a warp holds operands in its registers, too."""
    return chip.shared >= 227 * KIB


def one_role(dtype: torch.dtype, width: int) -> bool:
    """Whether the registers of a backward pass hold one role of the tokens at a time."""
    return dtype == torch.float32 and width > 64


@kept
def rows(chip: Chip, width: int) -> Options:
    """Rows to a program of the element-wise steps."""
    return around(Config({"BLOCK_I": 1024 // width, "BLOCK_D": width}, 4, 1), warps=(2, 8))
