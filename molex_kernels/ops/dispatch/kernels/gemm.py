"""Rows of each expert times that expert's weight: grouped GEMM, up and down projections."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat, at, int64, load_fp32, nth, store
from molex_kernels._triton.tiles import segment_of_tile
from molex_kernels.ops.dispatch.kernels.activation import activate, up_half
from molex_kernels.ops.dispatch.kernels.product import grouped_order, halves, multiply, token_of_row


@triton.jit
def _dispatch_fwd_gemm(
    x,  # [T, D] gathered, else [R, D]
    weight,  # [E, N, D]; gated: [E, 2N, D]
    weight_blocks,  # its descriptor, or None
    bias,  # [E, N]; gated: [E, 2N]
    out,  # [R, N]
    hidden,  # [R, N]; gated: [R, 2N]
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_experts,
    num_columns,
    num_features,
    num_row_tiles,
    numbers,  # of the activation, or None
    IS_GATHERED: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,  # so is the weight's descriptor
    LAYOUT: tl.constexpr,  # of gates and ups among the weight's rows, or "plain"
    HAS_ZERO_TAIL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out_r = act(weight_e x_token(r) + bias_e); keeps the pre-activation where there is room.

    A tile is BLOCK_N rows of the weight: when gated, a half of them gates and the other their ups,
    so that both are one product.
    """
    WIDTH: tl.constexpr = BLOCK_N if LAYOUT == "plain" else BLOCK_N // 2  # columns of out
    tile, column = grouped_order(num_row_tiles, tl.cdiv(num_columns, WIDTH), GROUP)
    offs_out = int64(column) * WIDTH + tl.arange(0, WIDTH)
    mask_out = offs_out < num_columns
    offs_n, mask_n = _weight_rows(int64(column) * WIDTH, num_columns, LAYOUT, BLOCK_N)
    if HAS_ZERO_TAIL:
        # The tiles are at least as many as the rows need: each also clears its share of the tail.
        tail_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = (tail_t >= tl.load(offsets_ptr + num_experts - 1)) & (tail_t < num_rows)
        mask_t = mask_t[:, None]
        tail_t = int64(tail_t)[:, None]
        zeros = tl.zeros((BLOCK_T, WIDTH), tl.float32)
        store(at(out, tail_t, offs_out[None, :]), zeros, mask_t & mask_out[None, :])
        if hidden is not None:
            zeros = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            store(at(hidden, tail_t, offs_n[None, :]), zeros, mask_t & mask_n[None, :])

    expert, first, end = segment_of_tile(offsets_ptr, num_experts, tile, BLOCK_T, BLOCK_E)
    if expert >= num_experts:
        return
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = (offs_t >= 0) & (offs_t < end) & (offs_t < num_rows)
    source = token_of_row(permutation_ptr, offs_t, mask_t, TOP_K) if IS_GATHERED else offs_t
    place = (expert, column * (BLOCK_N if LAYOUT == "interleaved" else WIDTH))
    result = multiply(
        x,
        int64(source),
        mask_t,
        Mat(nth(weight, expert), weight.row, weight.col),
        offs_n,
        mask_n,
        weight_blocks,
        place,
        num_features,
        IS_TRANSPOSED,
        PRECISION,
        BLOCK_T,
        BLOCK_N,
        BLOCK_D,
    )
    if bias is not None:
        result += load_fp32(at(bias, expert, offs_n), mask_n)[None, :]
    other = result
    if LAYOUT == "concat":
        result, other = halves(result, BLOCK_T, BLOCK_N)
    _finish(
        result, other, int64(offs_t), mask_t, int64(column) * WIDTH, num_columns,
        out, hidden, numbers, LAYOUT, ACTIVATION, BLOCK_T, WIDTH, SLICES,
    )  # fmt: skip


@triton.jit
def _finish(
    result, up, rows, mask_t, first, num_columns, out, hidden, numbers,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Activates and writes WIDTH columns of out from `first` on, slice by slice.

    result: the pre-activation; of a concatenated weight its gates, with `up` beside them. The
    addresses of all of it at once would take more registers than there are.
    """
    if SLICES > 1:
        COLUMNS: tl.constexpr = 2 * WIDTH if LAYOUT == "interleaved" else WIDTH
        low, high = halves(result, BLOCK_T, COLUMNS)
        low_up, high_up = low, high
        if LAYOUT == "concat":
            low_up, high_up = halves(up, BLOCK_T, COLUMNS)
        _finish(
            low, low_up, rows, mask_t, first, num_columns, out, hidden, numbers,
            LAYOUT, ACTIVATION, BLOCK_T, WIDTH // 2, SLICES // 2,
        )  # fmt: skip
        _finish(
            high, high_up, rows, mask_t, first + WIDTH // 2, num_columns, out, hidden, numbers,
            LAYOUT, ACTIVATION, BLOCK_T, WIDTH // 2, SLICES // 2,
        )  # fmt: skip
    else:
        offs = first + tl.arange(0, WIDTH)[None, :]
        mask = mask_t[:, None] & (offs < num_columns)
        rows = rows[:, None]
        if LAYOUT == "interleaved":
            if hidden is not None:
                offs_n = 2 * first + tl.arange(0, 2 * WIDTH)[None, :]
                mask_n = mask_t[:, None] & (offs_n < 2 * int64(num_columns))
                store(at(hidden, rows, offs_n), result, mask_n)
            result, up = tl.split(tl.reshape(result, (BLOCK_T, WIDTH, 2)))
        elif hidden is not None:
            store(at(hidden, rows, offs), result, mask)
            if LAYOUT == "concat":
                store(at(hidden, rows, offs + num_columns), up, mask)
        if ACTIVATION != "none":
            result = activate(result, numbers, ACTIVATION)
        if LAYOUT != "plain":
            result *= up_half(up, numbers, ACTIVATION)
        store(at(out, rows, offs), result, mask)


@triton.jit
def _weight_rows(first, num_columns, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows of the weight for a tile whose first column of out is `first`; which there are."""
    offs = tl.arange(0, BLOCK_N)
    if LAYOUT == "plain":
        return first + offs, first + offs < num_columns
    elif LAYOUT == "interleaved":
        return 2 * first + offs, 2 * first + offs < 2 * int64(num_columns)
    else:
        columns = first + offs % (BLOCK_N // 2)
        return columns + int64(num_columns) * (offs // (BLOCK_N // 2)), columns < num_columns
