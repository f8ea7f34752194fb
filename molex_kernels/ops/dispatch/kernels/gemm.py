"""Rows of each expert times that expert's weight: grouped GEMM, up and down projections."""

import triton
import triton.language as tl

from molex_kernels._triton.tiles import segment_of_tile
from molex_kernels.ops.dispatch.kernels.activation import activate
from molex_kernels.ops.dispatch.kernels.product import grouped_order, multiply, token_of_row


@triton.jit
def _dispatch_fwd_gemm(
    x_ptr,  # [T, D] gathered, else [R, D]
    stride_xt,
    stride_xd,
    weight_ptr,  # [E, N, D]; gated: [E, 2N, D]
    stride_we,
    stride_wn,
    stride_wd,
    bias_ptr,  # [E, N]; gated: [E, 2N]
    stride_be,
    stride_bn,
    out_ptr,  # [R, N]
    stride_ot,
    stride_on,
    hidden_ptr,  # [R, N]; gated: [R, 2N]
    stride_ht,
    stride_hn,
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_experts,
    num_columns,
    num_features,
    num_row_tiles,
    top_k,
    gate_step,  # rows of the weight from one gate to the next
    up_shift,  # rows of the weight from a gate to its up
    IS_GATHERED: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    HAS_ZERO_TAIL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out_r = act(weight_e x_token(r) + bias_e); keeps the pre-activation where HAS_HIDDEN."""
    tile, column = grouped_order(num_row_tiles, tl.cdiv(num_columns, BLOCK_N), GROUP)
    offs_n = column.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_columns
    gate_n = offs_n * gate_step
    up_shift = tl.cast(up_shift, tl.int64)
    if HAS_ZERO_TAIL:
        # The tiles are at least as many as the rows need: each also clears its share of the tail.
        tail_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (tail_t >= tl.load(offsets_ptr + num_experts - 1)) & (tail_t < num_rows)
        mask = mask[:, None] & mask_n[None, :]
        tail_t = tail_t.to(tl.int64)[:, None]
        zeros = tl.zeros((BLOCK_T, BLOCK_N), out_ptr.dtype.element_ty)
        tl.store(out_ptr + tail_t * stride_ot + offs_n[None, :] * stride_on, zeros, mask=mask)
        if HAS_HIDDEN:
            hidden_ptrs = hidden_ptr + tail_t * stride_ht + gate_n[None, :] * stride_hn
            tl.store(hidden_ptrs, zeros, mask=mask)
            if IS_GATED:
                tl.store(hidden_ptrs + up_shift * stride_hn, zeros, mask=mask)

    expert, first, end = segment_of_tile(offsets_ptr, num_experts, tile, BLOCK_T, BLOCK_E)
    if expert >= num_experts:
        return
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = (offs_t >= 0) & (offs_t < end) & (offs_t < num_rows)
    source = token_of_row(permutation_ptr, offs_t, mask_t, top_k) if IS_GATHERED else offs_t
    expert = expert.to(tl.int64)
    out, up = multiply(
        x_ptr + source.to(tl.int64)[:, None] * stride_xt,
        mask_t,
        stride_xd,
        weight_ptr + expert * stride_we + gate_n[None, :] * stride_wn,
        mask_n,
        stride_wd,
        up_shift * stride_wn,
        num_features,
        IS_GATED,
        PRECISION,
        BLOCK_T,
        BLOCK_N,
        BLOCK_D,
    )
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * stride_be + gate_n * stride_bn
        out += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            bias_ptrs += up_shift * stride_bn
            up += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    rows = offs_t.to(tl.int64)[:, None]
    mask = mask_t[:, None] & mask_n[None, :]
    if HAS_HIDDEN:
        hidden_ptrs = hidden_ptr + rows * stride_ht + gate_n[None, :] * stride_hn
        tl.store(hidden_ptrs, out.to(hidden_ptr.dtype.element_ty), mask=mask)
        if IS_GATED:
            hidden_ptrs += up_shift * stride_hn
            tl.store(hidden_ptrs, up.to(hidden_ptr.dtype.element_ty), mask=mask)
    if ACTIVATION != "none":
        out = activate(out, ACTIVATION)
    if IS_GATED:
        out = out * up
    out_ptrs = out_ptr + rows * stride_ot + offs_n[None, :] * stride_on
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
