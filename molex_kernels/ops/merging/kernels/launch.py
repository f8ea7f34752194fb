"""The passes of merging as launches. Nothing on the device is ever read here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from molex_kernels._dtypes import dot_precision
from molex_kernels.ops.merging.kernels import config, order, starts


def camex_deltas_forward(
    base: Tensor,
    experts: Tensor,
    out1: Tensor | None,
    out2: Tensor | None,
    in1: Tensor | None,
    in2: Tensor | None,
    ties: bool,
) -> Tensor:
    factors = [f for f in (out1, out2, in1, in2) if f is not None]
    out = experts.new_empty(experts.shape)
    if not factors:
        starts.mask(base, experts, None, out, None, ties)
        return out
    ranks, group = config.at_a_time(*factors[0].shape[:2])
    several = ranks < factors[0].shape[0]  # sums that are continued stay fp32
    curved = torch.empty_like(out, dtype=torch.float32) if several else out
    precision = _precision(base)
    for mine, tau in _tau(base, experts, group):
        order.transform(
            tau,
            [factor[:, mine] for factor in factors],
            partial(starts.product, precision),
            curved[mine, None],
            ranks=ranks,
            dtype=base.dtype,
        )
    if ties or several:
        starts.mask(base, experts, curved, out, None, ties)
    return out


def camex_deltas_backward(
    ddeltas: Tensor,
    base: Tensor,
    experts: Tensor,
    out1: Tensor | None,
    out2: Tensor | None,
    in1: Tensor | None,
    in2: Tensor | None,
    ties: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of base, experts and the factors; those not needed are empty."""
    needs_base, needs_experts, *needs_factors = needs
    factors = [f for f in (out1, out2, in1, in2) if f is not None]
    dbase = base.new_empty(base.shape if needs_base else (0,))
    dexperts = experts.new_empty(experts.shape if needs_experts else (0,))
    dfactors = [
        base.new_empty(f.shape if need else (0,))
        for f, need in zip(factors or (base,) * 4, needs_factors, strict=True)
    ]
    needs_tau = needs_base or needs_experts
    source = ddeltas
    if factors:
        ranks, group = config.at_a_time(*factors[0].shape[:2])
        upstream = ddeltas.contiguous()
        if ties:
            upstream = torch.empty_like(upstream)
            starts.mask(base, experts, ddeltas, upstream, None, ties)
        source = torch.empty_like(upstream, dtype=torch.float32)
        found = [torch.empty_like(factor, dtype=torch.float32) for factor in factors]
        precision = _precision(base)
        for mine, tau in _tau(base, experts, group):
            order.transform_backward(
                tau,
                upstream[mine, None],
                [factor[:, mine] for factor in factors],
                partial(starts.product, precision),
                partial(starts.contract, precision),
                source[mine, None] if needs_tau else None,
                [gradient[:, mine] for gradient in found] if any(needs_factors) else None,
                ranks=ranks,
                dtype=base.dtype,
            )
        for dfactor, gradient, need in zip(dfactors, found, needs_factors, strict=True):
            if need:
                dfactor.copy_(gradient)
    if needs_tau:
        starts.mask(
            base,
            experts,
            source,
            dexperts if needs_experts else None,
            dbase if needs_base else None,
            ties and not factors,
        )
    return dbase, dexperts, *dfactors


def camex_linear_forward(
    x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor | None
) -> Tensor:
    out = x.new_empty(*x.shape[:2], base.shape[0])
    starts.linear(x, base, deltas, gates, bias, out)
    return out


def camex_linear_backward(
    dy: Tensor, x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, base, deltas, gates and bias; those not needed are empty."""
    needs_x, needs_base, needs_deltas, needs_gates, needs_bias = needs
    dx = x.new_empty(x.shape if needs_x else (0,))
    dbase = base.new_empty(base.shape if needs_base else (0,))
    ddeltas = deltas.new_empty(deltas.shape if needs_deltas else (0,))
    dgates: Tensor | None = None
    if needs_x:
        starts.linear(dy, base.mT, deltas.mT, gates, None, dx)
    if needs_base or needs_deltas or needs_gates:
        dgates = starts.weights(
            dy,
            x,
            deltas,
            gates,
            dbase if needs_base else None,
            ddeltas if needs_deltas else None,
            needs_gates,
        )
    dbias = dy.sum(1, dtype=torch.float32) if needs_bias else gates.new_empty(0)
    return dx, dbase, ddeltas, gates.new_empty(0) if dgates is None else dgates, dbias


def _tau(base: Tensor, experts: Tensor, group: int) -> Iterator[tuple[slice, Tensor]]:
    """tau of `group` experts at a time, [E', 1, O, D] contiguous fp32, in one buffer."""
    buffer = base.new_empty(min(group, experts.shape[0]), 1, *base.shape, dtype=torch.float32)
    for first in range(0, experts.shape[0], group):
        mine = slice(first, min(first + group, experts.shape[0]))
        tau = buffer[: mine.stop - first]
        starts.mask(base, experts[mine], None, tau[:, 0], None, False)
        yield mine, tau


def _precision(base: Tensor) -> str:
    """TF32 holds what 16-bit inputs hold; the intermediate results round to it."""
    return dot_precision(base.dtype) if base.dtype == torch.float32 else "tf32"
