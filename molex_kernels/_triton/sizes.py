"""Sizes on the host; Triton's functions of these names are for kernels, and slow outside them."""

from __future__ import annotations


def cdiv(count: int, block: int) -> int:
    """How many blocks hold `count` elements."""
    return -(-count // block)


def next_power_of_2(count: int) -> int:
    """The least power of two that is not below `count`; 1 for 0."""
    return 1 << max(count - 1, 0).bit_length()
