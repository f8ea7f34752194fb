"""The passes of robust attention as launches. Nothing on the device is ever read here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molex_kernels import _philox
from molex_kernels._dtypes import dot_precision
from molex_kernels._triton import chips
from molex_kernels._triton.arguments import strided
from molex_kernels._triton.launch import launch
from molex_kernels._triton.sizes import cdiv, next_power_of_2
from molex_kernels.ops.rpc_attention.kernels import config
from molex_kernels.ops.rpc_attention.kernels.backward import _rpc_bwd_attention, _rpc_bwd_rows
from molex_kernels.ops.rpc_attention.kernels.forward import _rpc_fwd

SMALLEST = torch.finfo(torch.float32).tiny


def rpc_attention_forward(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """L, S of the last iteration, what L's rounding took, L of all others, the rows' statistics.

    These are of the scores s in fp32 the one that is largest when scaled and the sum over
    exp(scale (s - that)), in 16 bits the logarithm to base 2 of the sum over exp(scale s).
    """
    fp32: Any = {"dtype": torch.float32}
    out = a.k.new_empty(a.k.shape)
    sparse = a.k.new_empty(a.k.shape if a.returns_sparse else (0,), **fp32)
    keeps_rest = a.keeps_state and a.k.dtype != torch.float32
    out_rest = a.k.new_empty(a.k.shape if keeps_rest else (0,))
    low_ranks = a.k.new_empty((a.num_iters - 1, *a.k.shape) if a.keeps_state else (0,), **fp32)
    stats = a.k.new_empty((a.num_iters, 2, *a.k.shape[:3]) if a.keeps_state else (0,), **fp32)
    if a.k.numel() == 0:
        return out, sparse, out_rest, low_ranks, stats
    heads, tokens, width = a.k.shape[1:]
    cleans = [a.k.new_empty(a.k.shape) for _ in range(min(a.num_iters - 1, 2))]
    rest = a.k.new_empty(a.k.shape, **fp32) if a.num_iters > 1 else None
    chip, is_aligned = chips.of(a.k.device), _aligned(a.k, a.v, a.q)
    _, steep, *dropout = _scales(a.scale, a.dropout_p)
    for t in range(a.num_iters):
        last = t == a.num_iters - 1
        drops = last and a.seed is not None
        length = config.length(tokens, is_middle=t > 0 and not last)
        launch(
            _rpc_fwd,
            lambda b: (_blocks(a.k, b),),
            (
                *map(strided, (a.k, a.v, a.q)),
                None if t == 0 else cleans[(t - 1) % 2],
                None if last else cleans[t % 2],
                rest,
                low_ranks[t] if a.keeps_state and not last else None,
                out,
                out_rest if keeps_rest and last else None,
                sparse if a.returns_sparse and t >= a.num_iters - 2 else None,
                stats[t] if a.keeps_state else None,
                a.threshold.contiguous(),
                None if a.key_mask is None else a.key_mask.contiguous(),
                a.seed if drops else None,
                *(heads, tokens, width, abs(steep), *dropout),
            ),
            {
                "IS_FIRST": t == 0,
                "IS_LAST": last,
                "IS_CAUSAL": a.is_causal,
                "IS_PER_TOKEN": a.threshold.dim() == 3,
                "IS_NEGATIVE": steep < 0,
                "PRECISION": dot_precision(a.k.dtype),
            },
            config.forward(chip, a.k.dtype, _padded(width), is_aligned, drops, length),
            updates=(rest,),
        )
    return out, sparse, out_rest, low_ranks, stats


def rpc_attention_backward(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, q and the threshold; those not needed are empty."""
    if a.k.numel() == 0:
        gradients = [a.k.new_empty(a.k.shape if need else (0,)) for need in a.needs[:3]]
        dthreshold = a.threshold.new_zeros(a.threshold.shape if a.needs[3] else (0,))
        return gradients[0], gradients[1], gradients[2], dthreshold
    heads, tokens, width = a.k.shape[1:]
    chip, is_aligned = chips.of(a.k.device), _aligned(a.k, a.v, a.q)
    fp32: Any = {"dtype": torch.float32}
    clean, dlow, dk = (a.k.new_empty(a.k.shape) for _ in range(3))
    dclean, dk_sum, du, dv_sum = (a.k.new_empty(a.k.shape, **fp32) for _ in range(4))
    # What attends, where that is a launch of its own: q, or the cleaned keys once more.
    other = clean if a.q is None and config.one_role(a.k.dtype, _padded(width)) else a.q
    dq_sum = None if other is None else a.k.new_empty(a.k.shape, **fp32)
    inner, dbound = (a.k.new_empty(a.k.shape[:3], **fp32) for _ in range(2))
    bound = a.threshold.contiguous()
    mask = None if a.key_mask is None else a.key_mask.contiguous()
    sizes = (heads, tokens, width)

    def rows(iteration: int) -> None:
        """From behind the iteration after this one to before this one's attention."""
        launch(
            _rpc_bwd_rows,
            lambda b: (_blocks(a.k, b),),
            (
                *map(
                    strided,
                    (
                        a.k,
                        a.dout,
                        a.dsparse if iteration == a.num_iters - 1 else None,
                    ),
                ),
                a.out,
                None if a.k.dtype == torch.float32 else a.out_rest,
                *(a.low_ranks, dclean, dk_sum, du, dbound),
                *(clean, dlow, inner, dk, bound, mask, iteration, *sizes),
            ),
            {
                "IS_LAST": iteration == a.num_iters,
                "IS_DONE": iteration == 0,
                "IS_PER_TOKEN": bound.dim() == 3,
            },
            config.rows(chip, _padded(width)),
            updates=(dk_sum, du, dbound),
        )

    def attention(
        iteration: int, *, as_rows: bool = False, as_keys: bool = False, sums: bool = False
    ) -> None:
        """Back through one iteration's attention, in one role or in both."""
        last = iteration == a.num_iters
        drops = last and a.seed is not None
        launch(
            _rpc_bwd_attention,
            lambda b: (_blocks(a.k, b),),
            (
                *(clean, strided(a.v), strided(other), dlow, inner, a.stats[iteration - 1]),
                *((None, None, None) if sums else (dclean, dv_sum, dq_sum)),
                *(
                    mask,
                    a.seed if drops else None,
                    *sizes,
                    *_scales(a.scale, a.dropout_p),
                ),
            ),
            {
                "IS_LAST": last or (as_rows and not as_keys and a.q is None),
                "IS_CAUSAL": a.is_causal,
                "IS_SUM": sums,
                "AS_ROWS": as_rows,
                "AS_KEYS": as_keys,
                "PRECISION": dot_precision(a.k.dtype),
            },
            config.backward(chip, a.k.dtype, _padded(width), is_aligned, drops),
            updates=(inner,) if sums else (dv_sum, dq_sum),
        )

    rows(a.num_iters)
    for iteration in range(a.num_iters, 0, -1):
        if a.k.dtype == torch.float32:
            # Of peaked weights, fp32's precision is lost if this sum comes from L.
            attention(iteration, as_rows=True, sums=True)
        if other is None:
            attention(iteration, as_rows=True, as_keys=True)
        else:
            attention(iteration, as_rows=True)
            attention(iteration, as_keys=True)
            if a.q is None:
                dclean += dq_sum
        rows(iteration - 1)
    dthreshold = a.threshold.new_empty(0)
    if a.needs[3]:
        dthreshold = dbound if bound.dim() == 3 else dbound.sum(-1)
    return (
        dk if a.needs[0] else a.k.new_empty(0),
        dv_sum.to(a.k.dtype) if a.needs[1] else a.k.new_empty(0),
        dq_sum.to(a.k.dtype) if dq_sum is not None and a.needs[2] else a.k.new_empty(0),
        dthreshold,
    )


def _scales(scale: float, dropout_p: float) -> tuple[float, float, int, float]:
    """In the kernels' order: of the gradients, of the scores in powers of 2, of dropout.

    The scores' is at least the smallest number: a hidden score is minus infinity, and 0 of it NaN.
    """
    steep = scale / math.log(2)
    if abs(steep) < SMALLEST:
        steep = SMALLEST
    kept = 1.0 / (1.0 - dropout_p)
    return scale, steep, _philox.threshold(dropout_p), kept


def _padded(width: int) -> int:
    return max(next_power_of_2(width), 16)


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether rows can be moved 16 bytes at a time."""
    a = [t for t in tensors if t is not None]
    return all(t.stride(-1) == 1 and t.shape[-1] * t.element_size() % 16 == 0 for t in a)


def _blocks(k: Tensor, blocks: Mapping[str, int]) -> int:
    """A program for each block of tokens of each head."""
    batch, heads, tokens, _ = k.shape
    return cdiv(tokens, blocks["BLOCK_I"]) * batch * heads
