"""Dropout whose mask is a function of a seed and a position, so that a backward pass replays it.

Philox 4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), of
which the first of four words is used: key = the seed, counter = the position. Kernels compute the
same words, so every implementation drops the same elements for the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molex_kernels import _check

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def check(p: float, seed: Tensor | None, like: Tensor) -> None:
    """`dropout_p` in [0, 1); `dropout_seed`, None or an int64 scalar on the device of `like`."""
    _check.probability("dropout_p", p)
    if seed is not None:
        _check.tensor("dropout_seed", seed, "", (), (torch.int64,), like)


def draw_seed(like: Tensor) -> Tensor:
    """A seed from torch's generator, on the device, so that `torch.manual_seed` repeats it."""
    return torch.randint(2**62, (), device=like.device)


def threshold(p: float) -> int:
    """Words below it are dropped: p in units of 2^-32."""
    return round(p * 2**32)


def words(seed: Tensor, count: int, first: int = 0) -> Tensor:
    """The first word at `count` positions from `first`: [count] int64 in [0, 2^32)."""
    position = torch.arange(first, first + count, device=seed.device)
    c0, c1 = position & _WORD, position >> 32
    c2, c3 = torch.zeros_like(position), torch.zeros_like(position)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # int64 products wrap as unsigned ones do, so both halves are exact.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (b >> 32 & _WORD) ^ c1 ^ k0
        c2 = (a >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = b & _WORD, a & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0


def dropout(x: Tensor, p: float, seed: Tensor, first: int = 0) -> Tensor:
    """x / (1 - p) where the word of the element's position is kept, and 0 elsewhere.

    `first`: the position of the first element, where x is a part of something larger.
    """
    kept = words(seed, x.numel(), first).view(x.shape) >= threshold(p)
    return torch.where(kept, x / (1 - p), 0)
