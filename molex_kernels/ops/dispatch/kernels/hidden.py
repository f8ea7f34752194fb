"""Backward through the activation: one product gives dH, A' and the expert weights' gradient."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat, at, int64, load_fp32, nth, store
from molex_kernels._triton.tiles import rounded_product, segment_of_tile
from molex_kernels.ops.dispatch.kernels.activation import (
    activate_with_slope,
    through_gate,
    through_up,
    up_half,
)
from molex_kernels.ops.dispatch.kernels.product import grouped_order, halves, multiply, token_of_row


@triton.jit
def _dispatch_bwd_hidden(
    dy,  # [T, D]
    weight,  # w_down transposed, [E, I, D]
    weight_blocks,  # its descriptor, or None
    hidden,  # [R, I]; gated: [R, 2I]
    expert_weight,  # [T, K]
    dhidden,  # as hidden
    weighted,  # [R, I]
    partial,  # [R, column tiles] fp32
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_experts,
    num_columns,
    num_features,
    num_row_tiles,
    gate_step,
    up_shift,
    numbers,  # of the activation, or None
    IS_TRANSPOSED: tl.constexpr,  # so is the weight's descriptor
    IS_GATED: tl.constexpr,
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
    """G = w_down_e^T dy_token(r); dhidden = w_r G act'(H), weighted = w_r A, partial = <G, A>."""
    tile, column = grouped_order(num_row_tiles, tl.cdiv(num_columns, BLOCK_N), GROUP)
    expert, first, end = segment_of_tile(offsets_ptr, num_experts, tile, BLOCK_T, BLOCK_E)
    if expert >= num_experts:
        return
    offs_n = int64(column) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_columns
    offs_t = first + tl.arange(0, BLOCK_T)
    mask_t = (offs_t >= 0) & (offs_t < end) & (offs_t < num_rows)
    token = int64(token_of_row(permutation_ptr, offs_t, mask_t, TOP_K))
    inner = multiply(
        dy,
        token,
        mask_t,
        Mat(nth(weight, expert), weight.row, weight.col),
        offs_n,
        mask_n,
        weight_blocks,
        (expert, column * BLOCK_N),
        num_features,
        IS_TRANSPOSED,
        PRECISION,
        BLOCK_T,
        BLOCK_N,
        BLOCK_D,
    )

    assignment = tl.load(permutation_ptr + offs_t, mask=mask_t, other=0)
    choice = assignment - token * TOP_K
    scale = load_fp32(at(expert_weight, token, choice), mask_t)[:, None]
    sums = _back(
        inner, scale, offs_t, mask_t, int64(column) * BLOCK_N, num_columns,
        hidden, dhidden, weighted, gate_step, up_shift, numbers,
        IS_GATED, ACTIVATION, BLOCK_T, BLOCK_N, SLICES,
    )  # fmt: skip
    if partial is not None:
        tl.store(at(partial, int64(offs_t), column), sums, mask=mask_t)


@triton.jit
def _back(
    inner, scale, offs_t, mask_t, first_n, num_columns,
    hidden, dhidden, weighted, gate_step, up_shift, numbers,
    IS_GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Writes a tile of G back through the activation, slice by slice; its rows' <G, A>.

    All of H and of what becomes of it at once would take more registers than the product.
    """
    if SLICES > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        low, high = halves(inner, BLOCK_T, BLOCK_N)
        sums = _back(
            low, scale, offs_t, mask_t, first_n, num_columns,
            hidden, dhidden, weighted, gate_step, up_shift, numbers,
            IS_GATED, ACTIVATION, BLOCK_T, HALF, SLICES // 2,
        )  # fmt: skip
        sums += _back(
            high, scale, offs_t, mask_t, first_n + HALF, num_columns,
            hidden, dhidden, weighted, gate_step, up_shift, numbers,
            IS_GATED, ACTIVATION, BLOCK_T, HALF, SLICES // 2,
        )  # fmt: skip
    else:
        rows = int64(offs_t)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        mask = mask_t[:, None] & (offs_n < num_columns)[None, :]
        gate_n = offs_n[None, :] * gate_step
        up_n = int64(up_shift)
        hidden_ptrs = at(hidden, rows[:, None], gate_n)
        gate = load_fp32(hidden_ptrs, mask)
        acted, slope = activate_with_slope(gate, numbers, ACTIVATION)
        if IS_GATED:
            up = load_fp32(hidden_ptrs + up_n * int64(hidden.col), mask)
        if dhidden is not None:
            dhidden_ptrs = at(dhidden, rows[:, None], gate_n)
            scaled = scale * inner
            if IS_GATED:
                dup = through_up(scaled * acted, up, numbers, ACTIVATION)
                store(dhidden_ptrs + up_n * int64(dhidden.col), dup, mask)
                scaled *= up_half(up, numbers, ACTIVATION)
            store(dhidden_ptrs, through_gate(scaled * slope, gate, numbers, ACTIVATION), mask)
        if IS_GATED:
            acted *= up_half(up, numbers, ACTIVATION)
        if weighted is not None:
            store(at(weighted, rows[:, None], offs_n[None, :]), scale * acted, mask)
        # In a small tile a thread may have one element of a row; else rounding costs registers.
        product = rounded_product(inner, acted) if BLOCK_T < 64 else inner * acted
        sums = tl.sum(product, axis=1)
    return sums
