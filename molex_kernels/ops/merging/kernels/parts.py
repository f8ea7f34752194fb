"""One launcher per kernel. Nothing on the device is ever read here."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from molex_kernels._dtypes import dot_precision
from molex_kernels._triton import tuning
from molex_kernels.ops.merging.kernels import config
from molex_kernels.ops.merging.kernels.linear import _merging_fwd_linear
from molex_kernels.ops.merging.kernels.mask import _merging_fwd_mask
from molex_kernels.ops.merging.kernels.modes import _merging_bwd_mode, _merging_fwd_mode
from molex_kernels.ops.merging.kernels.order import Mode
from molex_kernels.ops.merging.kernels.weights import _merging_bwd_weights

MAX_BLOCK_E = 8


def launch_mask(
    base: Tensor,
    experts: Tensor,
    source: Tensor | None,
    out: Tensor | None,
    dbase: Tensor | None,
    ties: bool,
) -> None:
    """out = mask * (source or tau); dbase = -sum_e of it."""
    if base.numel() == 0:
        return
    blocks = config.MASK.blocks
    tiles = triton.cdiv(base.shape[0], blocks["BLOCK_O"])
    _merging_fwd_mask[(tiles * triton.cdiv(base.shape[1], blocks["BLOCK_D"]),)](
        *(base, *base.stride()),
        *(experts, *experts.stride()),
        *_with_strides(source, 3),
        *_with_strides(out, 3),
        *_with_strides(dbase, 2),
        *base.shape,
        experts.shape[0],
        HAS_SOURCE=source is not None,
        HAS_OUT=out is not None,
        HAS_BASE=dbase is not None,
        HAS_TIES=ties,
        **config.MASK.launch_options(),
    )


def launch_product(
    precision: str,
    factor: Tensor,
    x: Tensor,
    mode: Mode,
    transposed: bool,
    out: Tensor,
    accumulate: bool,
) -> None:
    """`plan.Product`."""
    if out.numel() == 0:
        return
    factor = factor.mT if transposed else factor
    num_ranks, num_experts = factor.shape[:2]
    summed = out.shape[1] == 1
    chosen = config.mode(mode.size, mode.inner, precision)
    tiles = triton.cdiv(mode.size, chosen.blocks["BLOCK_I"])
    tiles *= triton.cdiv(mode.outer * mode.inner, chosen.blocks["BLOCK_N"])
    _merging_fwd_mode[(tiles * num_experts * (1 if summed else num_ranks),)](
        *(factor, *factor.stride()),
        *_with_batch(x),
        *_with_batch(out),
        mode.size,
        mode.inner,
        mode.outer * mode.inner,
        num_experts,
        num_ranks,
        IS_SUMMED=summed,
        IS_ADDED=accumulate,
        PRECISION=precision,
        **chosen.launch_options(),
    )


def launch_contract(precision: str, left: Tensor, right: Tensor, mode: Mode, out: Tensor) -> None:
    """`plan.Contract`."""
    if out.numel() == 0:
        return
    chosen = config.contraction(mode.size, precision)
    num_ranks, num_experts = out.shape[:2]
    steps = triton.cdiv(mode.outer * mode.inner, chosen.blocks["BLOCK_N"])
    num_parts = max(1, min(config.PARTS, steps))
    partial = out.new_empty(num_parts, *out.shape)
    tiles = triton.cdiv(mode.size, chosen.blocks["BLOCK_I"]) ** 2
    _merging_bwd_mode[(num_parts * tiles * num_ranks * num_experts,)](
        *_with_batch(left),
        *_with_batch(right),
        partial,
        mode.size,
        mode.inner,
        mode.outer * mode.inner,
        num_experts,
        num_ranks,
        num_parts,
        PRECISION=precision,
        **chosen.launch_options(),
    )
    torch.sum(partial, 0, out=out)


def launch_linear(
    x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """out_s = x_s (base + sum_e gates_se deltas_e)^T + bias_s."""
    if out.numel() == 0:
        return
    num_segments, num_tokens, num_columns = out.shape
    num_experts = deltas.shape[0]
    is_aligned = tuning.aligned(x, base, deltas, out)
    paired = config.is_paired(x.dtype, num_segments, num_tokens, num_columns, is_aligned)

    def launch(chosen: tuning.Config) -> None:
        tiles_t = triton.cdiv(num_tokens, chosen.blocks["BLOCK_T"])
        column_tiles = triton.cdiv(num_columns, chosen.blocks["BLOCK_N"])
        row_tiles = tiles_t * (triton.cdiv(num_segments, 2) if paired else num_segments)
        _merging_fwd_linear[(row_tiles * column_tiles,)](
            *(x, *x.stride()),
            *(base, *base.stride()),
            *(deltas, *deltas.stride()),
            *(gates, *gates.stride()),
            *_with_strides(bias, 2),
            *(out, *out.stride()),
            num_segments,
            num_tokens,
            num_columns,
            x.shape[2],
            num_experts,
            row_tiles,
            IS_PAIRED=paired,
            NUM_UNROLLED=num_experts if num_experts <= config.MAX_UNROLLED else 0,
            HAS_BIAS=bias is not None,
            PRECISION=dot_precision(x.dtype),
            **chosen.launch_options(),
        )

    pinned, candidates = config.linear(x.dtype, num_tokens, is_aligned, paired)
    key = (x.dtype, num_tokens, tuple(deltas.shape), is_aligned, paired)
    launch(tuning.choose("merging_fwd_linear", key, pinned, candidates, launch, on_gpu=x.is_cuda))


def launch_weights(
    dy: Tensor,
    x: Tensor,
    deltas: Tensor,
    gates: Tensor,
    dbase: Tensor | None,
    ddeltas: Tensor | None,
    needs_gates: bool,
) -> Tensor | None:
    """Fills dbase and ddeltas; returns the gates' gradient where it is needed."""
    num_segments, num_tokens, num_columns = dy.shape
    num_features = x.shape[2]
    num_experts = deltas.shape[0]
    partial: Tensor | None = None
    if num_columns * num_features == 0:
        return torch.zeros_like(gates) if needs_gates else None

    def launch(chosen: tuning.Config) -> None:
        nonlocal partial
        blocks = chosen.blocks
        tiles = triton.cdiv(num_columns, blocks["BLOCK_N"])
        tiles *= triton.cdiv(num_features, blocks["BLOCK_D"])
        block_e = min(MAX_BLOCK_E, triton.next_power_of_2(num_experts))
        if needs_gates:
            partial = gates.new_empty(num_segments, num_experts, tiles)
        _merging_bwd_weights[(tiles * triton.cdiv(num_experts, block_e),)](
            *(dy, *dy.stride()),
            *(x, *x.stride()),
            *(deltas, *deltas.stride()),
            *(gates, *gates.stride()),
            *_with_strides(dbase, 2),
            *_with_strides(ddeltas, 3),
            *_with_strides(partial, 3),
            num_segments,
            num_tokens,
            num_columns,
            num_features,
            num_experts,
            HAS_BASE=dbase is not None,
            HAS_DELTAS=ddeltas is not None,
            HAS_GATES=needs_gates,
            PRECISION=dot_precision(x.dtype),
            BLOCK_E=block_e,
            **chosen.launch_options(),
        )

    is_aligned = tuning.aligned(dy, x, deltas)
    pinned, candidates = config.weights(x.dtype, is_aligned)
    key = (x.dtype, num_tokens, tuple(deltas.shape), is_aligned)
    launch(tuning.choose("merging_bwd_weights", key, pinned, candidates, launch, on_gpu=x.is_cuda))
    return None if partial is None else partial.sum(2)


def _with_strides(x: Tensor | None, dims: int) -> tuple[Any, ...]:
    return (None, *(0,) * dims) if x is None else (x, *x.stride())


def _with_batch(x: Tensor) -> tuple[Any, ...]:
    """The tensor [E, r, O, D] and its strides over experts and ranks: 0 where one serves all."""
    return x, x.stride(0), 0 if x.shape[1] == 1 else x.stride(1)
