"""Merging on a CPU: native kernels around ATen's matrix products.

Everything the merge needs beside its results is the weights of `GROUP` segments, however many there
are; forward, a few rows of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

GROUP = 4  # segments that read the deltas once

molex = torch.ops.molex


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
