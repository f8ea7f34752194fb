"""Pinned launch configurations of the momentum kernels."""

from __future__ import annotations

import triton

from molex_kernels._tuning import Config

MAX_NORM_WIDTH = 16384  # a row is normalised by one program, in its registers
MAX_PROGRAMS = 1024  # of a backward pass with parameters: as many rows of partial sums


def tile(num_features: int, num_states: int, has_norm: bool) -> Config:
    """About 8 elements to a thread, 4 with three states; with a norm a program has whole rows."""
    elements = 512 if num_states > 2 else 1024
    if has_norm:
        width = max(triton.next_power_of_2(num_features), 16)
        warps = min(max(width // (elements // 4), 4), 16)
        rows = max(elements * warps // (4 * width), 1)
        return Config({"BLOCK_T": rows, "BLOCK_D": width}, warps, 1)
    width = 512 if num_features >= 1024 else 128
    return Config({"BLOCK_T": max(elements // width, 1), "BLOCK_D": width}, 4, 1)
