"""Tile helpers of the grouped products."""

import triton
import triton.language as tl


@triton.jit
def grouped_order(num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of this program; GROUP row tiles share their columns in the L2."""
    pid = tl.program_id(0)
    per_group = GROUP * num_column_tiles
    first = pid // per_group * GROUP
    size = tl.minimum(num_row_tiles - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def token_of_row(permutation_ptr, offs_t, mask_t, top_k):
    """The token whose assignment stands at these rows of the expert order; 0 where masked."""
    assignment = tl.load(permutation_ptr + offs_t, mask=mask_t, other=0)
    return assignment.to(tl.int32) // top_k


@triton.jit
def multiply(
    x_ptrs,  # [BLOCK_T, 1] starts of the rows
    mask_t,
    stride_xd,
    weight_ptrs,  # [1, BLOCK_N] starts of the columns
    mask_n,
    stride_wd,
    up_shift,  # from a column of the gate half to its column of the up half, in elements
    num_features,
    IS_GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum_d x[t, d] weight[n, d] in fp32; when gated, also that of the up half (else zeros)."""
    stride_xd = tl.cast(stride_xd, tl.int64)
    stride_wd = tl.cast(stride_wd, tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptrs + offs_d[None, :] * stride_xd
    weight_ptrs = weight_ptrs + offs_d[:, None] * stride_wd
    out = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    up = out
    for d in range(0, num_features, BLOCK_D):
        mask_d = offs_d < num_features - d
        x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
        mask = mask_d[:, None] & mask_n[None, :]
        weight = tl.load(weight_ptrs, mask=mask, other=0.0)
        out = tl.dot(x, weight, out, input_precision=PRECISION)
        if IS_GATED:
            weight_up = tl.load(weight_ptrs + up_shift, mask=mask, other=0.0)
            up = tl.dot(x, weight_up, up, input_precision=PRECISION)
        x_ptrs += BLOCK_D * stride_xd
        weight_ptrs += BLOCK_D * stride_wd
    return out, up
