"""Gradients of the experts' weights and biases: sums over each expert's rows, in a fixed order."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat, along, at, int64, load_fp32, nth, store
from molex_kernels._triton.tiles import add_product
from molex_kernels.ops.dispatch.kernels.product import token_of_row


@triton.jit
def _rows_of_expert(offsets_ptr, expert, num_rows):
    """First row and end of an expert's rows, clamped to [0, num_rows]."""
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    return tl.maximum(start, 0), tl.minimum(end, num_rows)


@triton.jit
def _dispatch_bwd_wgrad(
    left,  # [T, N] gathered, else [R, N]
    right,  # [T, D] gathered, else [R, D]
    out,  # [E, N, D]
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_columns,
    num_features,
    IS_LEFT_GATHERED: tl.constexpr,
    IS_RIGHT_GATHERED: tl.constexpr,
    TOP_K: tl.constexpr,
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
    offs_n = int64(tile // tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = int64(tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < num_columns
    mask_d = offs_d < num_features
    start, end = _rows_of_expert(offsets_ptr, expert, num_rows)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for row in range(start, end, BLOCK_T):
        offs_t = row + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        left_t = offs_t
        right_t = offs_t
        if IS_LEFT_GATHERED:
            left_t = token_of_row(permutation_ptr, offs_t, mask_t, TOP_K)
        if IS_RIGHT_GATHERED:
            right_t = token_of_row(permutation_ptr, offs_t, mask_t, TOP_K)
        left_rows = left.ptr + along(int64(left_t)[None, :], left.row)
        right_rows = right.ptr + along(int64(right_t)[:, None], right.row)
        left_tile = tl.load(
            left_rows + along(offs_n[:, None], left.col),
            mask=mask_n[:, None] & mask_t[None, :],
            other=0.0,
        )
        right_tile = tl.load(
            right_rows + along(offs_d[None, :], right.col),
            mask=mask_t[:, None] & mask_d[None, :],
            other=0.0,
        )
        total = add_product(total, left_tile, right_tile, PRECISION)
    out_e = Mat(nth(out, expert), out.row, out.col)
    store(
        at(out_e, offs_n[:, None], offs_d[None, :]),
        total,
        mask_n[:, None] & mask_d[None, :],
    )


@triton.jit
def _dispatch_bwd_bias(
    x,  # [T, N] gathered, else [R, N]
    expert_weight,  # [T, K]; None: the rows are not gathered
    out,  # [E, N]
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_columns,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out_e = sum over the expert's rows of x_r; gathered: of w_r x_token(r)."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(num_columns, BLOCK_N)
    expert = pid // tiles
    offs_n = int64(pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_columns
    start, end = _rows_of_expert(offsets_ptr, expert, num_rows)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for row in range(start, end, BLOCK_T):
        offs_t = row + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        source = int64(offs_t)
        if expert_weight is not None:
            source = int64(token_of_row(permutation_ptr, offs_t, mask_t, TOP_K))
        mask = mask_t[:, None] & mask_n[None, :]
        rows = load_fp32(at(x, source[:, None], offs_n[None, :]), mask)
        if expert_weight is not None:
            assignment = tl.load(permutation_ptr + offs_t, mask=mask_t, other=0)
            choice = assignment - source * TOP_K
            rows *= load_fp32(at(expert_weight, source, choice), mask_t)[:, None]
        total += rows
    store(at(out, expert, offs_n), tl.sum(total, axis=0), mask_n)
