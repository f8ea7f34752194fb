"""Router forward: logits, top-k and scores in one launch, with feature weights inside the GEMM."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, places


@triton.jit
def feature_weights(
    table,  # [C, D] fp32
    labels,  # [T, M]
    mix,  # [T, M] or None
    offs_t, offs_d, mask_t, mask_d, num_labels, num_clusters,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """w of a tile; 1 in place of the row of an unknown label."""
    weight = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for m in range(num_labels):
        label = int64(tl.load(at(labels, offs_t, m), mask=mask_t, other=-1))
        known = (label >= 0) & (label < num_clusters)
        row = tl.load(
            at(table, label[:, None], offs_d[None, :]),
            mask=known[:, None] & mask_d[None, :],
            other=1.0,
        )
        if mix is not None:
            share = load_fp32(at(mix, offs_t, m), mask_t)
            # An infinite share would make NaN of the 0 that x has where a block has no feature.
            row = tl.where(mask_d[None, :], row * share[:, None], 0.0)
        weight += row
    return weight


@triton.jit
def load_x(
    x,  # [T, D]
    table,  # [C, D] fp32 or None
    labels,  # [T, M] or None
    mix,  # [T, M] or None
    offs_t, offs_d, mask_t, mask_d, num_labels, num_clusters,
    UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of w * x."""
    mask = mask_t[:, None] & mask_d[None, :]
    tile = tl.load(at(x, offs_t[:, None], offs_d[None, :]), mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    if table is not None:
        tile *= feature_weights(
            table, labels, mix, offs_t, offs_d, mask_t, mask_d,
            num_labels, num_clusters, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    return tile


@triton.jit
def _router_fwd(
    x,  # [T, D]
    gate,  # [E, D]
    gate_bias,  # [E] or None
    expert_bias,  # [E] or None
    table,  # [C, D] fp32 or None
    labels,  # [T, M] or None
    mix,  # [T, M] or None
    index_ptr,  # [T, K] int64, contiguous
    weight_ptr,  # [T, K] fp32, contiguous
    logits_ptr,  # [T, E] fp32, contiguous
    T, D, E, top_k, num_labels, num_clusters,
    SCORE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits z of all experts, the top k of z or its score plus the bias, and their weights."""
    offs_t = int64(tl.program_id(0)) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask_e = offs_e < E

    z = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x_tile = load_x(
            x, table, labels, mix, offs_t, offs_d, mask_t, mask_d,
            num_labels, num_clusters, UPCAST, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        gate_tile = tl.load(
            at(gate, offs_e[None, :], offs_d[:, None]),
            mask=mask_d[:, None] & mask_e[None, :],
            other=0.0,
        )
        if UPCAST:
            gate_tile = gate_tile.to(tl.float32)
        z = tl.dot(x_tile, gate_tile, z, input_precision=PRECISION)
    if gate_bias is not None:
        z += load_fp32(places(gate_bias, offs_e), mask_e)[None, :]
    mask_te = mask_t[:, None] & mask_e[None, :]
    tl.store(logits_ptr + offs_t[:, None] * E + offs_e[None, :], z, mask=mask_te)

    probability = z
    if SCORE == "softmax":
        shifted = tl.where(mask_e[None, :], z, float("-inf"))
        shifted = tl.exp(shifted - tl.max(shifted, axis=1)[:, None])
        probability = shifted / tl.sum(shifted, axis=1)[:, None]
    key = z
    if expert_bias is not None:
        if SCORE == "softmax":
            key = probability
        if SCORE == "sigmoid":
            key = tl.sigmoid(z)
        key += load_fp32(places(expert_bias, offs_e), mask_e)[None, :]
    # Real experts are at least the lowest finite number, so they come before the padding at -inf.
    lowest = -3.4028234663852886e38
    key = tl.where(key > lowest, key, lowest)
    key = tl.where(mask_e[None, :], key, float("-inf"))

    offs_k = tl.arange(0, BLOCK_K)
    chosen = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    for k in range(top_k):
        best = tl.max(key, axis=1)
        expert = tl.min(tl.where(key == best[:, None], offs_e[None, :], BLOCK_E), axis=1)
        here = offs_e[None, :] == expert[:, None]
        value = tl.sum(tl.where(here, probability, 0.0), axis=1)
        chosen = tl.where(offs_k[None, :] == k, value[:, None], chosen)
        key = tl.where(here, float("-inf"), key)
        tl.store(index_ptr + offs_t * top_k + k, expert.to(tl.int64), mask=mask_t)

    mask_k = offs_k < top_k
    if SCORE == "sigmoid":
        chosen = tl.sigmoid(chosen)
    if SCORE == "softmax_topk":
        # The largest by hand: with an expert bias the first is not the largest logit.
        chosen = tl.exp(chosen - tl.max(chosen, axis=1)[:, None])
        chosen = chosen / tl.sum(chosen, axis=1)[:, None]
    mask_tk = mask_t[:, None] & mask_k[None, :]
    tl.store(weight_ptr + offs_t[:, None] * top_k + offs_k[None, :], chosen, mask=mask_tk)
