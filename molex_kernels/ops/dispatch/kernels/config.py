"""Pinned launch configurations of the dispatch kernels, by shape class."""

from __future__ import annotations

import torch

from molex_kernels._tuning import Config

GROUP = 8  # row tiles that share their columns' weights in the L2 cache


def _gemm(rows: int, columns: int, features: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_T": rows, "BLOCK_N": columns, "BLOCK_D": features}
    return Config(blocks, num_warps, num_stages)


# Rows per expert decide the tile: few rows are bound by streaming the weights, many by the multiplications.
_HALF = {
    "few": _gemm(16, 128, 128, 4, 3),
    "some": _gemm(64, 128, 64, 4, 4),
    "many": _gemm(128, 128, 64, 8, 3),
}
_HALF_GATED = {
    "few": _gemm(16, 64, 128, 4, 3),
    "some": _gemm(64, 64, 64, 4, 4),
    "many": _gemm(128, 128, 64, 8, 3),
}
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
_HALF_CANDIDATES = (
    _gemm(32, 128, 128, 4, 3),
    _gemm(64, 128, 64, 4, 4),
    _gemm(64, 256, 64, 8, 3),
    _gemm(128, 128, 64, 8, 3),
    _gemm(128, 128, 64, 4, 3),
    _gemm(128, 256, 64, 8, 3),
)
_SINGLE_CANDIDATES = (_gemm(32, 64, 32, 4, 2), _gemm(64, 64, 16, 4, 2), _gemm(64, 32, 32, 4, 2))


def rows_class(num_rows: int, num_experts: int) -> str:
    """How many rows an expert has on average: the launcher knows no more without asking the device."""
    average = num_rows / num_experts
    return "few" if average <= 32 else "some" if average <= 96 else "many"


def gemm(
    dtype: torch.dtype, rows: str, *, gated: bool = False
) -> tuple[Config, tuple[Config, ...]]:
    """The pinned configuration of a grouped product and what a sweep tries beside it."""
    if dtype == torch.float32:
        return (_SINGLE_GATED if gated else _SINGLE)[rows], _SINGLE_CANDIDATES
    return (_HALF_GATED if gated else _HALF)[rows], _HALF_CANDIDATES


def wgrad(dtype: torch.dtype, rows: str) -> tuple[Config, tuple[Config, ...]]:
    """As `gemm`; BLOCK_T is the depth of the product here."""
    if dtype == torch.float32:
        return _gemm(32, 64, 64, 4, 2), (_gemm(16, 64, 64, 4, 2), _gemm(32, 64, 32, 4, 2))
    if rows == "few":
        return _gemm(32, 128, 128, 8, 3), (_gemm(16, 128, 128, 8, 3),)
    return _gemm(64, 128, 128, 8, 3), (_gemm(64, 128, 256, 8, 3), _gemm(32, 128, 128, 8, 4))


def combine(num_features: int) -> Config:
    """About 16 elements to a thread; wide rows are read in long runs."""
    wide = num_features >= 1024
    return Config({"BLOCK_T": 4 if wide else 16, "BLOCK_D": 512 if wide else 128}, 4, 2)


BIAS = Config({"BLOCK_T": 32, "BLOCK_N": 128}, 4, 2)
WEIGHT = Config({"BLOCK_T": 16, "BLOCK_D": 128}, 4, 2)
