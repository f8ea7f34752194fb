"""The passes of merging as launches. Nothing on the device is ever read here."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from molex_kernels._triton.precision import of_product
from molex_kernels.ops.merging.kernels import config, merged, order, starts


def camex_deltas_forward(a: Any) -> Tensor:
    factors = [f for f in (a.out1, a.out2, a.in1, a.in2) if f is not None]
    out = a.experts.new_empty(a.experts.shape)
    if not factors:
        starts.mask(a.base, a.experts, None, out, None, a.ties)
        return out
    ranks, group = config.at_a_time(*factors[0].shape[:2])
    several = ranks < factors[0].shape[0]  # sums that are continued stay fp32
    curved = torch.empty_like(out, dtype=torch.float32) if several else out
    precision = _precision(a.base)
    for mine, tau in _tau(a.base, a.experts, group):
        order.transform(
            tau,
            [factor[:, mine] for factor in factors],
            partial(starts.product, precision),
            curved[mine, None],
            ranks=ranks,
            dtype=a.base.dtype,
        )
    if a.ties or several:
        starts.mask(a.base, a.experts, curved, out, None, a.ties)
    return out


def camex_deltas_backward(a: Any) -> tuple[Tensor, ...]:
    """Gradients of base, experts and the factors; those not needed are empty."""
    needs_base, needs_experts, *needs_factors = a.needs
    factors = [f for f in (a.out1, a.out2, a.in1, a.in2) if f is not None]
    dbase = a.base.new_empty(a.base.shape if needs_base else (0,))
    dexperts = a.experts.new_empty(a.experts.shape if needs_experts else (0,))
    dfactors = [
        a.base.new_empty(f.shape if need else (0,))
        for f, need in zip(factors or (a.base,) * 4, needs_factors, strict=True)
    ]
    needs_tau = needs_base or needs_experts
    source = a.ddeltas
    if factors:
        ranks, group = config.at_a_time(*factors[0].shape[:2])
        upstream = a.ddeltas.contiguous()
        if a.ties:
            upstream = torch.empty_like(upstream)
            starts.mask(a.base, a.experts, a.ddeltas, upstream, None, a.ties)
        source = torch.empty_like(upstream, dtype=torch.float32)
        found = [torch.empty_like(factor, dtype=torch.float32) for factor in factors]
        precision = _precision(a.base)
        for mine, tau in _tau(a.base, a.experts, group):
            order.transform_backward(
                tau,
                upstream[mine, None],
                [factor[:, mine] for factor in factors],
                partial(starts.product, precision),
                partial(starts.contract, precision),
                source[mine, None] if needs_tau else None,
                [gradient[:, mine] for gradient in found] if any(needs_factors) else None,
                ranks=ranks,
                dtype=a.base.dtype,
            )
        for dfactor, gradient, need in zip(dfactors, found, needs_factors, strict=True):
            if need:
                dfactor.copy_(gradient)
    if needs_tau:
        starts.mask(
            a.base,
            a.experts,
            source,
            dexperts if needs_experts else None,
            dbase if needs_base else None,
            a.ties and not factors,
        )
    return dbase, dexperts, *dfactors


def camex_linear_forward(a: Any) -> Tensor:
    out = a.x.new_empty(*a.x.shape[:2], a.base.shape[0])
    _linear(a.x, a.base, a.deltas, a.gates, a.bias, out)
    return out


def camex_linear_backward(a: Any) -> tuple[Tensor, ...]:
    """Gradients of x, base, deltas, gates and bias; those not needed are empty."""
    needs_x, needs_base, needs_deltas, needs_gates, needs_bias = a.needs
    dx = a.x.new_empty(a.x.shape if needs_x else (0,))
    dbase = a.base.new_empty(a.base.shape if needs_base else (0,))
    ddeltas = a.deltas.new_empty(a.deltas.shape if needs_deltas else (0,))
    dgates: Tensor | None = None
    if needs_x:
        _linear(a.dy, a.base.mT, a.deltas.mT, a.gates, None, dx)
    if needs_base or needs_deltas or needs_gates:
        is_merged = merged.is_possible(a.dy, a.x, weights=(a.deltas,)) and merged.fits(a.dy, a.x)
        dgates = (merged if is_merged else starts).weights(
            a.dy,
            a.x,
            a.deltas,
            a.gates,
            dbase if needs_base else None,
            ddeltas if needs_deltas else None,
            needs_gates,
        )
    dbias = a.dy.sum(1, dtype=torch.float32) if needs_bias else a.gates.new_empty(0)
    return dx, dbase, ddeltas, a.gates.new_empty(0) if dgates is None else dgates, dbias


def _linear(
    x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """out_s = x_s (base + sum_e gates_se deltas_e)^T + bias_s."""
    is_merged = merged.is_possible(x, out, weights=(base, deltas))
    (merged if is_merged else starts).linear(x, base, deltas, gates, bias, out)


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
    return of_product(base, True) if base.dtype == torch.float32 else "tf32"
