"""The one error budget.

`err(kernel, fp64) <= 2 * (err(reference in the same dtype, fp64) + eps * max|fp64|)`, and finite
wherever the fp64 result is. The errors are maxima over a tensor's elements and over several draws
of the inputs together, each divided by its own max|fp64|, so that no draw of large values speaks
for all. A handful of numbers, such as the gradient of a scalar, may be nearly 0 in a draw whose
terms are not: theirs are divided by the largest of all draws. A few draws leave the reference's own
error of them to luck, too: it is drawn more often. How often depends on the shapes alone, and every
draw counts.

A second figure is the norm of the error over that of the fp64 result, over all draws together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 2.0
HANDFUL = 8  # elements
DRAWS = 3
SLOW_DRAWS = 2  # of a kernel that is interpreted or emulated
ENOUGH = 1024  # elements: of a smaller tensor the reference is drawn until it has had as many
MOST_DRAWS = 24


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, in fp64."""
    if expected.numel() == 0:
        return 0.0
    return (actual.double() - expected.double()).abs().max().item()


def largest(expected: Tensor) -> float:
    """The largest absolute value; 0 of no elements."""
    return expected.abs().max().item() if expected.numel() else 0.0


@dataclass(frozen=True)
class Errors:
    """Errors of one tensor, over one draw or over several.

    Attributes:
        ours: Largest error of the implementation under test, as a share of the largest value.
        reference: The same of the reference in the same dtype.
        rounding: The dtype's eps; 0 where all values are 0.
        elements: Elements of the tensor in one draw.
        squares: Sums over all elements of the squared error of ours, of the reference's, and of the
            squared fp64 values.
        whole: The largest value.
    """

    ours: float
    reference: float
    rounding: float
    elements: int = ENOUGH
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    whole: float = 1.0

    @property
    def allowed(self) -> float:
        """The budget for the largest error."""
        return SLACK * (self.reference + self.rounding)

    @property
    def norms(self) -> tuple[float, float]:
        """The norm of the error over the fp64 norm: ours, the reference's."""
        ours, reference, whole = map(math.sqrt, self.squares)
        return (ours / whole, reference / whole) if whole else (ours, reference)

    @property
    def norm_ratio(self) -> float:
        """The norm of our error over that of the reference's."""
        ours, reference, _ = self.squares
        if reference:
            return math.sqrt(ours / reference)
        return math.inf if ours else 1.0

    def __or__(self, other: Errors) -> Errors:
        """The errors of both draws together."""
        whole = max(self.whole, other.whole)
        shares = [1.0, 1.0]
        if self.elements <= HANDFUL and whole:
            shares = [(e.whole or 1.0) / whole for e in (self, other)]
        mine, theirs = shares
        return Errors(
            max(self.ours * mine, other.ours * theirs),
            max(self.reference * mine, other.reference * theirs),
            max(self.rounding, other.rounding),
            self.elements,
            tuple(map(sum, zip(self.squares, other.squares, strict=True))),  # type: ignore[arg-type]
            whole,
        )


def measure(
    name: str, actual: Tensor, expected: Tensor, reference: Tensor, dtype: torch.dtype
) -> Errors:
    """Measures one tensor of one draw.

    Args:
        name: What to call it in a message.
        actual: The implementation's result.
        expected: The fp64 result.
        reference: The reference's result in `dtype`.
        dtype: The dtype under test.

    Raises:
        AssertionError: if the shapes differ, or `actual` is not finite where `expected` is.
    """
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    assert torch.isfinite(actual).equal(torch.isfinite(expected)), f"{name}: not finite"
    whole = largest(expected)
    squares = tuple(
        t.double().square().sum().item()
        for t in (actual.double() - expected, reference.double() - expected, expected)
    )
    return Errors(
        error(actual, expected) / (whole or 1.0),
        error(reference, expected) / (whole or 1.0),
        torch.finfo(dtype).eps if whole else 0.0,
        expected.numel(),
        squares,  # type: ignore[arg-type]
        whole,
    )


def within_budget(
    name: str, actual: Tensor, expected: Tensor, reference: Tensor, dtype: torch.dtype
) -> None:
    """Fails unless `actual`, of a single draw, is inside the budget; arguments as `measure`."""
    check({name: measure(name, actual, expected, reference, dtype)})


Draw = Callable[[], dict[str, Errors]]


def judge(
    draw: Draw,
    *,
    reference_alone: Draw | None = None,
    calls: int = DRAWS,
    enough: int = ENOUGH,
) -> None:
    """Fails unless all draws together are inside the budget; arguments as `collect`."""
    check(collect(draw, reference_alone=reference_alone, calls=calls, enough=enough))


def collect(
    draw: Draw,
    *,
    reference_alone: Draw | None = None,
    calls: int = DRAWS,
    enough: int = ENOUGH,
) -> dict[str, Errors]:
    """Draws as often as the tensors need.

    Args:
        draw: Makes fresh inputs and measures every tensor that comes out.
        reference_alone: The same with no error of ours. Default: `draw`.
        calls: How many draws measure the implementation; the others, the reference alone.
        enough: The elements of the smallest tensor that the reference is drawn for: more where a
            few of them have far larger errors than the others.

    Returns:
        The errors of all draws together, by name.
    """
    errors = draw()
    for index in range(1, draws_for(errors, calls, enough)):
        more = draw() if index < calls else (reference_alone or draw)()
        errors = {name: errors[name] | more[name] for name in errors}
    return errors


def draws_for(errors: dict[str, Errors], calls: int = DRAWS, enough: int = ENOUGH) -> int:
    """How many draws the smallest of these tensors needs: a matter of its elements alone.

    Where the implementation is called less often, being slow, so is the reference; but one draw or
    two are too few for any size, whose largest errors may all stand in a single row.
    """
    slower = 1 if calls >= DRAWS else 4
    fewest = min((e.elements for e in errors.values() if e.elements), default=enough)
    needed = math.ceil(enough / slower / fewest)
    return max(calls, DRAWS, min(needed, MOST_DRAWS // min(slower, 2)))


def check(errors: dict[str, Errors]) -> None:
    """Fails unless every error is inside the budget."""
    for name, e in errors.items():
        ours, reference = e.norms
        assert e.ours <= e.allowed, (
            f"{name}: error {e.ours:.3g} > {e.allowed:.3g} (reference's own {e.reference:.3g}); "
            f"relative norm {ours:.3g} (reference's own {reference:.3g})"
        )
