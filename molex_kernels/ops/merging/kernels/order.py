"""The order in which a curvature's factors are applied, and how gradients reach them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Mode(NamedTuple):
    """One of the four indices of tau: a contiguous [O, D] seen as [outer, size, inner]."""

    outer: int
    size: int
    inner: int


# out_er = factor_re x_er along the mode; with `transposed`, factor^T. An x [E, 1, O, D] serves all
# ranks, an out [E, 1, O, D] takes the sum over them; with `accumulate` on top of what is there.
# (factor [r, E, m, m], x [E, r or 1, O, D], mode, transposed, out [E, r or 1, O, D], accumulate)
Product = Callable[[Tensor, Tensor, Mode, bool, Tensor, bool], None]
# out_re[i, j] = sum over the other indices of left_er[i] right_er[j].
# (left [E, r or 1, O, D], right [E, r or 1, O, D], mode, out [r, E, m, m])
Contract = Callable[[Tensor, Tensor, Mode, Tensor], None]


def modes(factors: Sequence[Tensor]) -> tuple[Mode, Mode, Mode, Mode]:
    """The modes of out1, out2, in1 and in2."""
    o1, o2, d1, d2 = (factor.shape[2] for factor in factors)
    return (
        Mode(1, o1, o2 * d1 * d2),
        Mode(o1, o2, d1 * d2),
        Mode(o1 * o2, d1, d2),
        Mode(o1 * o2 * d1, d2, 1),
    )


def transform(
    tau: Tensor,
    factors: Sequence[Tensor],
    product: Product,
    out: Tensor,
    *,
    ranks: int,
    dtype: torch.dtype,
) -> None:
    """out = M tau, both [E, 1, O, D]; `ranks` ranks at a time, in two buffers of `dtype`."""
    on_out1, on_out2, on_in1, on_in2 = modes(factors)
    buffers = _buffers(2, tau, ranks, dtype)
    for first in range(0, factors[0].shape[0], ranks):
        out1, out2, in1, in2 = (factor[first : first + ranks] for factor in factors)
        left, right = (buffer[:, : out1.shape[0]] for buffer in buffers)
        product(in2, tau, on_in2, False, left, False)
        product(in1, left, on_in1, False, right, False)
        product(out2, right, on_out2, False, left, False)
        product(out1, left, on_out1, False, out, first > 0)


def transform_backward(
    tau: Tensor,
    upstream: Tensor,
    factors: Sequence[Tensor],
    product: Product,
    contract: Contract,
    dtau: Tensor | None,
    dfactors: Sequence[Tensor] | None,
    *,
    ranks: int,
    dtype: torch.dtype,
) -> None:
    """dtau = M^T upstream [E, 1, O, D] and dfactors [r, E, m, m]; None where not needed.

    A factor's gradient is the contraction of what reaches it from below, tau through the factors
    before it, with what reaches it from above, upstream through the transposed ones after it.
    """
    on_out1, on_out2, on_in1, on_in2 = modes(factors)
    buffers = _buffers(3, tau, ranks, dtype)
    for begin in range(0, factors[0].shape[0], ranks):
        part = slice(begin, begin + ranks)
        out1, out2, in1, in2 = (factor[part] for factor in factors)
        first, second, third = (buffer[:, : out1.shape[0]] for buffer in buffers)
        if dfactors is not None:
            product(in2, tau, on_in2, False, first, False)
            product(in1, first, on_in1, False, second, False)
            product(out2, second, on_out2, False, third, False)
            contract(upstream, third, on_out1, dfactors[0][part])
        product(out1, upstream, on_out1, True, third, False)
        if dfactors is not None:
            contract(third, second, on_out2, dfactors[1][part])
        product(out2, third, on_out2, True, second, False)
        if dfactors is not None:
            contract(second, first, on_in1, dfactors[2][part])
        product(in1, second, on_in1, True, first, False)
        if dfactors is not None:
            contract(first, tau, on_in2, dfactors[3][part])
        if dtau is not None:
            product(in2, first, on_in2, True, dtau, begin > 0)


def _buffers(count: int, tau: Tensor, ranks: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (tau.shape[0], ranks, *tau.shape[2:])
    return [tau.new_empty(shape, dtype=dtype) for _ in range(count)]
