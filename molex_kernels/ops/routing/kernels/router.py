"""Router forward: logits and choice in one launch, with feature weights inside the GEMM."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat, at, int64, load_fp32, places
from molex_kernels._triton.tiles import add_product
from molex_kernels.ops.routing.kernels.choice import choose


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
    scaling,  # or None
    T, D, E, top_k, num_labels, num_clusters,
    SCORE: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    RENORMALIZE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits z of all experts, and the choice by them."""
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
        z = add_product(z, x_tile, gate_tile, PRECISION)
    if gate_bias is not None:
        z += load_fp32(places(gate_bias, offs_e), mask_e)[None, :]
    mask_te = mask_t[:, None] & mask_e[None, :]
    tl.store(logits_ptr + offs_t[:, None] * E + offs_e[None, :], z, mask=mask_te)
    tl.debug_barrier()  # the logits of the chosen experts are read from memory

    choose(
        z, Mat(logits_ptr, E, 1), expert_bias, None, index_ptr, weight_ptr, scaling,
        offs_t, offs_e, mask_t, mask_e, E, top_k,
        SCORE, NUM_GROUPS, TOP_GROUPS, RENORMALIZE, BLOCK_T, BLOCK_E, BLOCK_K,
    )  # fmt: skip
