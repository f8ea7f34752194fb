"""Operators of robust attention and their gradients.

The threshold T is computed outside, by PyTorch, so the operators return its gradient and autograd
takes it on through mu to k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from molex_kernels import _operators

Tensors = tuple[Tensor, ...]
Optional = Tensor | None


def _forward_fake(
    k: Tensor,
    v: Tensor,
    q: Optional,
    threshold: Tensor,
    key_mask: Optional,
    seed: Optional,
    num_iters: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    keeps_state: bool,
    returns_sparse: bool,
) -> Tensors:
    wide: Any = {"dtype": torch.float32}
    return (
        k.new_empty(k.shape),
        k.new_empty(k.shape if returns_sparse else (0,), **wide),
        k.new_empty((num_iters - 1, *k.shape) if keeps_state else (0,), **wide),
        k.new_empty((num_iters, 2, *k.shape[:3]) if keeps_state else (0,), **wide),
    )


def _forward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.rpc_attention.kernels import launch

    return launch.forward(*arguments)


def _backward_fake(
    dout: Tensor,
    dsparse: Optional,
    k: Tensor,
    v: Tensor,
    q: Optional,
    threshold: Tensor,
    key_mask: Optional,
    seed: Optional,
    out: Tensor,
    lows: Tensor,
    stats: Tensor,
    num_iters: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    needs: Sequence[bool],
) -> Tensors:
    dk, dv, dq = (k.new_empty(k.shape if need else (0,)) for need in needs[:3])
    return dk, dv, dq, threshold.new_empty(threshold.shape if needs[3] else (0,))


def _backward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.rpc_attention.kernels import launch

    return launch.backward(*arguments)


_FORWARD = (
    "(Tensor k, Tensor v, Tensor? q, Tensor threshold, Tensor? key_mask, Tensor? seed, "
    "int num_iters, float scale, bool is_causal, float dropout_p, bool keeps_state, "
    "bool returns_sparse) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor dout, Tensor? dsparse, Tensor k, Tensor v, Tensor? q, Tensor threshold, "
    "Tensor? key_mask, Tensor? seed, Tensor out, Tensor lows, Tensor stats, int num_iters, "
    "float scale, bool is_causal, float dropout_p, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_forward = {
    "triton": _operators.define(
        "rpc_attention_fwd_triton", _FORWARD, fake=_forward_fake, run=_forward_triton
    ),
    "cuda": _operators.define("rpc_attention_fwd_cuda", _FORWARD, fake=_forward_fake),
    "cpu": _operators.define("rpc_attention_fwd_cpu", _FORWARD, fake=_forward_fake),
}
_backward = {
    "triton": _operators.define(
        "rpc_attention_bwd_triton", _BACKWARD, fake=_backward_fake, run=_backward_triton
    ),
    "cuda": _operators.define("rpc_attention_bwd_cuda", _BACKWARD, fake=_backward_fake),
    "cpu": _operators.define("rpc_attention_bwd_cpu", _BACKWARD, fake=_backward_fake),
}


class _RPCAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        q: Optional,
        threshold: Tensor,
        key_mask: Optional,
        seed: Optional,
        returns_sparse: bool,
        impl: str,
        *options: Any,
    ) -> Tensors:
        inputs = (k, v, q, threshold, key_mask, seed)
        out, sparse, lows, stats = _forward[impl](*inputs, *options, True, returns_sparse)
        ctx.save_for_backward(*inputs, out, lows, stats)
        ctx.impl, ctx.options, ctx.returns_sparse = impl, options, returns_sparse
        ctx.set_materialize_grads(False)
        return out, sparse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Optional, dsparse: Optional) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:4])
        saved = ctx.saved_tensors
        if dout is None:  # only the sparse part was used
            dout = torch.zeros_like(saved[0])
        if not ctx.returns_sparse:  # tracing makes a gradient for the empty tensor
            dsparse = None
        gradients = _backward[ctx.impl](dout, dsparse, *saved, *ctx.options, needs)
        kept = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return *kept, *(None,) * (4 + len(ctx.options))


def rpc_attention(
    k: Tensor,
    v: Tensor,
    q: Optional,
    threshold: Tensor,
    key_mask: Optional,
    seed: Optional,
    returns_sparse: bool,
    impl: str,
    *options: Any,
) -> Tensors:
    """The low-rank part, and the sparse part where it is asked for (else an empty tensor).

    `options` are num_iters, scale, is_causal and dropout_p.
    """
    if _operators.wants_grad(k, v, q, threshold):
        return _RPCAttention.apply(
            k, v, q, threshold, key_mask, seed, returns_sparse, impl, *options
        )
    inputs = (k, v, q, threshold, key_mask, seed)
    return _forward[impl](*inputs, *options, False, returns_sparse)[:2]
