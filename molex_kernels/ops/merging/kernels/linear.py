"""The product with merged weights: tiles of the weight are merged on their way in."""

import triton
import triton.language as tl


@triton.jit
def _merging_fwd_linear(
    x_ptr,  # [S, T, D]
    stride_xs,
    stride_xt,
    stride_xd,
    base_ptr,  # [N, D]
    stride_bn,
    stride_bd,
    deltas_ptr,  # [E, N, D]
    stride_de,
    stride_dn,
    stride_dd,
    gates_ptr,  # [S, E] fp32
    stride_gs,
    stride_ge,
    bias_ptr,  # [S, N] fp32
    stride_is,
    stride_in,
    out_ptr,  # [S, T, N]
    stride_os,
    stride_ot,
    stride_on,
    num_segments,
    num_tokens,
    num_columns,
    num_features,
    num_experts,
    num_row_tiles,  # of all segments, or of all pairs
    NUM_UNROLLED: tl.constexpr,  # the number of experts where it is small, else 0
    IS_PAIRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    stride_xd = tl.cast(stride_xd, tl.int64)
    stride_bd = tl.cast(stride_bd, tl.int64)
    stride_dd = tl.cast(stride_dd, tl.int64)
    stride_ge = tl.cast(stride_ge, tl.int64)
    pid = tl.program_id(0)
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    row_tile = pid % num_row_tiles
    segment = (row_tile // tiles_t).to(tl.int64) * (2 if IS_PAIRED else 1)
    offs_t = (row_tile % tiles_t).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = (pid // num_row_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask_n = offs_n < num_columns

    rows = x_ptr + offs_t[None, :] * stride_xt + offs_d[:, None] * stride_xd
    x_ptrs = rows + segment * stride_xs
    gate_ptrs = gates_ptr + segment * stride_gs
    base_ptrs = base_ptr + offs_n[:, None] * stride_bn + offs_d[None, :] * stride_bd
    deltas_ptrs = deltas_ptr + offs_n[:, None] * stride_dn + offs_d[None, :] * stride_dd
    out = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    if IS_PAIRED:
        # The last of an odd number of segments is computed twice and stored once.
        other = tl.minimum(segment + 1, num_segments - 1)
        other_x_ptrs = rows + other * stride_xs
        other_gate_ptrs = gates_ptr + other * stride_gs
        other_out = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for d in range(0, num_features, BLOCK_D):
        mask_d = offs_d < num_features - d
        mask = mask_n[:, None] & mask_d[None, :]
        mask_x = mask_d[:, None] & mask_t[None, :]
        weight = tl.load(base_ptrs, mask=mask, other=0.0).to(tl.float32)
        if IS_PAIRED:
            other_weight = weight
        delta_ptrs = deltas_ptrs
        if NUM_UNROLLED > 0:
            for e in tl.static_range(NUM_UNROLLED):
                delta = tl.load(delta_ptrs, mask=mask, other=0.0).to(tl.float32)
                weight += tl.load(gate_ptrs + e * stride_ge) * delta
                if IS_PAIRED:
                    other_weight += tl.load(other_gate_ptrs + e * stride_ge) * delta
                delta_ptrs += stride_de
        else:
            for e in range(num_experts):
                delta = tl.load(delta_ptrs, mask=mask, other=0.0).to(tl.float32)
                weight += tl.load(gate_ptrs + e * stride_ge) * delta
                if IS_PAIRED:
                    other_weight += tl.load(other_gate_ptrs + e * stride_ge) * delta
                delta_ptrs += stride_de
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        out = tl.dot(weight.to(x.dtype), x, out, input_precision=PRECISION)
        x_ptrs += BLOCK_D * stride_xd
        if IS_PAIRED:
            x = tl.load(other_x_ptrs, mask=mask_x, other=0.0)
            other_out = tl.dot(other_weight.to(x.dtype), x, other_out, input_precision=PRECISION)
            other_x_ptrs += BLOCK_D * stride_xd
        base_ptrs += BLOCK_D * stride_bd
        deltas_ptrs += BLOCK_D * stride_dd

    out_ptrs = out_ptr + offs_t[None, :] * stride_ot + offs_n[:, None] * stride_on
    mask = mask_n[:, None] & mask_t[None, :]
    if HAS_BIAS:
        bias_ptrs = bias_ptr + segment * stride_is + offs_n * stride_in
        out += tl.load(bias_ptrs, mask=mask_n, other=0.0)[:, None]
    tl.store(out_ptrs + segment * stride_os, out.to(out_ptr.dtype.element_ty), mask=mask)
    if IS_PAIRED:
        if HAS_BIAS:
            bias_ptrs = bias_ptr + other * stride_is + offs_n * stride_in
            other_out += tl.load(bias_ptrs, mask=mask_n, other=0.0)[:, None]
        other_out = other_out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + other * stride_os, other_out, mask=mask & (other > segment))
