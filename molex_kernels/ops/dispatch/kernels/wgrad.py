"""Gradients of the experts' weights and biases: sums over each expert's rows, in a fixed order."""

import triton
import triton.language as tl

from molex_kernels.ops.dispatch.kernels.product import token_of_row


@triton.jit
def _rows_of_expert(offsets_ptr, expert, num_rows):
    """First row and end of an expert's rows, clamped to [0, num_rows]."""
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    return tl.maximum(start, 0), tl.minimum(end, num_rows)


@triton.jit
def _dispatch_bwd_wgrad(
    left_ptr,  # [T, N] gathered, else [R, N]
    stride_lt,
    stride_ln,
    right_ptr,  # [T, D] gathered, else [R, D]
    stride_rt,
    stride_rd,
    out_ptr,  # [E, N, D]
    stride_oe,
    stride_on,
    stride_od,
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_columns,
    num_features,
    top_k,
    IS_LEFT_GATHERED: tl.constexpr,
    IS_RIGHT_GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_e = sum over the expert's rows r of left_r^T right_r; zeros without rows."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    tiles = tl.cdiv(num_columns, BLOCK_N) * tiles_d
    expert = pid // tiles
    tile = pid % tiles
    offs_n = (tile // tiles_d).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = (tile % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < num_columns
    mask_d = offs_d < num_features
    start, end = _rows_of_expert(offsets_ptr, expert, num_rows)
    out = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for row in range(start, end, BLOCK_T):
        offs_t = row + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        left_t = offs_t
        right_t = offs_t
        if IS_LEFT_GATHERED:
            left_t = token_of_row(permutation_ptr, offs_t, mask_t, top_k)
        if IS_RIGHT_GATHERED:
            right_t = token_of_row(permutation_ptr, offs_t, mask_t, top_k)
        left_ptrs = left_ptr + left_t.to(tl.int64)[None, :] * stride_lt
        right_ptrs = right_ptr + right_t.to(tl.int64)[:, None] * stride_rt
        left = tl.load(
            left_ptrs + offs_n[:, None] * stride_ln,
            mask=mask_n[:, None] & mask_t[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptrs + offs_d[None, :] * stride_rd,
            mask=mask_t[:, None] & mask_d[None, :],
            other=0.0,
        )
        out = tl.dot(left, right, out, input_precision=PRECISION)
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_oe + offs_n[:, None] * stride_on
    out_ptrs += offs_d[None, :] * stride_od
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=mask_n[:, None] & mask_d[None, :])


@triton.jit
def _dispatch_bwd_bias(
    x_ptr,  # [T, N] gathered, else [R, N]
    stride_xt,
    stride_xn,
    expert_weight_ptr,  # [T, K]
    stride_et,
    stride_ek,
    out_ptr,  # [E, N]
    stride_oe,
    stride_on,
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_columns,
    top_k,
    IS_GATHERED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out_e = sum over the expert's rows of x_r; gathered: of w_r x_token(r)."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(num_columns, BLOCK_N)
    expert = pid // tiles
    offs_n = (pid % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_columns
    start, end = _rows_of_expert(offsets_ptr, expert, num_rows)
    out = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for row in range(start, end, BLOCK_T):
        offs_t = row + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        source = offs_t.to(tl.int64)
        if IS_GATHERED:
            source = token_of_row(permutation_ptr, offs_t, mask_t, top_k).to(tl.int64)
        x_ptrs = x_ptr + source[:, None] * stride_xt + offs_n[None, :] * stride_xn
        x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
        if IS_GATHERED:
            assignment = tl.load(permutation_ptr + offs_t, mask=mask_t, other=0)
            choice = assignment - source * top_k
            weight_ptrs = expert_weight_ptr + source * stride_et + choice * stride_ek
            x *= tl.load(weight_ptrs, mask=mask_t, other=0.0).to(tl.float32)[:, None]
        out += x
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_oe + offs_n * stride_on
    tl.store(out_ptrs, tl.sum(out, axis=0).to(out_ptr.dtype.element_ty), mask=mask_n)
