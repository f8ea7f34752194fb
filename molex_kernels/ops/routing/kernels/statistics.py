"""Cluster statistics: segmented sums over tokens grouped by cluster, in a fixed order.

Every cluster's rows are cut into tiles; each tile leaves a partial sum, and the partial sums of a
cluster are added in order. There are no atomics, and nothing depends on the order of the programs.
"""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, places
from molex_kernels._triton.tiles import segment_of_tile


@triton.jit
def _cluster_mean(sums_ptr, counts_ptr, cluster, offs_d, mask_d, D):
    """sums [C, D] and counts [C], contiguous -> mean [BLOCK_D] of one cluster."""
    count = tl.maximum(tl.load(counts_ptr + cluster), 1).to(tl.float32)
    return tl.load(sums_ptr + cluster.to(tl.int64) * D + offs_d, mask=mask_d, other=0.0) / count


@triton.jit
def _statistics_fwd_tile(
    x,  # [T, D]
    permutation_ptr,  # [T] int64, contiguous: tokens in the order of their clusters
    offsets_ptr,  # [C] int32, contiguous
    sums_ptr, counts_ptr,  # [C, D] fp32 and [C] int32, contiguous; None for STAT "sum"
    partial_ptr,  # [tiles, D] fp32, contiguous
    D, num_clusters,
    STAT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile = int64(tl.program_id(0))
    offs_d = int64(tl.program_id(1)) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    cluster, first, end = segment_of_tile(offsets_ptr, num_clusters, tile, BLOCK_T, BLOCK_C)
    if cluster < num_clusters:
        rows = first + tl.arange(0, BLOCK_T)
        mask_t = rows < end
        token = tl.load(permutation_ptr + rows, mask=mask_t, other=0)
        mask = mask_t[:, None] & mask_d[None, :]
        terms = load_fp32(at(x, token[:, None], offs_d[None, :]), mask)
        if STAT != "sum":
            mean = _cluster_mean(sums_ptr, counts_ptr, cluster, offs_d, mask_d, D)
            terms = tl.where(mask, terms - mean[None, :], 0.0)
            terms = tl.abs(terms) if STAT == "mad" else terms * terms
        tl.store(partial_ptr + tile * D + offs_d, tl.sum(terms, axis=0), mask=mask_d)


@triton.jit
def _pairwise_fwd_keys(
    x,  # [T, D]
    cluster,  # [T]
    keys_ptr,  # [D, T] int64, contiguous
    T, D, num_clusters,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """cluster << 32 | the value's bits, mapped so that they sort as the values do."""
    offs_t = int64(tl.program_id(0)) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = int64(tl.program_id(1)) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < T
    mask = mask_t[:, None] & (offs_d < D)[None, :]
    label = int64(tl.load(places(cluster, offs_t), mask=mask_t, other=0))
    label = tl.where((label >= 0) & (label < num_clusters), label, num_clusters)
    value = load_fp32(at(x, offs_t[:, None], offs_d[None, :]), mask)
    bits = value.to(tl.int32, bitcast=True)
    # Negative floats grow downwards as integers; the shift by 2^31 makes the low word unsigned.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    pointers = keys_ptr + offs_d[None, :] * T + offs_t[:, None]
    tl.store(pointers, (label[:, None] << 32) + ordered, mask=mask)


@triton.jit
def _pairwise_fwd_tile(
    keys_ptr,  # [D, T] int64, contiguous, sorted along T
    offsets_ptr,  # [C] int32, contiguous
    sums_ptr, counts_ptr,  # [C, D] fp32 and [C] int32, contiguous
    partial_ptr,  # [tiles, D] fp32, contiguous
    T, D, num_clusters,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_r (2r - n + 1) (x_(r) - mean) over a tile of ranks r."""
    tile = int64(tl.program_id(0))
    offs_d = int64(tl.program_id(1)) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    cluster, first, end = segment_of_tile(offsets_ptr, num_clusters, tile, BLOCK_T, BLOCK_C)
    if cluster < num_clusters:
        rows = first + tl.arange(0, BLOCK_T)
        mask = (rows < end)[:, None] & mask_d[None, :]
        key = tl.load(keys_ptr + offs_d[None, :] * T + rows[:, None], mask=mask, other=0)
        ordered = ((key & 0xFFFFFFFF) - 2147483648).to(tl.int32)
        bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        mean = _cluster_mean(sums_ptr, counts_ptr, cluster, offs_d, mask_d, D)
        centred = tl.where(mask, bits.to(tl.float32, bitcast=True) - mean[None, :], 0.0)
        count = tl.load(counts_ptr + cluster)
        rank = rows - (end - count)
        coefficient = (2 * rank - count + 1).to(tl.float32)
        tl.store(
            partial_ptr + tile * D + offs_d,
            tl.sum(coefficient[:, None] * centred, axis=0),
            mask=mask_d,
        )


@triton.jit
def _statistics_fwd_reduce(
    partial_ptr,  # [tiles, D] fp32, contiguous
    offsets_ptr,  # [C] int32, contiguous
    counts_ptr,  # [C] int32, contiguous; None unless PAIRWISE
    out_ptr,  # [C, D] fp32, contiguous
    D, num_clusters,
    PAIRWISE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the tiles of ROWS tokens of one cluster, BLOCK_T tiles at a time."""
    cluster = int64(tl.program_id(0))
    offs_d = int64(tl.program_id(1)) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_clusters
    ends = tl.load(offsets_ptr + offs_c, mask=mask_c, other=0)
    starts = tl.load(offsets_ptr + offs_c - 1, mask=mask_c & (offs_c > 0), other=0)
    tiles = tl.where(mask_c, (ends - starts + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(offs_c < cluster, tiles, 0), axis=0)
    end = first + tl.sum(tl.where(offs_c == cluster, tiles, 0), axis=0)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask = (rows < end)[:, None] & mask_d[None, :]
        part = tl.load(partial_ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        total += tl.sum(part, axis=0)
    if PAIRWISE:
        count = tl.load(counts_ptr + cluster)
        total = 2.0 * total / tl.maximum(count - 1, 1).to(tl.float32)
    tl.store(out_ptr + cluster * D + offs_d, total, mask=mask_d)


@triton.jit
def _load_weight(
    deviations_ptr, counts_ptr, offs_c, offs_d, D, num_clusters, eps, MASKED: tl.constexpr
):  # [C, D] fp32 and [C] int32, contiguous
    """1 / (s + eps) of a tile, 0 in rows that do not count; and which rows count."""
    mask_c = offs_c < num_clusters
    mask_d = offs_d < D
    count = tl.load(counts_ptr + offs_c, mask=mask_c, other=0)
    counts_here = mask_c
    if MASKED:
        counts_here = mask_c & (count > 0)
    total = tl.load(
        deviations_ptr + offs_c.to(tl.int64)[:, None] * D + offs_d[None, :],
        mask=mask_c[:, None] & mask_d[None, :],
        other=0.0,
    )
    weight = 1.0 / (total / tl.maximum(count, 1).to(tl.float32)[:, None] + eps)
    return tl.where(counts_here[:, None] & mask_d[None, :], weight, 0.0), counts_here


@triton.jit
def _sum_of_weights(
    deviations_ptr, counts_ptr, D, num_clusters, eps, limit,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of min(weight, limit) over all rows that count, and the number of those rows."""
    columns = tl.zeros([BLOCK_D], tl.float32)
    rows = 0.0
    for start_c in range(0, num_clusters, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            weight, present = _load_weight(
                deviations_ptr, counts_ptr, offs_c, offs_d, D, num_clusters, eps, MASKED
            )
            columns += tl.sum(tl.minimum(weight, limit, propagate_nan=tl.PropagateNan.ALL), axis=0)
            if start_d == 0:
                rows += tl.sum(present.to(tl.float32), axis=0)
    return tl.sum(columns, axis=0), tl.maximum(rows, 1.0)


@triton.jit
def _feature_weights_fwd(
    deviations_ptr,  # [C, D] fp32, contiguous
    counts_ptr,  # [C] int32, contiguous
    out_ptr,  # [C, D] fp32, contiguous
    D, num_clusters, eps, clip,
    NORM: tl.constexpr, HAS_CLIP: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program writes BLOCK_D features, and adds up the global sums by itself."""
    offs_d = int64(tl.program_id(0)) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    limit = float("inf")
    total, rows = _sum_of_weights(
        deviations_ptr, counts_ptr, D, num_clusters, eps, limit, MASKED, BLOCK_D, BLOCK_C
    )
    before = total / (rows * D)
    if HAS_CLIP:
        limit = clip * before
    divisor = tl.full([BLOCK_D], 1.0, tl.float32)
    if NORM == "global_pre":
        divisor *= before
    if NORM == "global_post":
        total, rows = _sum_of_weights(
            deviations_ptr, counts_ptr, D, num_clusters, eps, limit, MASKED, BLOCK_D, BLOCK_C
        )
        divisor *= total / (rows * D)
    if NORM == "feature_post":
        column = tl.zeros([BLOCK_D], tl.float32)
        for start_c in range(0, num_clusters, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            weight, _present = _load_weight(
                deviations_ptr, counts_ptr, offs_c, offs_d, D, num_clusters, eps, MASKED
            )
            column += tl.sum(tl.minimum(weight, limit, propagate_nan=tl.PropagateNan.ALL), axis=0)
        divisor = column / rows
    for start_c in range(0, num_clusters, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        weight, present = _load_weight(
            deviations_ptr, counts_ptr, offs_c, offs_d, D, num_clusters, eps, MASKED
        )
        weight = tl.minimum(weight, limit, propagate_nan=tl.PropagateNan.ALL) / divisor[None, :]
        tl.store(
            out_ptr + offs_c.to(tl.int64)[:, None] * D + offs_d[None, :],
            tl.where(present[:, None], weight, 1.0),
            mask=(offs_c < num_clusters)[:, None] & mask_d[None, :],
        )
