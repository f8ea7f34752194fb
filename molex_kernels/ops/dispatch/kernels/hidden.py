"""Backward through the activation: one product gives dH, A' and the expert weights' gradient."""

import triton
import triton.language as tl

from molex_kernels._triton.tiles import segment_of_tile
from molex_kernels.ops.dispatch.kernels.activation import activate_with_slope
from molex_kernels.ops.dispatch.kernels.product import grouped_order, multiply, token_of_row


@triton.jit
def _dispatch_bwd_hidden(
    dy_ptr,  # [T, D]
    stride_yt,
    stride_yd,
    weight_ptr,  # w_down [E, D, I]
    stride_we,
    stride_wd,
    stride_wn,
    hidden_ptr,  # [R, I]; gated: [R, 2I]
    stride_ht,
    stride_hn,
    expert_weight_ptr,  # [T, K]
    stride_et,
    stride_ek,
    dhidden_ptr,  # as hidden
    stride_dt,
    stride_dn,
    weighted_ptr,  # [R, I]
    stride_at,
    stride_an,
    partial_ptr,  # [R, column tiles] fp32
    stride_pt,
    stride_pn,
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_experts,
    num_columns,
    num_features,
    num_row_tiles,
    top_k,
    gate_step,
    up_shift,
    IS_GATED: tl.constexpr,
    HAS_DHIDDEN: tl.constexpr,
    HAS_WEIGHTED: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """G = w_down_e^T dy_token(r); dhidden = w_r G act'(H), weighted = w_r A, partial = <G, A>."""
    tile, column = grouped_order(num_row_tiles, tl.cdiv(num_columns, BLOCK_N), GROUP)
    expert, first, end = segment_of_tile(offsets_ptr, num_experts, tile, BLOCK_T, BLOCK_E)
    if expert >= num_experts:
        return
    offs_n = column.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_columns
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = (offs_t >= 0) & (offs_t < end) & (offs_t < num_rows)
    token = token_of_row(permutation_ptr, offs_t, mask_t, top_k).to(tl.int64)
    inner, _ = multiply(
        dy_ptr + token[:, None] * stride_yt,
        mask_t,
        stride_yd,
        weight_ptr + expert.to(tl.int64) * stride_we + offs_n[None, :] * stride_wn,
        mask_n,
        stride_wd,
        0,
        num_features,
        False,
        PRECISION,
        BLOCK_T,
        BLOCK_N,
        BLOCK_D,
    )

    rows = offs_t.to(tl.int64)
    mask = mask_t[:, None] & mask_n[None, :]
    gate_n = offs_n[None, :] * gate_step
    up_shift = tl.cast(up_shift, tl.int64)
    hidden_ptrs = hidden_ptr + rows[:, None] * stride_ht + gate_n * stride_hn
    hidden = tl.load(hidden_ptrs, mask=mask, other=0.0).to(tl.float32)
    acted, slope = activate_with_slope(hidden, ACTIVATION)
    if IS_GATED:
        up = tl.load(hidden_ptrs + up_shift * stride_hn, mask=mask, other=0.0).to(tl.float32)
    assignment = tl.load(permutation_ptr + offs_t, mask=mask_t, other=0)
    choice = assignment - token * top_k
    expert_weight_ptrs = expert_weight_ptr + token * stride_et + choice * stride_ek
    scale = tl.load(expert_weight_ptrs, mask=mask_t, other=0.0).to(tl.float32)[:, None]

    if HAS_DHIDDEN:
        dhidden_ptrs = dhidden_ptr + rows[:, None] * stride_dt + gate_n * stride_dn
        scaled = scale * inner
        if IS_GATED:
            dup = (scaled * acted).to(dhidden_ptr.dtype.element_ty)
            tl.store(dhidden_ptrs + up_shift * stride_dn, dup, mask=mask)
            scaled *= up
        tl.store(dhidden_ptrs, (scaled * slope).to(dhidden_ptr.dtype.element_ty), mask=mask)
    if IS_GATED:
        acted *= up
    if HAS_PARTIAL:
        partial_ptrs = partial_ptr + rows * stride_pt + column * stride_pn
        tl.store(partial_ptrs, tl.sum(inner * acted, axis=1), mask=mask_t)
    if HAS_WEIGHTED:
        weighted_ptrs = weighted_ptr + rows[:, None] * stride_at + offs_n[None, :] * stride_an
        tl.store(weighted_ptrs, (scale * acted).to(weighted_ptr.dtype.element_ty), mask=mask)
