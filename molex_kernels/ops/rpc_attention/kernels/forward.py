"""One iteration of robust attention: attention over the cleaned keys, then the next of them."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat
from molex_kernels._triton.tiles import add_product, keep_mask
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
def _cleaned(keys, bound):
    """C of the first iteration: k - S."""
    single = keys.to(tl.float32)
    return (single - soft(single, bound)).to(keys.dtype)


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
    out_rest_ptr,  # like it: what its rounding took; or None
    sparse_ptr,  # [B, H, N, d] fp32 contiguous, or None
    stats_ptr,  # [2, B, H, N] fp32, or None: of the rows' scores, see `_weights` in backward.py
    bound_ptr,  # [B, H] or [B, H, N] fp32
    key_mask_ptr,  # [B, N] bool, or None
    seed_ptr,  # int64 scalar, or None
    num_heads,
    num_tokens,
    num_features,
    steep,  # |scale| / ln 2
    drop_threshold,
    keep_scale,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,  # scale < 0
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICES: tl.constexpr,  # of columns, at the end
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
    own_clean = own_k if IS_FIRST else Mat(clean_ptr + own, num_features, 1)
    if q is not None:
        own_q = Mat(of_head(q, head, num_heads), q.row, q.col)
        attending = load_rows(own_q, offs_i, mask_i, offs_d, num_features)
    else:
        attending = load_rows(own_clean, offs_i, mask_i, offs_d, num_features)
        if IS_FIRST:
            attending = _cleaned(attending, bound)

    IS_SINGLE: tl.constexpr = v.ptr.dtype.element_ty == tl.float32
    # Finite, so that rows that have seen nothing yet stay finite. In 16 bits it is scaled.
    top = tl.full((BLOCK_I,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK_I,), tl.float32)
    low = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    # Key tiles from `first` on hide something from some row; those before them are not masked.
    first = num_tokens // BLOCK_J * BLOCK_J
    end = num_tokens
    if IS_CAUSAL:
        first = (block * BLOCK_I + 1) // BLOCK_J * BLOCK_J
        end = tl.minimum(num_tokens, (block + 1) * BLOCK_I)
    if key_mask_ptr is not None:
        first = 0
    for IS_MASKED in tl.static_range(0 if key_mask_ptr is None else 1, 2):
        for start in range(first if IS_MASKED else 0, end if IS_MASKED else first, BLOCK_J):
            offs_j = start + tl.arange(0, BLOCK_J)
            mask_j = None
            if IS_MASKED:
                mask_j = load_present(key_mask_ptr, batch, offs_j, num_tokens)
            clean = load_rows(own_clean, offs_j, mask_j, offs_d, num_features)
            if IS_FIRST:
                bound_j = load_bound(bound_ptr, head, offs_j, mask_j, num_tokens, IS_PER_TOKEN)
                clean = _cleaned(clean, bound_j)
            values = load_rows(own_v, offs_j, mask_j, offs_d, num_features)
            scores = tl.dot(attending, tl.trans(clean), input_precision=PRECISION)
            if IS_NEGATIVE:  # the largest are then the smallest
                scores = -scores
            if IS_MASKED:
                seen = mask_j[None, :]
                if IS_CAUSAL:
                    seen = seen & (offs_j[None, :] <= offs_i[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            highest = tl.max(scores, axis=1)
            if IS_SINGLE:
                # Scaled is the difference: a rounding is a share of that, and not of the score.
                above = tl.maximum(top, highest)
                weights = tl.exp2((scores - above[:, None]) * steep)
                shrunk = tl.exp2((top - above) * steep)
            else:
                # A multiply-add: what the scaled maximum is rounded by is the same in all weights.
                above = tl.maximum(top, highest * steep)
                weights = tl.exp2(scores * steep - above[:, None])
                shrunk = tl.exp2(top - above)
            total = total * shrunk + tl.sum(weights, axis=1)
            top = above
            if seed_ptr is not None:
                position = (head * num_tokens + offs_i)[:, None] * num_tokens + offs_j[None, :]
                kept = keep_mask(seed, position, drop_threshold)
                weights = tl.where(kept, weights * keep_scale, 0.0)
            low = low * shrunk[:, None]
            low = add_product(low, weights.to(values.dtype), values, PRECISION)

    total = tl.where(mask_i, total, 1.0)
    low = tl.where(mask_i[:, None], low / total[:, None], 0.0)
    inside = offs_i < num_tokens
    if stats_ptr is not None:
        if IS_SINGLE:
            if IS_NEGATIVE:
                top = -top
            # A masked row gets an infinite sum: it has no weights.
            shift = tl.where(mask_i, top, 0.0)
            total = tl.where(mask_i, total, float("inf"))
        else:
            shift = tl.where(mask_i, top + tl.log2(total), float("inf"))
        stats_ptr += head * num_tokens
        tl.store(stats_ptr + offs_i, shift, mask=inside)
        stats_ptr += num_all_heads * num_tokens
        tl.store(stats_ptr + offs_i, total, mask=inside)
    _step(
        low, 0, own_k, rest_ptr, low_ptr, out_ptr, out_rest_ptr, next_clean_ptr, sparse_ptr,
        bound, own, offs_i, mask_i, num_tokens, num_features,
        IS_FIRST, IS_LAST, BLOCK_I, BLOCK_D, SLICES,
    )  # fmt: skip


@triton.jit
def _step(
    low, first_d, own_k, rest_ptr, low_ptr, out_ptr, out_rest_ptr, next_clean_ptr, sparse_ptr,
    bound, own, offs_i, mask_i, num_tokens, num_features,
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """From columns of L to what is kept of them, in slices, of which registers hold one."""
    if SLICES > 1:
        HALF: tl.constexpr = BLOCK_D // 2
        left, right = tl.split(tl.permute(tl.reshape(low, (BLOCK_I, 2, HALF)), (0, 2, 1)))
        _step(
            left, first_d, own_k, rest_ptr, low_ptr, out_ptr, out_rest_ptr, next_clean_ptr,
            sparse_ptr, bound, own, offs_i, mask_i, num_tokens, num_features,
            IS_FIRST, IS_LAST, BLOCK_I, HALF, SLICES // 2,
        )  # fmt: skip
        _step(
            right, first_d + HALF, own_k, rest_ptr, low_ptr, out_ptr, out_rest_ptr, next_clean_ptr,
            sparse_ptr, bound, own, offs_i, mask_i, num_tokens, num_features,
            IS_FIRST, IS_LAST, BLOCK_I, HALF, SLICES // 2,
        )  # fmt: skip
    else:
        offs_d = first_d + tl.arange(0, BLOCK_D)
        inside = offs_i < num_tokens
        if IS_LAST:
            store_rows(out_ptr + own, low, offs_i, inside, offs_d, num_features)
            if out_rest_ptr is not None:
                taken = low - low.to(out_ptr.dtype.element_ty).to(tl.float32)
                store_rows(out_rest_ptr + own, taken, offs_i, inside, offs_d, num_features)
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
            clean = key - sparse - u
            store_rows(next_clean_ptr + own, clean, offs_i, inside, offs_d, num_features)
            store_rows(rest_ptr + own, u + key - sparse, offs_i, inside, offs_d, num_features)
            if sparse_ptr is not None:
                store_rows(sparse_ptr + own, sparse, offs_i, inside, offs_d, num_features)
