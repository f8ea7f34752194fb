"""The vote of all tokens for a layer."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, places


@triton.jit
def _first_largest(values, offs, mask, axis: tl.constexpr, NONE: tl.constexpr):
    """The lowest place of the largest value, whatever the reduction's order; NaN is the largest.

    Where the mask is False there is no value; NONE is larger than every place.
    """
    is_nan = mask & (values != values)
    largest = tl.max(
        tl.where(mask & (values == values), values, float("-inf")), axis=axis, keep_dims=True
    )
    has_nan = tl.max(is_nan.to(tl.int32), axis=axis, keep_dims=True) > 0
    candidates = tl.where(has_nan, is_nan, mask & (values == largest))
    return tl.min(tl.where(candidates, offs, NONE), axis=axis)


@triton.jit
def _layer_mixing_fwd_vote(
    logits,  # [T, L]
    token_mask,  # [T] bool
    out_ptr,  # [] int64; where there are several programs [programs, L] fp32
    num_tokens,
    num_layers,
    own_tokens,  # of a program, a multiple of BLOCK_T
    MODE: tl.constexpr,
    IS_PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """argmax_l of the tokens' summed scores; each of several programs has those of its tokens."""
    first = tl.program_id(0) * own_tokens
    offs_l = tl.arange(0, BLOCK_L)
    mask_l = offs_l < num_layers
    scores = tl.zeros((BLOCK_L,), tl.float32)
    for t in range(first, tl.minimum(first + own_tokens, num_tokens), BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        counted = offs_t < num_tokens
        ptrs = at(logits, int64(offs_t)[:, None], offs_l[None, :])
        values = load_fp32(ptrs, counted[:, None] & mask_l[None, :])
        if token_mask is not None:
            given = tl.load(places(token_mask, offs_t), mask=counted, other=0)
            counted = counted & (given != 0)
        values = tl.where(mask_l[None, :], values, float("-inf"))
        if MODE == "mode":
            best = _first_largest(values, offs_l[None, :], mask_l[None, :], 1, BLOCK_L)
            score = (offs_l[None, :] == best[:, None]).to(tl.float32)
        elif MODE == "mean_softmax":
            score = tl.exp(values - tl.max(values, axis=1)[:, None])
            score = score / tl.sum(score, axis=1)[:, None]
        else:
            score = 1.0 / (1.0 + tl.exp(-values))
        scores += tl.sum(tl.where(counted[:, None], score, 0.0), axis=0)
    if IS_PART:
        tl.store(out_ptr + tl.program_id(0) * num_layers + offs_l, scores, mask=mask_l)
    else:
        _store_winner(out_ptr, scores, offs_l, mask_l, BLOCK_L)


@triton.jit
def _layer_mixing_fwd_winner(
    parts_ptr,  # [P, L] fp32
    out_ptr,  # [] int64
    num_parts,
    num_layers,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """argmax_l of the programs' sums."""
    offs_l = tl.arange(0, BLOCK_L)
    mask_l = offs_l < num_layers
    scores = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        places = offs_p[:, None] * num_layers + offs_l[None, :]
        mask = (offs_p < num_parts)[:, None] & mask_l[None, :]
        scores += tl.sum(tl.load(parts_ptr + places, mask=mask, other=0.0), axis=0)
    _store_winner(out_ptr, scores, offs_l, mask_l, BLOCK_L)


@triton.jit
def _store_winner(out_ptr, scores, offs_l, mask_l, BLOCK_L: tl.constexpr):
    winner = _first_largest(scores, offs_l, mask_l, 0, BLOCK_L)
    tl.store(out_ptr, winner.to(tl.int64))
