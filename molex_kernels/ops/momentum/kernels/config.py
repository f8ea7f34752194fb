"""Launch configurations of the momentum kernels, by chip and shape class."""

from __future__ import annotations

from collections.abc import Mapping

from molex_kernels._triton.chips import Chip
from molex_kernels._triton.sizes import next_power_of_2
from molex_kernels._triton.tuning import Config, Options, around, kept

_RESIDENT = 6 * 1024  # elements whose gradients a multiprocessor computes at once


def programs(chip: Chip, num_tiles: int, blocks: Mapping[str, int]) -> int:
    """Of a backward pass with parameters: one whole wave, for as many rows of partial sums."""
    return chip.programs(num_tiles, max(_RESIDENT // (blocks["BLOCK_T"] * blocks["BLOCK_D"]), 1))


# Elements to a thread where a program normalises whole rows, by the number of states: as many as
# the registers hold.
_ROWS_FORWARD = {1: 16, 2: 8, 3: 8}
_ROWS_BACKWARD = {1: 8, 2: 8, 3: 4}


@kept
def update(
    chip: Chip, num_features: int, num_states: int, *, has_norm: bool, backward: bool
) -> Options:
    """Whole rows to a program for a norm, else pieces of rows."""
    if has_norm:
        return _rows(num_features, num_states, backward)
    return _tiles(num_features, num_states)


def _rows(num_features: int, num_states: int, backward: bool) -> Options:
    each = 32 * (_ROWS_BACKWARD if backward else _ROWS_FORWARD)[num_states]
    width = max(next_power_of_2(num_features), 16)
    warps = min(max(width // each, 4), 32)
    pinned = Config({"BLOCK_T": max(each * warps // width, 1), "BLOCK_D": width}, warps, 1)
    return around(pinned, warps=(max(warps // 2, 1), min(2 * warps, 32)))


def _tiles(num_features: int, num_states: int) -> Options:
    """8 elements to a thread, 4 with three states."""
    elements = 512 if num_states > 2 else 1024
    width = 512 if num_features >= 1024 else 128
    pinned = Config({"BLOCK_T": elements // width, "BLOCK_D": width}, 4, 1)
    return around(pinned, warps=(2, 8))
