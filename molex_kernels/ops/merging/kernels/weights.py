"""Gradients of base, deltas and gates from one product: no segment's weight gradient is stored."""

import triton
import triton.language as tl


@triton.jit
def _merging_bwd_weights(
    dy_ptr,  # [S, T, N]
    stride_ys,
    stride_yt,
    stride_yn,
    x_ptr,  # [S, T, D]
    stride_xs,
    stride_xt,
    stride_xd,
    deltas_ptr,  # [E, N, D]
    stride_de,
    stride_dn,
    stride_dd,
    gates_ptr,  # [S, E] fp32
    stride_gs,
    stride_ge,
    dbase_ptr,  # [N, D]
    stride_bn,
    stride_bd,
    ddeltas_ptr,  # [E, N, D]
    stride_ce,
    stride_cn,
    stride_cd,
    partial_ptr,  # [S, E, tiles] fp32
    stride_ps,
    stride_pe,
    stride_pt,
    num_segments,
    num_tokens,
    num_columns,
    num_features,
    num_experts,
    HAS_BASE: tl.constexpr,
    HAS_DELTAS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dW_s = dy_s^T x_s, then dbase = sum_s dW_s, ddeltas_e = sum_s gates_se dW_s and
    partial_se = <dW_s, deltas_e> over this tile, segment after segment.

    One program holds one small tile of BLOCK_E experts: dW costs one product, where a product per
    expert over scaled rows would cost E of them.
    """
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    tiles = tl.cdiv(num_columns, BLOCK_N) * tiles_d
    tile = pid % tiles
    offs_e = (pid // tiles).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n = (tile // tiles_d).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = (tile % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    mask_e = offs_e < num_experts
    mask_n = offs_n < num_columns
    mask_d = offs_d < num_features
    mask = mask_n[:, None] & mask_d[None, :]
    mask_end = mask_e[:, None, None] & mask[None, :, :]
    if HAS_GATES:
        deltas_ptrs = deltas_ptr + offs_e[:, None, None] * stride_de
        deltas_ptrs += offs_n[None, :, None] * stride_dn + offs_d[None, None, :] * stride_dd
        deltas = tl.load(deltas_ptrs, mask=mask_end, other=0.0)
    if HAS_BASE:
        dbase = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if HAS_DELTAS:
        ddeltas = tl.zeros((BLOCK_E, BLOCK_N, BLOCK_D), tl.float32)

    # One loop over segments and their rows, so that a segment's first loads do not wait for the end
    # of the one before.
    steps = tl.maximum(tl.cdiv(num_tokens, BLOCK_T), 1)
    dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for step in range(num_segments * steps):
        segment = tl.cast(step // steps, tl.int64)
        rows = (step % steps) * BLOCK_T + offs_t
        mask_t = rows < num_tokens
        rows = rows.to(tl.int64)
        dy_ptrs = dy_ptr + segment * stride_ys + rows[None, :] * stride_yt
        dy_ptrs += offs_n[:, None] * stride_yn
        dy = tl.load(dy_ptrs, mask=mask_n[:, None] & mask_t[None, :], other=0.0)
        x_ptrs = x_ptr + segment * stride_xs + rows[:, None] * stride_xt
        x_ptrs += offs_d[None, :] * stride_xd
        x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
        dweight = tl.dot(dy, x, dweight, input_precision=PRECISION)
        if step % steps == steps - 1:
            if HAS_BASE:
                dbase += dweight
            if HAS_DELTAS:
                gate_ptrs = gates_ptr + segment * stride_gs + offs_e * stride_ge
                gate = tl.load(gate_ptrs, mask=mask_e, other=0.0)
                ddeltas += gate[:, None, None] * dweight[None, :, :]
            if HAS_GATES:
                inner = tl.sum(deltas.to(tl.float32) * dweight[None, :, :], axis=2)
                partial_ptrs = partial_ptr + segment * stride_ps + offs_e * stride_pe
                partial_ptrs += tile * stride_pt
                tl.store(partial_ptrs, tl.sum(inner, axis=1), mask=mask_e)
            dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    if HAS_BASE:
        # Every group of experts has the same sum: the first writes it.
        dbase_ptrs = dbase_ptr + offs_n[:, None] * stride_bn + offs_d[None, :] * stride_bd
        first = mask & (pid < tiles)
        tl.store(dbase_ptrs, dbase.to(dbase_ptr.dtype.element_ty), mask=first)
    if HAS_DELTAS:
        ddeltas_ptrs = ddeltas_ptr + offs_e[:, None, None] * stride_ce
        ddeltas_ptrs += offs_n[None, :, None] * stride_cn + offs_d[None, None, :] * stride_cd
        tl.store(ddeltas_ptrs, ddeltas.to(ddeltas_ptr.dtype.element_ty), mask=mask_end)
