"""The Python functions behind the toy op of test_operators.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def toy_forward(given: Any) -> tuple[Tensor, Tensor]:
    """y = (x * prod(weights)) ** power, and the product where it is kept."""
    product = given.x.clone()
    for weight in given.weights:
        product *= weight
    return product**given.power, product if given.keeps_product else given.x.new_empty((0,))


def toy_backward(given: Any) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the weights, stacked; empty where not needed."""
    dproduct = given.dy * given.power * given.product ** (given.power - 1)
    dx, dweights = given.x.new_empty((0,)), given.x.new_empty((0,))
    if given.needs[0]:
        dx = dproduct * given.product / given.x
    if given.needs[1]:
        rows = [(dproduct * given.product / weight).sum(0) for weight in given.weights]
        dweights = given.x.new_empty(len(rows), *rows[0].shape)
        for row, sums in zip(dweights, rows, strict=True):
            row.copy_(sums)
    return dx, dweights
