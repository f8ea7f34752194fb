"""One iteration of robust attention: attention over the cleaned keys, then the next of them."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat
from molex_kernels._triton.tiles import keep_mask
from molex_kernels.ops.rpc_attention.kernels.heads import (
    block_of_head,
    load_bound,
    load_present,
    load_rows,
    of_head,
    soft,
    store_rows,
)


@triton.jit
def _rpc_fwd(
    k,  # [B, H, N, d]
    v,  # [B, H, N, d]
    q,  # [B, H, N, d] or None
    clean_ptr,  # [B, H, N, d] contiguous: cleaned keys, from the second iteration on
    next_clean_ptr,  # of the next one
    rest_ptr,  # [B, H, N, d] fp32 contiguous: u + k - S of this iteration, then of the next
    low_ptr,  # [B, H, N, d] fp32 contiguous, or None
    out_ptr,  # [B, H, N, d] contiguous
    sparse_ptr,  # [B, H, N, d] fp32 contiguous, or None
    stats_ptr,  # [2, B, H, N] fp32, or None
    bound_ptr,  # [B, H] or [B, H, N] fp32
    key_mask_ptr,  # [B, N] bool, or None
    seed_ptr,  # int64 scalar, or None
    num_heads,
    num_tokens,
    num_features,
    score_scale,  # scale / ln 2
    drop_threshold,
    keep_scale,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """L = softmax(C C^T scale) v; then u = u + k - L - S, S = soft(k - L + u), C = k - S - u."""
    block, head, num_all_heads = block_of_head(num_tokens, BLOCK_I)
    batch = head // num_heads
    own_k = Mat(of_head(k, head, num_heads), k.row, k.col)
    own_v = Mat(of_head(v, head, num_heads), v.row, v.col)
    own = head * num_tokens * num_features
    offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_d = tl.arange(0, BLOCK_D)
    mask_i = load_present(key_mask_ptr, batch, offs_i, num_tokens)
    bound = load_bound(bound_ptr, head, offs_i, mask_i, num_tokens, IS_PER_TOKEN)
    if q is not None:
        own_q = Mat(of_head(q, head, num_heads), q.row, q.col)
        attending = load_rows(own_q, offs_i, mask_i, offs_d, num_features)
    elif IS_FIRST:
        raw = load_rows(own_k, offs_i, mask_i, offs_d, num_features)
        single = raw.to(tl.float32)
        attending = (single - soft(single, bound)).to(raw.dtype)
    else:
        own_clean = Mat(clean_ptr + own, num_features, 1)
        attending = load_rows(own_clean, offs_i, mask_i, offs_d, num_features)
    if score_scale < 0:  # the largest are then the smallest
        attending = -attending
    steep = tl.abs(score_scale)

    # Finite, so that rows that have seen nothing yet stay finite.
    top = tl.full((BLOCK_I,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK_I,), tl.float32)
    low = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    end = num_tokens
    if IS_CAUSAL:
        end = tl.minimum(num_tokens, (block + 1) * BLOCK_I)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(0, end, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = load_present(key_mask_ptr, batch, offs_j, num_tokens)
        if IS_FIRST:
            keys = load_rows(own_k, offs_j, mask_j, offs_d, num_features)
            bound_j = load_bound(bound_ptr, head, offs_j, mask_j, num_tokens, IS_PER_TOKEN)
            clean = keys.to(tl.float32)
            clean = (clean - soft(clean, bound_j)).to(keys.dtype)
        else:
            own_clean = Mat(clean_ptr + own, num_features, 1)
            clean = load_rows(own_clean, offs_j, mask_j, offs_d, num_features)
        values = load_rows(own_v, offs_j, mask_j, offs_d, num_features)
        scores = tl.dot(attending, tl.trans(clean), input_precision=PRECISION)
        seen = mask_j[None, :]
        if IS_CAUSAL:
            seen = seen & (offs_j[None, :] <= offs_i[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(top, tl.max(scores, axis=1))
        # Scaled is the difference: a rounding is then a share of that, and not of the score.
        weights = tl.exp2((scores - above[:, None]) * steep)
        shrunk = tl.exp2((top - above) * steep)
        total = total * shrunk + tl.sum(weights, axis=1)
        top = above
        if seed_ptr is not None:
            position = (head * num_tokens + offs_i)[:, None] * num_tokens + offs_j[None, :]
            kept = keep_mask(seed, position, drop_threshold)
            weights = tl.where(kept, weights * keep_scale, 0.0)
        low = low * shrunk[:, None]
        low = tl.dot(weights.to(values.dtype), values, low, input_precision=PRECISION)

    total = tl.where(mask_i, total, 1.0)
    low = tl.where(mask_i[:, None], low / total[:, None], 0.0)
    inside = offs_i < num_tokens
    if stats_ptr is not None:
        # A masked row gets an infinite sum: it has no weights.
        stats_ptr += head * num_tokens
        top = tl.where(score_scale < 0, -top, top)
        tl.store(stats_ptr + offs_i, tl.where(mask_i, top, 0.0), mask=inside)
        stats_ptr += num_all_heads * num_tokens
        tl.store(stats_ptr + offs_i, tl.where(mask_i, total, float("inf")), mask=inside)
    if IS_LAST:
        store_rows(out_ptr + own, low, offs_i, inside, offs_d, num_features)
        if IS_FIRST and sparse_ptr is not None:
            key = load_rows(own_k, offs_i, mask_i, offs_d, num_features)
            sparse = soft(key.to(tl.float32), bound)
            store_rows(sparse_ptr + own, sparse, offs_i, inside, offs_d, num_features)
    else:
        if low_ptr is not None:
            store_rows(low_ptr + own, low, offs_i, inside, offs_d, num_features)
        key = load_rows(own_k, offs_i, mask_i, offs_d, num_features)
        key = key.to(tl.float32)
        if IS_FIRST:
            rest = key - soft(key, bound)
        else:
            own_rest = Mat(rest_ptr + own, num_features, 1)
            rest = load_rows(own_rest, offs_i, mask_i, offs_d, num_features)
        u = rest - low
        sparse = soft(key - low + u, bound)
        store_rows(next_clean_ptr + own, key - sparse - u, offs_i, inside, offs_d, num_features)
        store_rows(rest_ptr + own, u + key - sparse, offs_i, inside, offs_d, num_features)
        if sparse_ptr is not None:
            store_rows(sparse_ptr + own, sparse, offs_i, inside, offs_d, num_features)
