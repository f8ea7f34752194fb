"""Sizes and inputs of the tests of merging."""

from __future__ import annotations

import torch
from conftest import DEVICE
from torch import Tensor

# Segments, tokens of each, experts, outputs, features, rank.
S, T, E, OUT, D, R = 3, 5, 4, 12, 10, 2


def draw(generator: torch.Generator, *sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))
