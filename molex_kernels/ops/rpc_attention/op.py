"""Operators of robust attention and their gradients.

The threshold T is computed outside, by PyTorch, so the operators return its gradient and autograd
takes it on through mu to k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molex_kernels import _operators
from molex_kernels.ops.rpc_attention import placement, reference

_INPUTS = "Tensor k, Tensor v, Tensor? q, Tensor threshold, Tensor? key_mask, Tensor? seed"
_OPTIONS = "int num_iters, float scale, bool is_causal, float dropout_p"


def _fake(a: Any) -> tuple[Tensor, ...]:
    def kept(size: tuple[int, ...], wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return a.k.new_empty(size if wanted else (0,), dtype=dtype)

    return (
        a.k.new_empty(a.k.shape),
        kept(a.k.shape, a.returns_sparse),
        kept(a.k.shape, a.keeps_state and a.k.dtype != torch.float32, a.k.dtype),
        kept((a.num_iters - 1, *a.k.shape), a.keeps_state),
        kept((a.num_iters, 2, *a.k.shape[:3]), a.keeps_state),
    )


def _reference(a: Any) -> tuple[Tensor, Tensor | None]:
    inputs: tuple[Any, ...] = (*a[:5], *a[6:10], a.seed)
    low, sparse = reference.rpc_attention(*inputs)
    return low, sparse if a.returns_sparse else None


# Results: L, S where it is returned, what rounding to 16 bits took from L (0 from kernels that do
# not use it), and of every iteration L (but the last) and its statistics.
rpc_attention = _operators.Pass(
    "rpc_attention",
    f"({_INPUTS}, {_OPTIONS}, bool keeps_state, bool returns_sparse)"
    " -> (Tensor out, Tensor sparse, Tensor out_rest, Tensor low_ranks, Tensor stats)",
    f"(Tensor dout, Tensor? dsparse, {_INPUTS}, Tensor out, Tensor out_rest, Tensor low_ranks, "
    f"Tensor stats, {_OPTIONS}, bool[] needs)"
    " -> (Tensor dk, Tensor dv, Tensor dq, Tensor dthreshold)",
    fake=_fake,
    triton="molex_kernels.ops.rpc_attention.kernels.launch",
    native=("cpu", "cuda"),
    reference=_reference,
    choose=lambda a: placement.implementation(
        a.k, a.num_iters, getattr(a, "keeps_state", True), a.dropout_p > 0
    ),
)
