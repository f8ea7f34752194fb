"""Pinned launch configurations of the momentum kernels."""

from __future__ import annotations

import triton

from molex_kernels._triton.tuning import Config

MAX_PROGRAMS = 1024  # of a backward pass with parameters: as many rows of partial sums


# Elements to a thread where a program normalises whole rows, by the number of states: as many as
# the registers hold.
_ROWS_FORWARD = {1: 16, 2: 8, 3: 8}
_ROWS_BACKWARD = {1: 8, 2: 8, 3: 4}


def rows(num_features: int, num_states: int, *, backward: bool) -> Config:
    """Whole rows to a program, for a norm."""
    each = 32 * (_ROWS_BACKWARD if backward else _ROWS_FORWARD)[num_states]
    width = max(triton.next_power_of_2(num_features), 16)
    warps = min(max(width // each, 4), 32)
    return Config({"BLOCK_T": max(each * warps // width, 1), "BLOCK_D": width}, warps, 1)


def tiles(num_features: int, num_states: int) -> Config:
    """Pieces of rows: 8 elements to a thread, 4 with three states."""
    elements = 512 if num_states > 2 else 1024
    width = 512 if num_features >= 1024 else 128
    return Config({"BLOCK_T": elements // width, "BLOCK_D": width}, 4, 1)
