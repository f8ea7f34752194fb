"""The one error budget.

`err(kernel, fp64) <= 2 * (err(reference in the same dtype, fp64) + eps * max|fp64|)`, and finite
wherever the fp64 result is. The errors are maxima over a tensor's elements, and `judge` takes them
over several draws of the inputs where one draw leaves doubt: of a handful of numbers, such as the
gradient of a scalar, the reference's own error is a matter of luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 8


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, in fp64."""
    if expected.numel() == 0:
        return 0.0
    return (actual.double() - expected.double()).abs().max().item()


def largest(expected: Tensor) -> float:
    return expected.abs().max().item() if expected.numel() else 0.0


@dataclass
class Errors:
    """Of one tensor: ours, the reference's, and the largest value times eps."""

    ours: float
    reference: float
    rounding: float

    @property
    def allowed(self) -> float:
        return 2 * (self.reference + self.rounding)

    def __or__(self, other: Errors) -> Errors:
        """Of both tensors."""
        return Errors(
            max(self.ours, other.ours),
            max(self.reference, other.reference),
            max(self.rounding, other.rounding),
        )


def measure(
    name: str, actual: Tensor, expected: Tensor, reference: Tensor, dtype: torch.dtype
) -> Errors:
    """`expected` is fp64, `reference` in `dtype`. Fails if `actual` is not finite where it is."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    assert torch.isfinite(actual).equal(torch.isfinite(expected)), f"{name}: not finite"
    rounding = torch.finfo(dtype).eps * largest(expected)
    return Errors(error(actual, expected), error(reference, expected), rounding)


def within_budget(
    name: str, actual: Tensor, expected: Tensor, reference: Tensor, dtype: torch.dtype
) -> None:
    """Fails unless `actual` is inside the budget."""
    _check({name: measure(name, actual, expected, reference, dtype)})


def judge(draw: Callable[[], dict[str, Errors]]) -> None:
    """Fails unless what `draw` measures is inside the budget, once or over `DRAWS` draws."""
    errors = draw()
    if any(e.ours > e.allowed for e in errors.values()):
        for _ in range(DRAWS - 1):
            more = draw()
            errors = {name: errors[name] | more[name] for name in errors}
    _check(errors)


def _check(errors: dict[str, Errors]) -> None:
    for name, e in errors.items():
        assert e.ours <= e.allowed, (
            f"{name}: error {e.ours:.3g} > {e.allowed:.3g} (reference's own {e.reference:.3g})"
        )
