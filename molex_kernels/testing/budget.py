"""The one error budget.

`err(kernel, fp64) <= 2 * (err(reference in the same dtype, fp64) + eps * max|fp64|)`, and finite
wherever the fp64 result is. The errors are maxima over a tensor's elements, and `judge` takes them
over several draws of the inputs where one draw leaves doubt: of a handful of numbers, such as the
gradient of a scalar, the reference's own error is a matter of luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 8
GROSS = 1.5


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
    """Fails unless what `draw` measures is inside the budget, once or over `DRAWS` draws.

    Less than `GROSS` outside, another `DRAWS` decide: one draw in hundreds is conditioned so badly
    that its error stands alone. What is wrong by construction is outside again.
    """
    errors = draw()
    if _excess(errors) > 1:
        errors = _together(draw, DRAWS - 1, errors)
    if 1 < _excess(errors) < GROSS:
        errors = _together(draw, DRAWS - 1, draw())
    _check(errors)


def _excess(errors: dict[str, Errors]) -> float:
    """The largest error as a share of what is allowed."""
    return max((_share(e) for e in errors.values()), default=0.0)


def _share(e: Errors) -> float:
    if e.allowed:
        return e.ours / e.allowed
    return math.inf if e.ours else 0.0


def _together(
    draw: Callable[[], dict[str, Errors]], count: int, errors: dict[str, Errors]
) -> dict[str, Errors]:
    for _ in range(count):
        more = draw()
        errors = {name: errors[name] | more[name] for name in errors}
    return errors


def _check(errors: dict[str, Errors]) -> None:
    for name, e in errors.items():
        assert e.ours <= e.allowed, (
            f"{name}: error {e.ours:.3g} > {e.allowed:.3g} (reference's own {e.reference:.3g})"
        )
