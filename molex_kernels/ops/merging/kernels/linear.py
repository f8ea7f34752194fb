"""The product with merged weights: tiles of the weight are merged on their way in."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Vec, at, int64, load_fp32, places, store
from molex_kernels._triton.tiles import add_product


@triton.jit
def _merging_fwd_linear(
    x,  # [S, T, D]
    base,  # [N, D]
    deltas,  # [E, N, D]
    gates,  # [S, E] fp32
    bias,  # [S, N] fp32
    out,  # [S, T, N]
    num_segments,
    num_tokens,
    num_columns,
    num_features,
    num_experts,
    num_row_tiles,  # of all segments, or of all pairs
    NUM_UNROLLED: tl.constexpr,  # the number of experts where it is small, else 0
    IS_PAIRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_s = x_s (base + sum_e gates_se deltas_e)^T + bias_s.

    Transposed inside: a merged tile is the left operand, which need not leave the registers. What
    binds is reading base and deltas from the L2 cache, E + 1 elements for BLOCK_T tokens: the row
    tiles of all segments come one after the other for the same columns, and IS_PAIRED serves two
    segments with what is read once.
    """
    pid = tl.program_id(0)
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    row_tile = pid % num_row_tiles
    segment = int64(row_tile // tiles_t) * (2 if IS_PAIRED else 1)
    offs_t = int64(row_tile % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = int64(pid // num_row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask_n = offs_n < num_columns

    rows = at(x, offs_t[None, :], int64(offs_d)[:, None])
    x_ptrs = rows + segment * x.outer
    gate = Vec(gates.ptr + segment * gates.row, gates.col)
    base_ptrs = at(base, offs_n[:, None], offs_d[None, :])
    deltas_ptrs = at(deltas, offs_n[:, None], offs_d[None, :])
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    if IS_PAIRED:
        # The last of an odd number of segments is computed twice and stored once.
        other = tl.minimum(segment + 1, num_segments - 1)
        other_x_ptrs = rows + other * x.outer
        other_gate = Vec(gates.ptr + other * gates.row, gates.col)
        other_total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for d in range(0, num_features, BLOCK_D):
        mask_d = offs_d < num_features - d
        mask = mask_n[:, None] & mask_d[None, :]
        mask_x = mask_d[:, None] & mask_t[None, :]
        weight = load_fp32(base_ptrs, mask)
        if IS_PAIRED:
            other_weight = weight
        delta_ptrs = deltas_ptrs
        if NUM_UNROLLED > 0:
            for e in tl.static_range(NUM_UNROLLED):
                delta = load_fp32(delta_ptrs, mask)
                weight += tl.load(places(gate, e)) * delta
                if IS_PAIRED:
                    other_weight += tl.load(places(other_gate, e)) * delta
                delta_ptrs += deltas.outer
        else:
            for e in range(num_experts):
                delta = load_fp32(delta_ptrs, mask)
                weight += tl.load(places(gate, e)) * delta
                if IS_PAIRED:
                    other_weight += tl.load(places(other_gate, e)) * delta
                delta_ptrs += deltas.outer
        x_tile = tl.load(x_ptrs, mask=mask_x, other=0.0)
        total = add_product(total, weight.to(x_tile.dtype), x_tile, PRECISION)
        x_ptrs += BLOCK_D * int64(x.col)
        if IS_PAIRED:
            x_tile = tl.load(other_x_ptrs, mask=mask_x, other=0.0)
            other_weight = other_weight.to(x_tile.dtype)
            other_total = add_product(other_total, other_weight, x_tile, PRECISION)
            other_x_ptrs += BLOCK_D * int64(x.col)
        base_ptrs += BLOCK_D * int64(base.col)
        deltas_ptrs += BLOCK_D * int64(deltas.col)

    out_ptrs = at(out, offs_t[None, :], offs_n[:, None])
    mask = mask_n[:, None] & mask_t[None, :]
    if bias is not None:
        total += tl.load(at(bias, segment, offs_n), mask=mask_n, other=0.0)[:, None]
    store(out_ptrs + segment * out.outer, total, mask)
    if IS_PAIRED:
        if bias is not None:
            other_total += tl.load(at(bias, other, offs_n), mask=mask_n, other=0.0)[:, None]
        store(out_ptrs + other * out.outer, other_total, mask & (other > segment))
