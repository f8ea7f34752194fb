"""Rows of each expert times that expert's weight: grouped GEMM, up and down projections."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat, at, int64, load_fp32, nth, store
from molex_kernels._triton.tiles import segment_of_tile
from molex_kernels.ops.dispatch.kernels.activation import activate, up_half
from molex_kernels.ops.dispatch.kernels.product import grouped_order, multiply, token_of_row


@triton.jit
def _dispatch_fwd_gemm(
    x,  # [T, D] gathered, else [R, D]
    weight,  # [E, N, D]; gated: [E, 2N, D]
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
    gate_step,  # rows of the weight from one gate to the next
    up_shift,  # rows of the weight from a gate to its up
    numbers,  # of the activation, or None
    IS_GATHERED: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_ZERO_TAIL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out_r = act(weight_e x_token(r) + bias_e); keeps the pre-activation where there is room."""
    tile, column = grouped_order(num_row_tiles, tl.cdiv(num_columns, BLOCK_N), GROUP)
    offs_n = int64(column) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_columns
    gate_n = offs_n * gate_step
    up_n = int64(up_shift)
    if HAS_ZERO_TAIL:
        # The tiles are at least as many as the rows need: each also clears its share of the tail.
        tail_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (tail_t >= tl.load(offsets_ptr + num_experts - 1)) & (tail_t < num_rows)
        mask = mask[:, None] & mask_n[None, :]
        tail_t = int64(tail_t)
        zeros = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        store(at(out, tail_t[:, None], offs_n[None, :]), zeros, mask)
        if hidden is not None:
            hidden_ptrs = at(hidden, tail_t[:, None], gate_n[None, :])
            store(hidden_ptrs, zeros, mask)
            if IS_GATED:
                store(hidden_ptrs + up_n * int64(hidden.col), zeros, mask)

    expert, first, end = segment_of_tile(offsets_ptr, num_experts, tile, BLOCK_T, BLOCK_E)
    if expert >= num_experts:
        return
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = (offs_t >= 0) & (offs_t < end) & (offs_t < num_rows)
    source = token_of_row(permutation_ptr, offs_t, mask_t, TOP_K) if IS_GATHERED else offs_t
    result, up = multiply(
        x,
        int64(source),
        mask_t,
        Mat(nth(weight, expert), weight.row, weight.col),
        gate_n,
        mask_n,
        up_shift,
        num_features,
        IS_GATED,
        PRECISION,
        BLOCK_T,
        BLOCK_N,
        BLOCK_D,
    )
    if bias is not None:
        bias_ptrs = at(bias, expert, gate_n)
        result += load_fp32(bias_ptrs, mask_n)[None, :]
        if IS_GATED:
            up += load_fp32(bias_ptrs + up_n * int64(bias.col), mask_n)[None, :]

    rows = int64(offs_t)[:, None]
    mask = mask_t[:, None] & mask_n[None, :]
    if hidden is not None:
        hidden_ptrs = at(hidden, rows, gate_n[None, :])
        store(hidden_ptrs, result, mask)
        if IS_GATED:
            store(hidden_ptrs + up_n * int64(hidden.col), up, mask)
    if ACTIVATION != "none":
        result = activate(result, numbers, ACTIVATION)
    if IS_GATED:
        result = result * up_half(up, numbers, ACTIVATION)
    store(at(out, rows, offs_n[None, :]), result, mask)
