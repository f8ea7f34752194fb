"""Merging on a CPU: a few segments' weights at a time, on ATen's matrix products.

Everything the merge needs beside its results is the weights of `GROUP` segments, however many there
are. The curvature goes expert by expert, so that its intermediate results stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from molex_kernels.ops.merging import plan
from molex_kernels.ops.merging.plan import Mode

GROUP = 4  # segments that read the deltas once


def deltas_forward(
    base: Tensor,
    experts: Tensor,
    out1: Tensor | None,
    out2: Tensor | None,
    in1: Tensor | None,
    in2: Tensor | None,
    ties: bool,
) -> Tensor:
    factors = _factors(out1, out2, in1, in2)
    tau = _tau(base, experts)
    out = torch.empty_like(tau) if factors else tau
    majority = _majority(tau) if ties else None
    for e in range(experts.shape[0]):
        mine = slice(e, e + 1)
        agrees = None if majority is None else tau[mine].sign().eq_(majority)
        if factors:
            mine_of = [factor[:, mine] for factor in factors]
            plan.transform(tau[mine, None], mine_of, _product, out[mine, None])
        if agrees is not None:
            out[mine] *= agrees
    return out.to(experts.dtype)


def deltas_backward(
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
    factors = _factors(out1, out2, in1, in2)
    dbase = torch.zeros(base.shape if needs_base else (0,), dtype=torch.float32)
    dexperts = experts.new_empty(experts.shape if needs_experts else (0,))
    dfactors = tuple(
        base.new_empty(f.shape if need else (0,))
        for f, need in zip(factors or (base,) * 4, needs_factors, strict=True)
    )
    tau = _tau(base, experts) if factors or ties else ddeltas
    majority = _majority(tau) if ties else None
    for e in range(experts.shape[0]):
        mine = slice(e, e + 1)
        upstream = ddeltas[mine].to(torch.float32, memory_format=torch.contiguous_format)
        if majority is not None:
            upstream = tau[mine].sign().eq_(majority).mul_(upstream)
        dtau = upstream
        if factors:
            mine_of = [factor[:, mine] for factor in factors]
            dtau = torch.empty_like(upstream)
            found = [torch.empty_like(factor) for factor in mine_of]
            plan.transform_backward(
                tau[mine, None],
                upstream[:, None],
                mine_of,
                _product,
                _contract,
                dtau[:, None] if needs_base or needs_experts else None,
                found if any(needs_factors) else None,
            )
            for dfactor, gradient, need in zip(dfactors, found, needs_factors, strict=True):
                if need:
                    dfactor[:, mine] = gradient
        if needs_experts:
            dexperts[mine] = dtau
        if needs_base:
            dbase -= dtau[0]
    return dbase.to(base.dtype), dexperts, *dfactors


def linear_forward(
    x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor | None
) -> Tensor:
    out = x.new_empty(*x.shape[:2], base.shape[0])
    for first, weights in _merged(base, deltas, gates, x.dtype):
        for s, weight in enumerate(weights, first):
            torch.mm(x[s], weight.mT, out=out[s])
            if bias is not None:
                out[s] += bias[s]
    return out


def linear_backward(
    dy: Tensor, x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, base, deltas, gates and bias; those not needed are empty."""
    needs_x, needs_base, needs_deltas, needs_gates, needs_bias = needs
    num_segments = x.shape[0]
    size = base.numel()
    dx = x.new_empty(x.shape if needs_x else (0,))
    dbase = torch.zeros(base.shape if needs_base else (0,), dtype=torch.float32)
    ddeltas = torch.zeros(deltas.shape if needs_deltas else (0,), dtype=torch.float32)
    dgates = gates.new_empty(gates.shape if needs_gates else (0,))
    if needs_x:
        for first, weights in _merged(base, deltas, gates, x.dtype):
            for s, weight in enumerate(weights, first):
                torch.mm(dy[s], weight, out=dx[s])
    if needs_base or needs_deltas or needs_gates:
        by_row = deltas.float().permute(1, 2, 0)
        dweights = torch.empty(min(GROUP, num_segments), *base.shape)
        for first in range(0, num_segments, GROUP):
            part = slice(first, min(first + GROUP, num_segments))
            here = dweights[: part.stop - first]
            for s, dweight in enumerate(here, first):
                torch.mm(dy[s].mT.float(), x[s].float(), out=dweight)
            if needs_base:
                dbase += here.sum(0)
            if needs_deltas:
                ddeltas.view(-1, size).addmm_(gates[part].mT, here.view(-1, size))
            if needs_gates:
                # Row by row: shorter sums are more exact, and a product that deep is slow.
                dgates[part] = torch.bmm(here.transpose(0, 1), by_row).sum(0)
    return (
        dx,
        dbase.to(base.dtype),
        ddeltas.to(deltas.dtype),
        dgates,
        dy.sum(1, dtype=torch.float32) if needs_bias else gates.new_empty(0),
    )


def _merged(
    base: Tensor, deltas: Tensor, gates: Tensor, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """(first segment, weights of up to GROUP segments from it), in one buffer."""
    flat = deltas.float().reshape(deltas.shape[0], -1)
    start = base.float().reshape(1, -1)
    buffer = torch.empty(min(GROUP, gates.shape[0]), start.shape[1])
    for first in range(0, gates.shape[0], GROUP):
        mine = gates[first : first + GROUP]
        weights = buffer[: mine.shape[0]]
        torch.addmm(start, mine, flat, out=weights)
        yield first, weights.view(-1, *base.shape).to(dtype)


def _factors(*factors: Tensor | None) -> list[Tensor]:
    return [f.float() for f in factors if f is not None]


def _tau(base: Tensor, experts: Tensor) -> Tensor:
    """[E, O, D] contiguous fp32."""
    out = torch.empty(experts.shape, dtype=torch.float32)
    return torch.sub(experts.float(), base.float(), out=out)


def _majority(tau: Tensor) -> Tensor:
    """The sign of the sum over all experts."""
    return tau.sum(0, keepdim=True).sign_()


def _product(
    factor: Tensor, x: Tensor, mode: Mode, transposed: bool, out: Tensor, accumulate: bool
) -> None:
    matrix = factor[0, 0].mT if transposed else factor[0, 0]
    beta = 1.0 if accumulate else 0.0
    if mode.inner == 1:
        rows, result = x.view(mode.outer, mode.size), out.view(mode.outer, mode.size)
        torch.addmm(result, rows, matrix.mT, beta=beta, out=result)
        return
    blocks, result = x.view(mode), out.view(mode)
    torch.baddbmm(result, matrix.expand(mode.outer, -1, -1), blocks, beta=beta, out=result)


def _contract(left: Tensor, right: Tensor, mode: Mode, out: Tensor) -> None:
    if mode.inner == 1:
        shape = (mode.outer, mode.size)
        torch.mm(left.view(shape).mT, right.view(shape), out=out[0, 0])
    else:
        torch.sum(torch.bmm(left.view(mode), right.view(mode).mT), 0, out=out[0, 0])
