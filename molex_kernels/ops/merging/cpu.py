"""Merging on a CPU: native kernels around ATen's matrix products.

Everything the merge needs beside its results is the weights of `GROUP` segments, however many there
are; forward, a few rows of them. The curvature goes expert by expert, so that its intermediate
results stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from molex_kernels.ops.merging import plan
from molex_kernels.ops.merging.plan import Mode

GROUP = 4  # segments that read the deltas once

molex = torch.ops.molex


def deltas_forward(
    base: Tensor,
    experts: Tensor,
    out1: Tensor | None,
    out2: Tensor | None,
    in1: Tensor | None,
    in2: Tensor | None,
    ties: bool,
) -> Tensor:
    majority = molex.camex_majority_cpu(base, experts) if ties else None
    factors: list[Tensor | None] = [None if f is None else f.float() for f in (out1, out2, in1)]
    factors.append(None if in2 is None else in2.float().mT)
    return molex.camex_deltas_cpu(base, experts, *factors, majority).to(experts.dtype)


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
    majority = molex.camex_majority_cpu(base, experts) if ties else None
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
    start, given = base.float().contiguous(), deltas.float().contiguous()
    return molex.camex_linear_cpu(x, start, given, gates.contiguous(), bias)


def linear_backward(
    dy: Tensor, x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, base, deltas, gates and bias; those not needed are empty."""
    needs_x, needs_base, needs_deltas, needs_gates, needs_bias = needs
    num_segments = x.shape[0]
    dx = x.new_empty(x.shape if needs_x else (0,))
    dbase = torch.zeros(base.shape if needs_base else (0,), dtype=torch.float32)
    ddeltas = torch.zeros(deltas.shape if needs_deltas else (0,), dtype=torch.float32)
    dgates = gates.new_empty(gates.shape if needs_gates else (0,))
    if needs_x:
        for first, weights in _merged(base, deltas, gates, x.dtype):
            for s, weight in enumerate(weights, first):
                torch.mm(dy[s], weight, out=dx[s])
    if needs_base or needs_deltas or needs_gates:
        given, gates = deltas.float().contiguous(), gates.contiguous()
        dweights = torch.empty(min(GROUP, num_segments), *base.shape)
        for first in range(0, num_segments, GROUP):
            part = slice(first, min(first + GROUP, num_segments))
            here = dweights[: part.stop - first]
            for s, dweight in enumerate(here, first):
                torch.mm(dy[s].mT.float(), x[s].float(), out=dweight)
            found = molex.camex_merge_bwd_cpu(
                here,
                given,
                gates[part],
                dbase if needs_base else None,
                ddeltas if needs_deltas else None,
                needs_gates,
            )
            if needs_gates:
                dgates[part] = found
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
    start, given, gates = base.float().contiguous(), deltas.float().contiguous(), gates.contiguous()
    buffer = torch.empty(min(GROUP, gates.shape[0]), *base.shape)
    for first in range(0, gates.shape[0], GROUP):
        mine = gates[first : first + GROUP]
        weights = buffer[: mine.shape[0]]
        molex.camex_merge_cpu(start, given, mine, weights)
        yield first, weights.to(dtype)


def _factors(*factors: Tensor | None) -> list[Tensor]:
    return [f.float() for f in factors if f is not None]


def _tau(base: Tensor, experts: Tensor) -> Tensor:
    """[E, O, D] contiguous fp32."""
    out = torch.empty(experts.shape, dtype=torch.float32)
    return torch.sub(experts.float(), base.float(), out=out)


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
