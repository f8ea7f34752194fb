"""The Python functions behind the toy op of test_operators.py."""

from __future__ import annotations

from torch import Tensor


def toy_forward(
    x: Tensor, weights: list[Tensor], power: int, keeps_product: bool
) -> tuple[Tensor, Tensor]:
    """y = (x * prod(weights)) ** power, and the product where it is kept."""
    product = x.clone()
    for weight in weights:
        product *= weight
    return product**power, product if keeps_product else x.new_empty((0,))


def toy_backward(
    dy: Tensor, x: Tensor, product: Tensor, weights: list[Tensor], power: int, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the weights, stacked; empty where not needed."""
    dproduct = dy * power * product ** (power - 1)
    dx, dweights = x.new_empty((0,)), x.new_empty((0,))
    if needs[0]:
        dx = dproduct * product / x
    if needs[1]:
        rows = [(dproduct * product / weight).sum(0) for weight in weights]
        dweights = x.new_empty(len(rows), *rows[0].shape)
        for row, sums in zip(dweights, rows, strict=True):
            row.copy_(sums)
    return dx, dweights
