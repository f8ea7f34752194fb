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
def _first_cut(start, chunk):
    """The number of the first multiple of `chunk` behind an expert's first row."""
    return start // chunk + 1


@triton.jit
def _piece(offsets_ptr, number, num_rows, num_experts, chunk, BLOCK_E: tl.constexpr):
    """(expert, first row, end, cut, whether it is all of the expert) of a piece; none: no expert.

    An expert's rows are cut at the multiples of `chunk` inside them, except at the first, so that
    experts of like lengths stay whole; none has more than 2 chunks. First come those behind a cut,
    which are long, then each expert's first: short ones fill up the end. `cut` numbers a partial
    sum.
    """
    num_cuts = (num_rows - 1) // chunk
    is_head = number >= num_cuts
    expert = number - num_cuts
    if not is_head:
        offs_e = tl.arange(0, BLOCK_E)
        mask_e = offs_e < num_experts
        ends = tl.load(offsets_ptr + offs_e, mask=mask_e, other=0)
        row = (number + 1) * chunk
        expert = tl.sum((mask_e & (ends <= row)).to(tl.int32), axis=0)
    start, end = _rows_of_expert(offsets_ptr, tl.minimum(expert, num_experts - 1), num_rows)
    first_cut = _first_cut(start, chunk)
    is_whole = end <= (first_cut + 1) * chunk
    cut = tl.where(is_head, first_cut, number + 1)
    is_there = is_head | ((expert < num_experts) & (cut > first_cut))
    first = tl.where(is_head, start, cut * chunk)
    end = tl.minimum(end, (cut + 1) * chunk)
    return tl.where(is_there, expert, num_experts), first, end, cut, is_whole


@triton.jit
def _dispatch_bwd_wgrad(
    left,  # [T, N] gathered, else [R, N]
    right,  # [T, D] gathered, else [R, D]
    out,  # [E, N, D]
    partial,  # [cuts, N, D] fp32; None: no expert is cut
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_experts,
    num_columns,
    num_features,
    chunk,  # rows between cuts
    IS_LEFT_GATHERED: tl.constexpr,
    IS_RIGHT_GATHERED: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
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
    cut = 0
    is_whole = True
    if partial is None:
        start, end = _rows_of_expert(offsets_ptr, expert, num_rows)
    else:
        expert, start, end, cut, is_whole = _piece(
            offsets_ptr, expert, num_rows, num_experts, chunk, BLOCK_E
        )
        if expert >= num_experts:
            return
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
    mask = mask_n[:, None] & mask_d[None, :]
    if is_whole:
        out_e = Mat(nth(out, expert), out.row, out.col)
        store(at(out_e, offs_n[:, None], offs_d[None, :]), total, mask)
    elif partial is not None:
        of_cut = Mat(nth(partial, cut - 1), partial.row, partial.col)
        store(at(of_cut, offs_n[:, None], offs_d[None, :]), total, mask)


@triton.jit
def _dispatch_bwd_pieces(
    partial,  # [cuts, N, D] fp32
    out,  # [E, N, D]
    offsets_ptr,  # [E] int32
    num_rows,
    num_columns,
    num_features,
    chunk,  # rows between cuts
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_e of the experts that were cut: the sum of their pieces, in the order of the rows."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    tiles = tl.cdiv(num_columns, BLOCK_N) * tiles_d
    expert = pid // tiles
    tile = pid % tiles
    start, end = _rows_of_expert(offsets_ptr, expert, num_rows)
    first = _first_cut(start, chunk)
    if end <= (first + 1) * chunk:
        return
    offs_n = int64(tile // tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = int64(tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_n < num_columns)[:, None] & (offs_d < num_features)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for cut in range(first, tl.cdiv(end, chunk)):
        of_cut = Mat(nth(partial, cut - 1), partial.row, partial.col)
        total += load_fp32(at(of_cut, offs_n[:, None], offs_d[None, :]), mask)
    out_e = Mat(nth(out, expert), out.row, out.col)
    store(at(out_e, offs_n[:, None], offs_d[None, :]), total, mask)


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
