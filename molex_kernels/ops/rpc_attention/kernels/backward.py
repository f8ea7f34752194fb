"""The backward pass of robust attention, one iteration at a time from the last to the first."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat
from molex_kernels._triton.tiles import add_product, keep_mask, rounded_product
from molex_kernels.ops.rpc_attention.kernels.heads import (
    block_of_head,
    load_bound,
    load_present,
    load_rows,
    of_head,
    sign,
    soft,
    store_rows,
)


@triton.jit
def _rpc_bwd_rows(
    k,  # [B, H, N, d]
    dout,  # [B, H, N, d], for the last iteration
    dsparse,  # [B, H, N, d] fp32, behind the last iteration, else None
    out_ptr,  # [B, H, N, d] contiguous
    out_rest_ptr,  # like it: what its rounding took; or None
    lows_ptr,  # [iterations - 1, B, H, N, d] fp32 contiguous
    dclean_ptr,  # [B, H, N, d] fp32 contiguous: of the iteration behind
    dk_ptr,  # [B, H, N, d] fp32 contiguous, so far
    du_ptr,  # [B, H, N, d] fp32 contiguous
    dbound_ptr,  # [B, H, N] fp32, so far
    clean_ptr,  # [B, H, N, d] contiguous: of the iteration ahead
    dlow_ptr,  # [B, H, N, d] contiguous
    inner_ptr,  # [B, H, N] fp32: <dL, L>
    out_dk_ptr,  # [B, H, N, d] contiguous
    bound_ptr,  # [B, H] or [B, H, N] fp32
    key_mask_ptr,  # [B, N] bool, or None
    iteration,  # the one ahead, from 1; 0 behind the first
    num_heads,
    num_tokens,
    num_features,
    IS_LAST: tl.constexpr,  # nothing is behind
    IS_DONE: tl.constexpr,  # nothing is ahead
    IS_PER_TOKEN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Goes from one iteration's attention to that of the one before it, row by row.

    L and S are recomputed from the first iteration on, by the forward pass's arithmetic to the last
    bit: peaked weights come from differences of large scores. Behind iteration t + 1, with its dC:
    dS = -du - dC, da = [|a| >= T] dS, dk += du + dC + da, dT -= sum sign(a) da, du = du - dC + da,
    and dL of iteration t is -da - du. Carried is dk + du: du holds -dC of the iteration behind,
    which dk alone would have to lose again, and fp32 with it. Where |a| >= T, da takes dC back: the
    sums are written without what cancels.
    """
    block, head, num_all_heads = block_of_head(num_tokens, BLOCK_I)
    batch = head // num_heads
    own = head * num_tokens * num_features
    offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_i < num_tokens
    mask_i = load_present(key_mask_ptr, batch, offs_i, num_tokens)
    bound = load_bound(bound_ptr, head, offs_i, mask_i, num_tokens, IS_PER_TOKEN)
    own_k = Mat(of_head(k, head, num_heads), k.row, k.col)
    key = load_rows(own_k, offs_i, mask_i, offs_d, num_features).to(tl.float32)

    low = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    u = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    a = key
    if not IS_DONE:
        lows_ptr += own
        stride_low = num_all_heads * num_tokens * num_features
        for _ in range(1, iteration):
            sparse = soft(a, bound)
            low = load_rows(Mat(lows_ptr, num_features, 1), offs_i, mask_i, offs_d, num_features)
            u = u + key - sparse - low
            a = key - low + u
            lows_ptr += stride_low
        sparse = soft(a, bound)
        clean = key - sparse - u
        store_rows(clean_ptr + own, clean, offs_i, inside, offs_d, num_features)
        if IS_LAST:
            low = load_rows(
                Mat(out_ptr + own, num_features, 1), offs_i, mask_i, offs_d, num_features
            )
            low = low.to(tl.float32)
            if out_rest_ptr is not None:
                own_rest = Mat(out_rest_ptr + own, num_features, 1)
                low += load_rows(own_rest, offs_i, mask_i, offs_d, num_features)
        else:
            low = load_rows(Mat(lows_ptr, num_features, 1), offs_i, mask_i, offs_d, num_features)
            u = u + key - sparse - low
            a = key - low + u

    if IS_LAST:
        own_dout = Mat(of_head(dout, head, num_heads), dout.row, dout.col)
        dlow = load_rows(own_dout, offs_i, mask_i, offs_d, num_features)
        dlow = dlow.to(tl.float32)
        zeros = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
        store_rows(dk_ptr + own, zeros, offs_i, inside, offs_d, num_features)
        store_rows(du_ptr + own, zeros, offs_i, inside, offs_d, num_features)
        sums = tl.zeros((BLOCK_I,), tl.float32)
    else:
        du = load_rows(Mat(du_ptr + own, num_features, 1), offs_i, mask_i, offs_d, num_features)
        dclean = load_rows(
            Mat(dclean_ptr + own, num_features, 1), offs_i, mask_i, offs_d, num_features
        )
        dk = load_rows(Mat(dk_ptr + own, num_features, 1), offs_i, mask_i, offs_d, num_features)
        ds = -du
        if dsparse is not None:
            own_dsparse = Mat(of_head(dsparse, head, num_heads), dsparse.row, dsparse.col)
            ds += load_rows(own_dsparse, offs_i, mask_i, offs_d, num_features)
        is_inside = tl.abs(a) < bound
        da = tl.where(is_inside, 0.0, ds - dclean)
        if IS_DONE:
            dk += tl.where(is_inside, dclean, ds)
        else:
            dk += tl.where(is_inside, du, du + 2.0 * (ds - dclean))
        sums = tl.load(dbound_ptr + head * num_tokens + offs_i, mask=inside, other=0.0)
        sums -= tl.sum(sign(a) * da, axis=1)
        du = tl.where(is_inside, du - dclean, du + ds - 2.0 * dclean)
        dlow = -da - du
        if IS_DONE:
            store_rows(out_dk_ptr + own, dk, offs_i, inside, offs_d, num_features)
        else:
            store_rows(dk_ptr + own, dk, offs_i, inside, offs_d, num_features)
            store_rows(du_ptr + own, du, offs_i, inside, offs_d, num_features)
    tl.store(dbound_ptr + head * num_tokens + offs_i, sums, mask=inside)
    if not IS_DONE:
        # What the products see: the inner product has to go with it.
        dlow = dlow.to(dlow_ptr.dtype.element_ty)
        store_rows(dlow_ptr + own, dlow, offs_i, inside, offs_d, num_features)
        inner = tl.sum(rounded_product(dlow.to(tl.float32), low), axis=1)
        tl.store(inner_ptr + head * num_tokens + offs_i, inner, mask=inside)


@triton.jit
def _row_sums(shift_ptr, total_ptr, offs, inside, IS_SINGLE: tl.constexpr):
    """What makes weights of rows' scores, see `_weights`; none where there is no row."""
    shift = tl.load(shift_ptr + offs, mask=inside, other=0.0 if IS_SINGLE else float("inf"))
    return shift, tl.load(total_ptr + offs, mask=inside, other=float("inf"))


@triton.jit
def _weights(scores, shift, total, score_scale, IS_SINGLE: tl.constexpr):
    """The forward pass's softmax: in fp32 by its largest score and sum, else by one number."""
    if IS_SINGLE:
        weights = tl.exp2((scores - shift) * score_scale) / total
    else:
        weights = tl.exp2(scores * score_scale - shift)
    return weights


@triton.jit
def _rpc_bwd_attention(
    clean_ptr,  # [B, H, N, d] contiguous
    v,  # [B, H, N, d]
    q,  # [B, H, N, d] or None
    dlow_ptr,  # [B, H, N, d] contiguous
    inner_ptr,  # [B, H, N] fp32
    stats_ptr,  # [2, B, H, N] fp32
    dclean_ptr,  # [B, H, N, d] fp32 contiguous
    dv_ptr,  # [B, H, N, d] fp32 contiguous, so far
    dq_ptr,  # [B, H, N, d] fp32 contiguous, so far, or None
    key_mask_ptr,  # [B, N] bool, or None
    seed_ptr,  # int64 scalar, or None
    num_heads,
    num_tokens,
    num_features,
    scale,
    score_scale,  # scale / ln 2
    drop_threshold,
    keep_scale,
    IS_LAST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_SUM: tl.constexpr,
    AS_ROWS: tl.constexpr,
    AS_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dC and dv of a block of tokens, as rows that attend and as keys in one go.

    Without q the scores of both roles are one symmetric product:
    dC_i = scale sum_j (dZ_ij + dZ_ji) C_j,  dv_i = sum_j P_ji dL_j,  dZ = P (dL v^T - <dL, L>).
    With q the roles share nothing and are a launch each: rows give dq, keys give dC and dv.
    IS_SUM, as rows: <dL, L> once more, from the numbers that it is subtracted from. With c for what
    it was: c + sum_j P_ij (<dL_i, v_j> - c), whose terms are small where P is, and where it is not.
    """
    block, head, num_all_heads = block_of_head(num_tokens, BLOCK_I)
    batch = head // num_heads
    own = head * num_tokens * num_features
    clean_ptr += own
    dlow_ptr += own
    own_v = Mat(of_head(v, head, num_heads), v.row, v.col)
    inner_ptr += head * num_tokens
    shift_ptr = stats_ptr + head * num_tokens
    total_ptr = shift_ptr + num_all_heads * num_tokens
    IS_SINGLE: tl.constexpr = v.ptr.dtype.element_ty == tl.float32
    offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_d = tl.arange(0, BLOCK_D)
    inside = offs_i < num_tokens
    mask_i = load_present(key_mask_ptr, batch, offs_i, num_tokens)
    v_i = load_rows(own_v, offs_i, mask_i, offs_d, num_features)
    if q is not None:
        own_q = Mat(of_head(q, head, num_heads), q.row, q.col)
    if AS_ROWS and q is not None:
        own_i = load_rows(own_q, offs_i, mask_i, offs_d, num_features)
    else:
        own_i = load_rows(Mat(clean_ptr, num_features, 1), offs_i, mask_i, offs_d, num_features)
    if AS_ROWS:
        dlow_i = load_rows(Mat(dlow_ptr, num_features, 1), offs_i, mask_i, offs_d, num_features)
        shift_i, total_i = _row_sums(shift_ptr, total_ptr, offs_i, inside, IS_SINGLE)
        inner_i = tl.load(inner_ptr + offs_i, mask=inside, other=0.0)
        amiss = tl.zeros((BLOCK_I,), tl.float32)  # what inner_i lacks
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    down = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)  # gradient of own_i
    dv = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    for start in range(0, num_tokens, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        inside_j = offs_j < num_tokens
        mask_j = load_present(key_mask_ptr, batch, offs_j, num_tokens)
        if AS_KEYS and q is not None:
            other_j = load_rows(own_q, offs_j, mask_j, offs_d, num_features)
        else:
            other_j = load_rows(
                Mat(clean_ptr, num_features, 1), offs_j, mask_j, offs_d, num_features
            )
        scores = tl.dot(own_i, tl.trans(other_j), input_precision=PRECISION)
        dscores = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        if AS_ROWS:  # [i, j] is row i on key j
            v_j = load_rows(own_v, offs_j, mask_j, offs_d, num_features)
            weights = _weights(scores, shift_i[:, None], total_i[:, None], score_scale, IS_SINGLE)
            seen = mask_j[None, :]
            if IS_CAUSAL:
                seen = seen & (offs_j[None, :] <= offs_i[:, None])
            weights = tl.where(seen, weights, 0.0)
            dweights = tl.dot(dlow_i, tl.trans(v_j), input_precision=PRECISION)
            if seed_ptr is not None:
                position = (head * num_tokens + offs_i)[:, None] * num_tokens + offs_j[None, :]
                kept = keep_mask(seed, position, drop_threshold)
                dweights = tl.where(kept, dweights * keep_scale, 0.0)
            dscores += weights * (dweights - inner_i[:, None])
            if IS_SUM:
                amiss += tl.sum(dscores, axis=1)
        if AS_KEYS:  # [i, j] is row j on key i
            dlow_j = load_rows(Mat(dlow_ptr, num_features, 1), offs_j, mask_j, offs_d, num_features)
            shift_j, total_j = _row_sums(shift_ptr, total_ptr, offs_j, inside_j, IS_SINGLE)
            inner_j = tl.load(inner_ptr + offs_j, mask=inside_j, other=0.0)
            weights = _weights(scores, shift_j[None, :], total_j[None, :], score_scale, IS_SINGLE)
            if IS_CAUSAL:
                weights = tl.where(offs_i[:, None] <= offs_j[None, :], weights, 0.0)
            dweights = tl.dot(v_i, tl.trans(dlow_j), input_precision=PRECISION)
            passed = weights
            if seed_ptr is not None:
                position = (head * num_tokens + offs_j)[None, :] * num_tokens + offs_i[:, None]
                kept = keep_mask(seed, position, drop_threshold)
                dweights = tl.where(kept, dweights * keep_scale, 0.0)
                passed = tl.where(kept, weights * keep_scale, 0.0)
            dv = add_product(dv, passed.to(dlow_j.dtype), dlow_j, PRECISION)
            dscores += weights * (dweights - inner_j[None, :])
        if not IS_SUM:
            down = add_product(down, dscores.to(other_j.dtype), other_j, PRECISION)

    # A key that is not there has weights all the same: its own rows alone are made of them.
    down = tl.where(mask_i[:, None], down * scale, 0.0)
    if IS_SUM:
        tl.store(inner_ptr + offs_i, inner_i + amiss, mask=inside)
    elif AS_KEYS:
        store_rows(dclean_ptr + own, down, offs_i, inside, offs_d, num_features)
        dv = tl.where(mask_i[:, None], dv, 0.0)
        if not IS_LAST:
            dv += load_rows(
                Mat(dv_ptr + own, num_features, 1), offs_i, inside, offs_d, num_features
            )
        store_rows(dv_ptr + own, dv, offs_i, inside, offs_d, num_features)
    else:
        if not IS_LAST:
            down += load_rows(
                Mat(dq_ptr + own, num_features, 1), offs_i, inside, offs_d, num_features
            )
        store_rows(dq_ptr + own, down, offs_i, inside, offs_d, num_features)
