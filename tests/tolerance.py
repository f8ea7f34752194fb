"""The one error budget.

`err(kernel, fp64) <= 2 * (err(reference in the same dtype, fp64) + eps * max|fp64|)`, and finite
wherever the fp64 result is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, in fp64."""
    if expected.numel() == 0:
        return 0.0
    return (actual.double() - expected.double()).abs().max().item()


def largest(expected: Tensor) -> float:
    return expected.abs().max().item() if expected.numel() else 0.0


def within_budget(
    name: str, actual: Tensor, expected: Tensor, reference: Tensor, dtype: torch.dtype
) -> None:
    """Fails unless `actual` is inside the budget; `expected` is fp64, `reference` in `dtype`."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    assert torch.isfinite(actual).equal(torch.isfinite(expected)), f"{name}: not finite"
    got = error(actual, expected)
    own = error(reference, expected)
    allowed = 2 * (own + torch.finfo(dtype).eps * largest(expected))
    assert got <= allowed, f"{name}: error {got:.3g} > {allowed:.3g} (reference's own {own:.3g})"
