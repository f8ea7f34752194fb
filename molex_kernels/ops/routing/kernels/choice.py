"""The choice of experts by a block of logits, its gradient, and both by themselves."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, places


@triton.jit
def softplus(z):
    """log(1 + e^z). With u = e^-|z|, log(1 + u) is 2 atanh(u / (2 + u)), which keeps a small u."""
    u = tl.exp(-tl.abs(z))
    r = u / (2.0 + u)
    s = r * r
    p = s * (1.0 / 17.0) + 1.0 / 15.0
    p = p * s + 1.0 / 13.0
    p = p * s + 1.0 / 11.0
    p = p * s + 1.0 / 9.0
    p = p * s + 1.0 / 7.0
    p = p * s + 1.0 / 5.0
    p = p * s + 1.0 / 3.0
    return tl.maximum(z, 0.0) + (2.0 * r + 2.0 * r * s * p)


@triton.jit
def elementwise(z, SCORE: tl.constexpr):
    """A score that is one logit's alone; the logit itself for the others."""
    found = z
    if SCORE == "sigmoid":
        found = tl.sigmoid(z)
    if SCORE == "sqrtsoftplus":
        found = softplus(z)
        least = 1.1754943508222875e-38
        found = tl.sqrt(tl.where(found < least, least, found))
    return found


@triton.jit
def keep_groups(
    key, offs_e, E,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The keys, -inf outside the groups with the largest sum of their two best ones."""
    lowest = -3.4028234663852886e38
    size = E // NUM_GROUPS
    group = offs_e // size
    sums = tl.full([BLOCK_T, BLOCK_E], float("-inf"), tl.float32)  # of each expert's group
    for g in range(NUM_GROUPS):
        member = (group == g)[None, :]
        left = tl.where(member, key, float("-inf"))
        total = tl.max(left, axis=1)
        if size > 1:
            first = tl.min(tl.where(left == total[:, None], offs_e[None, :], BLOCK_E), axis=1)
            left = tl.where(offs_e[None, :] == first[:, None], float("-inf"), left)
            total += tl.max(left, axis=1)
        total = tl.where(total > lowest, total, lowest)
        sums = tl.where(member, total[:, None], sums)
    kept = tl.full([BLOCK_T, BLOCK_E], float("-inf"), tl.float32)
    for _ in range(TOP_GROUPS):
        best = tl.max(sums, axis=1)
        first = tl.min(tl.where(sums == best[:, None], offs_e[None, :], BLOCK_E), axis=1)
        here = group[None, :] == (first // size)[:, None]
        kept = tl.where(here, key, kept)
        sums = tl.where(here, float("-inf"), sums)
    return kept


@triton.jit
def _larger_first(a, b):
    swapped = b > a
    return tl.where(swapped, b, a), tl.where(swapped, a, b)


@triton.jit
def _four_ranks(number, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK_T, BLOCK_E] -> four quarters, of which each column descends from one to the next."""
    quarters = tl.reshape(number, [BLOCK_T, 2, 2, BLOCK_E // 4])
    even, odd = tl.split(tl.permute(quarters, (0, 3, 1, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    a, b = _larger_first(a, b)
    c, d = _larger_first(c, d)
    a, c = _larger_first(a, c)
    b, d = _larger_first(b, d)
    b, c = _larger_first(b, c)
    return a, b, c, d


@triton.jit
def _largest(key, top_k, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_T, BLOCK_K] int32: the experts with the largest keys, descending; ties to the lower.

    A key, which is no NaN, and its expert are one integer, so one maximum finds both. Of many
    experts four share a column that is in order: the maximum is of the first ones alone.
    """
    bits = (key + 0.0).to(tl.int32, bitcast=True)  # -0 equals 0
    # Negative floats grow downwards as integers.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    behind = BLOCK_E - 1 - tl.arange(0, BLOCK_E)
    first = (ordered.to(tl.int64) << 32) | behind.to(tl.int64)[None, :]
    if BLOCK_E >= 64:
        first, second, third, fourth = _four_ranks(first, BLOCK_T, BLOCK_E)
    lowest = -(2**63)
    offs_k = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for k in range(top_k):
        best = tl.max(first, axis=1)
        here = first == best[:, None]
        if BLOCK_E >= 64:
            first = tl.where(here, second, first)
            second = tl.where(here, third, second)
            third = tl.where(here, fourth, third)
            fourth = tl.where(here, lowest, fourth)
        else:
            first = tl.where(here, lowest, first)
        expert = BLOCK_E - 1 - (best & 0xFFFFFFFF).to(tl.int32)
        chosen = tl.where(offs_k[None, :] == k, expert[:, None], chosen)
    return chosen


@triton.jit
def choose(
    z,  # [BLOCK_T, BLOCK_E] fp32
    logits,  # [T, E] fp32: the same in memory
    expert_bias,  # [E] or None
    given,  # [T, K] or None
    index_ptr,  # [T, K] int64, contiguous
    weight_ptr,  # [T, K] fp32, contiguous
    scaling,  # or None
    offs_t, offs_e, mask_t, mask_e, E, top_k,
    SCORE: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The top k of the logits or their scores plus the bias, or those given, and their weights.

    The index of a given expert outside [0, E) is -1.
    """
    if SCORE == "softmax":
        shifted = tl.where(mask_e[None, :], z, float("-inf"))
        largest = tl.max(shifted, axis=1)[:, None]
        shifted = tl.exp(shifted - largest)
        total = tl.sum(shifted, axis=1)[:, None]
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < top_k
    mask_tk = mask_t[:, None] & mask_k[None, :]
    if given is None:
        key = z
        if expert_bias is not None:
            key = shifted / total if SCORE == "softmax" else elementwise(z, SCORE)
            key += load_fp32(places(expert_bias, offs_e), mask_e)[None, :]
        # Real experts are at least the lowest finite number: they come before the padding at -inf.
        lowest = -3.4028234663852886e38
        key = tl.where(key > lowest, key, lowest)
        key = tl.where(mask_e[None, :], key, float("-inf"))
        if TOP_GROUPS < NUM_GROUPS:
            key = keep_groups(key, offs_e, E, NUM_GROUPS, TOP_GROUPS, BLOCK_T, BLOCK_E)
        expert = _largest(key, top_k, BLOCK_T, BLOCK_E, BLOCK_K).to(tl.int64)
        known = mask_k[None, :]
    else:
        expert = int64(tl.load(at(given, offs_t[:, None], offs_k[None, :]), mask=mask_tk, other=-1))
        known = (expert >= 0) & (expert < E)
        expert = tl.where(known, expert, -1)
    tl.store(index_ptr + offs_t[:, None] * top_k + offs_k[None, :], expert, mask=mask_tk)

    chosen = tl.load(at(logits, offs_t[:, None], expert), mask=mask_tk & known, other=0.0)
    if SCORE == "softmax" and not RENORMALIZE:
        chosen = tl.exp(chosen - largest) / total
    if SCORE == "sigmoid" and RENORMALIZE:
        chosen = -softplus(-chosen)
    elif SCORE != "softmax" and SCORE != "softmax_topk":
        chosen = elementwise(chosen, SCORE)
    if SCORE == "softmax_topk" or (RENORMALIZE and (SCORE == "softmax" or SCORE == "sigmoid")):
        # Over their sum, softmax and sigmoid are a softmax of their logarithms, which has no 0/0.
        # The largest by hand: with an expert bias the first is not the largest logit.
        chosen = tl.where(known, chosen, float("-inf"))
        chosen = tl.exp(chosen - tl.max(chosen, axis=1)[:, None])
        chosen = chosen / tl.sum(chosen, axis=1)[:, None]
    elif RENORMALIZE:
        over = tl.sum(tl.where(known, chosen, 0.0), axis=1)
        chosen = chosen / tl.where(mask_t, over, 1.0)[:, None]
    if scaling is not None:
        chosen *= scaling
    if given is not None:
        chosen = tl.where(known, chosen, 0.0)
    tl.store(weight_ptr + offs_t[:, None] * top_k + offs_k[None, :], chosen, mask=mask_tk)


@triton.jit
def _choice_fwd(
    logits,  # [T, E] fp32
    expert_bias,  # [E] or None
    given,  # [T, K] or None
    index_ptr,  # [T, K] int64, contiguous
    weight_ptr,  # [T, K] fp32, contiguous
    scaling,  # or None
    T, E, top_k,
    SCORE: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The choice by logits that are in memory."""
    offs_t = int64(tl.program_id(0)) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask_e = offs_e < E
    z = load_fp32(at(logits, offs_t[:, None], offs_e[None, :]), mask_t[:, None] & mask_e[None, :])
    choose(
        z, logits, expert_bias, given, index_ptr, weight_ptr, scaling,
        offs_t, offs_e, mask_t, mask_e, E, top_k,
        SCORE, NUM_GROUPS, TOP_GROUPS, RENORMALIZE, BLOCK_T, BLOCK_E, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _router_bwd_logits(
    dweight,  # [T, K] or None
    dlogits,  # [T, E] or None
    logits_ptr, index_ptr, weight_ptr,  # [T, E], [T, K], [T, K], contiguous
    dz_ptr,  # [T, E] fp32, contiguous
    scaling, inverse,  # and 1 / scaling, or None
    T, E, top_k,
    SCORE: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dz: through the scores of the chosen experts, plus the gradient of the logits themselves."""
    offs_t = int64(tl.program_id(0)) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask_e = offs_e < E
    mask = mask_t[:, None] & mask_e[None, :]

    dz = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if dweight is not None:
        dot = tl.zeros([BLOCK_T], tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
        if RENORMALIZE or SCORE == "softmax" or SCORE == "softmax_topk":
            for k in range(top_k):
                grad = tl.load(at(dweight, offs_t, k), mask=mask_t, other=0.0)
                dot += grad * tl.load(weight_ptr + offs_t * top_k + k, mask=mask_t, other=0.0)
                if SCORE == "logits":
                    expert = tl.load(index_ptr + offs_t * top_k + k, mask=mask_t, other=-1)
                    total += tl.load(logits_ptr + offs_t * E + expert, mask=expert >= 0, other=0.0)
        total = tl.where(mask_t, total, 1.0)
        # Of the scores before scaling.
        mean = dot
        if inverse is not None:
            mean = dot * inverse
        for k in range(top_k):
            grad = tl.load(at(dweight, offs_t, k), mask=mask_t, other=0.0)
            weight = tl.load(weight_ptr + offs_t * top_k + k, mask=mask_t, other=0.0)
            expert = tl.load(index_ptr + offs_t * top_k + k, mask=mask_t, other=-1)
            if SCORE == "softmax_topk" or (RENORMALIZE and SCORE == "softmax"):
                value = weight * (grad - mean)
            elif SCORE == "softmax":
                value = grad * weight
            elif SCORE == "logits":  # a weight over its logit would be 0/0 at 0
                value = grad
                if scaling is not None:
                    value *= scaling
                if RENORMALIZE:
                    value = (value - dot) / total
            elif SCORE == "sigmoid" and not RENORMALIZE:
                one = weight
                if inverse is not None:
                    one *= inverse
                value = grad * weight * (1.0 - one)
            else:
                z = tl.load(logits_ptr + offs_t * E + expert, mask=expert >= 0, other=0.0)
                if SCORE == "sigmoid":
                    rate = tl.sigmoid(-z)
                else:
                    least = 1.1754943508222875e-38
                    plus = softplus(z)
                    rate = tl.sigmoid(z) / (2.0 * tl.where(plus > least, plus, 1.0))
                    rate = tl.where(plus > least, rate, 0.0)
                if RENORMALIZE:
                    grad -= mean
                value = weight * (grad * rate)
            dz += tl.where(offs_e[None, :] == expert[:, None], value[:, None], 0.0)
        if SCORE == "softmax" and not RENORMALIZE:
            z = tl.load(
                logits_ptr + offs_t[:, None] * E + offs_e[None, :], mask=mask, other=float("-inf")
            )
            z = tl.where(mask_t[:, None], z, 0.0)
            z = tl.exp(z - tl.max(z, axis=1)[:, None])
            dz -= z / tl.sum(z, axis=1)[:, None] * dot[:, None]
    if dlogits is not None:
        dz += tl.load(at(dlogits, offs_t[:, None], offs_e[None, :]), mask=mask, other=0.0)
    tl.store(dz_ptr + offs_t[:, None] * E + offs_e[None, :], dz, mask=mask)
