"""Gradients of base, deltas and gates from one product: no segment's weight gradient is stored."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import along, at, int64, nth, store
from molex_kernels._triton.tiles import add_compensated, add_product, rounded_product
from molex_kernels.ops.merging.kernels.merge import stack_places


@triton.jit
def _store_inner(partial, segment, tile, offs_e, mask_e, delta, dweight):
    """partial_se = <dW_s, deltas_e> over a tile.

    A sum for each axis: Triton 3.6 confuses rows where a reshaped tile is held more than once.
    """
    inner = rounded_product(delta.to(tl.float32), dweight[None, :, :])
    inner = tl.sum(tl.sum(inner, axis=2), axis=1)
    ptrs = nth(partial, segment) + along(offs_e, partial.row) + along(tile, partial.col)
    tl.store(ptrs, inner, mask=mask_e)


@triton.jit
def _merging_bwd_weights(
    dy,  # [S, T, N]
    x,  # [S, T, D]
    deltas,  # [E, N, D]
    gates,  # [S, E] fp32
    dbase,  # [N, D]
    ddeltas,  # [E, N, D]
    partial,  # [S, E, tiles] fp32
    num_segments,
    num_tokens,
    num_columns,
    num_features,
    num_experts,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dW_s = dy_s^T x_s, then dbase = sum_s dW_s, ddeltas_e = sum_s gates_se dW_s and
    partial_se = <dW_s, deltas_e> over this tile, segment after segment.

    Where the deltas are differences of base, most of dbase cancels against ddeltas: in fp32 its
    sum over segments is compensated.

    One program holds one small tile of BLOCK_E experts: dW costs one product, where a product per
    expert over scaled rows would cost E of them.
    """
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    tiles = tl.cdiv(num_columns, BLOCK_N) * tiles_d
    tile = pid % tiles
    offs_e = int64(pid // tiles) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n = int64(tile // tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = int64(tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    mask_e = offs_e < num_experts
    mask_n = offs_n < num_columns
    mask_d = offs_d < num_features
    mask = mask_n[:, None] & mask_d[None, :]
    mask_end = mask_e[:, None, None] & mask[None, :, :]
    if partial is not None:
        delta = tl.load(stack_places(deltas, offs_e, offs_n, offs_d), mask=mask_end, other=0.0)
    if dbase is not None:
        base_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        base_lost = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if ddeltas is not None:
        delta_sums = tl.zeros((BLOCK_E, BLOCK_N, BLOCK_D), tl.float32)

    # One loop over segments and their rows, so that a segment's first loads do not wait for the end
    # of the one before.
    steps = tl.maximum(tl.cdiv(num_tokens, BLOCK_T), 1)
    dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for step in range(num_segments * steps):
        segment = int64(step // steps)
        rows = (step % steps) * BLOCK_T + offs_t
        mask_t = rows < num_tokens
        rows = int64(rows)
        dy_ptrs = nth(dy, segment) + along(rows[None, :], dy.row)
        dy_ptrs += along(offs_n[:, None], dy.col)
        dy_tile = tl.load(dy_ptrs, mask=mask_n[:, None] & mask_t[None, :], other=0.0)
        x_ptrs = nth(x, segment) + along(rows[:, None], x.row)
        x_ptrs += along(offs_d[None, :], x.col)
        x_tile = tl.load(x_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
        dweight = add_product(dweight, dy_tile, x_tile, PRECISION)
        if step % steps == steps - 1:
            if dbase is not None:
                if dbase.ptr.dtype.element_ty == tl.float32:
                    base_sum, base_lost = add_compensated(base_sum, base_lost, dweight)
                else:
                    base_sum += dweight
            if ddeltas is not None:
                gate = tl.load(at(gates, segment, offs_e), mask=mask_e, other=0.0)
                delta_sums += gate[:, None, None] * dweight[None, :, :]
            if partial is not None:
                _store_inner(partial, segment, tile, offs_e, mask_e, delta, dweight)
            dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    if dbase is not None:
        # Every group of experts has the same sum: the first writes it.
        dbase_ptrs = at(dbase, offs_n[:, None], offs_d[None, :])
        store(dbase_ptrs, base_sum, mask & (pid < tiles))
    if ddeltas is not None:
        store(stack_places(ddeltas, offs_e, offs_n, offs_d), delta_sums, mask_end)


@triton.jit
def _merging_bwd_segments(
    dweights,  # [S, N, D] fp32
    deltas,  # [E, N, D]
    gates,  # [S, E] fp32
    dbase,  # [N, D]
    ddeltas,  # [E, N, D]
    partial,  # [S, E, tiles] fp32
    num_segments,
    num_columns,
    num_features,
    num_experts,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The sums of `_merging_bwd_weights` over dW_s that are there, segment after segment."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    tiles = tl.cdiv(num_columns, BLOCK_N) * tiles_d
    tile = pid % tiles
    offs_e = int64(pid // tiles) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n = int64(tile // tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = int64(tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_e = offs_e < num_experts
    mask = (offs_n < num_columns)[:, None] & (offs_d < num_features)[None, :]
    mask_end = mask_e[:, None, None] & mask[None, :, :]
    if partial is not None:
        delta = tl.load(stack_places(deltas, offs_e, offs_n, offs_d), mask=mask_end, other=0.0)
    if dbase is not None:
        base_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        base_lost = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if ddeltas is not None:
        delta_sums = tl.zeros((BLOCK_E, BLOCK_N, BLOCK_D), tl.float32)
    ptrs = at(dweights, offs_n[:, None], offs_d[None, :])
    for segment in tl.range(0, num_segments, num_stages=4):
        dweight = tl.load(ptrs + int64(segment) * dweights.outer, mask=mask, other=0.0)
        if dbase is not None:
            if dbase.ptr.dtype.element_ty == tl.float32:
                base_sum, base_lost = add_compensated(base_sum, base_lost, dweight)
            else:
                base_sum += dweight
        if ddeltas is not None:
            gate = tl.load(at(gates, segment, offs_e), mask=mask_e, other=0.0)
            delta_sums += gate[:, None, None] * dweight[None, :, :]
        if partial is not None:
            _store_inner(partial, segment, tile, offs_e, mask_e, delta, dweight)
    if dbase is not None:
        # Every group of experts has the same sum: the first writes it.
        dbase_ptrs = at(dbase, offs_n[:, None], offs_d[None, :])
        store(dbase_ptrs, base_sum, mask & (pid < tiles))
    if ddeltas is not None:
        store(stack_places(ddeltas, offs_e, offs_n, offs_d), delta_sums, mask_end)
