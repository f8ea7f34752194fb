"""Cluster statistics: sums over the tokens of each cluster, in a fixed order.

The tokens are cut into parts, whose number depends on the shape alone. A program adds up one part's
tokens for a tile of clusters and features, as a product with the tokens' membership (0 or 1); who
needs a sum adds the parts in order. There are no atomics, and nothing depends on the order of the
programs. "pairwise" sums over values sorted within their clusters instead, tile by tile.
"""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, places
from molex_kernels._triton.tiles import rounded_product, segment_of_tile
from molex_kernels.ops.routing.kernels.products import dot_parts


@triton.jit
def _cluster_mean(sums_ptr, counts_ptr, cluster, offs_d, mask_d, D):
    """sums [C, D] and counts [C], contiguous -> mean [BLOCK_D] of one cluster."""
    count = tl.maximum(tl.load(counts_ptr + cluster), 1).to(tl.float32)
    return tl.load(sums_ptr + cluster.to(tl.int64) * D + offs_d, mask=mask_d, other=0.0) / count


@triton.jit
def _add_parts(total, pointers, mask, num_parts, size):
    """total plus the parts in order, `size` elements apart; a few loads are under way at a time."""
    for first in range(0, num_parts, 4):
        for n in tl.static_range(4):
            part = int64(first + n)
            here = mask & (part < num_parts)
            total += tl.load(pointers + part * int64(size), mask=here, other=0)
    return total


@triton.jit
def _labels(cluster, offs_t, end, first_c, num_here):
    """The place of each token's cluster among those from first_c on; -1 where it is not there."""
    label = int64(tl.load(places(cluster, offs_t), mask=offs_t < end, other=-1)) - first_c
    return tl.where((label >= 0) & (label < num_here), label, -1).to(tl.int32)


@triton.jit
def _add_tokens(
    x,  # [T, D]
    cluster,  # [T]
    mean_ptr,  # [C, D] fp32, contiguous, from first_c on; not read for STAT "sum"
    D, offs_d, mask_d, first_c, num_here, first, end,
    STAT: tl.constexpr, FINITE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_D, BLOCK_C] over the tokens [first, end) of clusters from first_c on.

    FINITE leaves out terms that are not; the second result is their number.
    """
    offs_c = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    left_out = total
    for start in range(first, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        label = _labels(cluster, offs_t, end, first_c, num_here)
        member = tl.where(label[:, None] == offs_c[None, :], 1.0, 0.0)
        # bf16 where x is: so that no other dtype need be multiplied.
        member = member.to(tl.bfloat16 if x.ptr.dtype.element_ty == tl.bfloat16 else tl.float16)
        # All tokens, so that this load does not wait for the labels.
        mask = mask_d[:, None] & (offs_t < end)[None, :]
        terms = tl.load(at(x, offs_t[None, :], offs_d[:, None]), mask=mask, other=0.0)
        if STAT != "sum":
            row = int64(tl.maximum(label, 0)) * D
            mean = tl.load(mean_ptr + row[None, :] + offs_d[:, None], mask=mask, other=0.0)
            terms = terms.to(tl.float32) - mean
            terms = tl.abs(terms) if STAT == "mad" else terms * terms
        if FINITE:
            finite = tl.abs(terms.to(tl.float32)) < float("inf")
            terms = tl.where(finite, terms, 0.0)
            left_out = tl.dot(tl.where(finite, 0.0, 1.0).to(member.dtype), member, left_out)
        if terms.dtype == member.dtype:
            total = tl.dot(terms, member, total)
        else:
            total = dot_parts(terms.to(tl.float32), member, total, PRECISION, True)
    return total, left_out


@triton.jit
def _statistics_fwd_part(
    x,  # [T, D]
    cluster,  # [T]
    sums_ptr, sum_counts_ptr,  # [parts, C, D] fp32 and [parts, C] int32; None for STAT "sum"
    partial_ptr,  # [S, C, D] fp32, contiguous
    counts_ptr,  # [S, C] int32, contiguous, or None
    T, D, num_clusters, rows, num_parts,
    STAT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tokens [s * rows, (s + 1) * rows) of part s."""
    pid_d = int64(tl.program_id(0))
    first_c = int64(tl.program_id(1)) * BLOCK_C
    split = int64(tl.program_id(2))
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_d = offs_d < D
    mask_c = offs_c < num_clusters
    mask = mask_d[:, None] & mask_c[None, :]
    tile = offs_c[None, :] * D + offs_d[:, None]
    out_ptr = partial_ptr + split * num_clusters * D
    if STAT != "sum":
        mean = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
        mean = _add_parts(mean, sums_ptr + tile, mask, num_parts, int64(num_clusters) * D)
        count = tl.zeros([BLOCK_C], tl.int32)
        count = _add_parts(count, sum_counts_ptr + offs_c, mask_c, num_parts, num_clusters)
        # Until the sums are known, their place holds the means: each token needs another one.
        mean = mean / tl.maximum(count, 1).to(tl.float32)[None, :]
        tl.store(out_ptr + tile, mean, mask=mask)
        tl.debug_barrier()

    first = split * rows
    end = tl.minimum(first + rows, T)
    num_here = tl.minimum(num_clusters - first_c, BLOCK_C)
    total, _ = _add_tokens(
        x, cluster, out_ptr + first_c * D, D, offs_d, mask_d, first_c, num_here, first, end,
        STAT, False, PRECISION, BLOCK_T, BLOCK_D, BLOCK_C,
    )  # fmt: skip
    # Times 0 what is not finite is NaN, also in the sums of other clusters: there it is left out.
    finite = (tl.abs(total) < float("inf")).to(tl.int32)
    if tl.sum(finite) < BLOCK_D * BLOCK_C:
        total, left_out = _add_tokens(
            x, cluster, out_ptr + first_c * D, D, offs_d, mask_d, first_c, num_here, first, end,
            STAT, True, PRECISION, BLOCK_T, BLOCK_D, BLOCK_C,
        )  # fmt: skip
        instead = tl.full([BLOCK_D, BLOCK_C], float("nan"), tl.float32)
        if STAT != "sum":  # from a mean that is a number it is too large for one
            mean = tl.load(out_ptr + tile, mask=mask, other=0.0)
            instead = tl.where(mean == mean, float("inf"), float("nan"))
        total = tl.where(left_out > 0, instead, total)
    if STAT != "sum":
        tl.debug_barrier()
    tl.store(out_ptr + tile, total, mask=mask)
    # Two ifs: the first one is decided at compile time.
    if counts_ptr is not None:  # noqa: SIM102
        if pid_d == 0:
            counts = tl.zeros([BLOCK_C], tl.int32)
            for start in range(first, end, BLOCK_T):
                offs_t = start + tl.arange(0, BLOCK_T)
                label = _labels(cluster, offs_t, end, first_c, num_here)
                counts += tl.histogram(label, BLOCK_C, mask=label >= 0)
            tl.store(counts_ptr + split * num_clusters + offs_c, counts, mask=mask_c)


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
            tl.sum(rounded_product(centred, coefficient[:, None]), axis=0),
            mask=mask_d,
        )


@triton.jit
def _pairwise_fwd_reduce(
    partial_ptr,  # [tiles, D] fp32, contiguous
    offsets_ptr,  # [C] int32, contiguous
    counts_ptr,  # [C] int32, contiguous
    out_ptr,  # [C, D] fp32, contiguous
    D, num_clusters,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_{i != j} |x_i - x_j| / (n - 1): the tiles of ROWS ranks, BLOCK_T at a time."""
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
    count = tl.load(counts_ptr + cluster)
    total = 2.0 * total / tl.maximum(count - 1, 1).to(tl.float32)
    tl.store(out_ptr + cluster * D + offs_d, total, mask=mask_d)


@triton.jit
def _load_weight(
    deviations_ptr, counts_ptr, offs_c, offs_d, D, num_clusters, num_parts, eps,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # [parts, C, D] fp32 and [parts, C] int32, contiguous  # fmt: skip
    """1 / (s + eps) of a tile, 0 in rows that do not count; and which rows count."""
    mask_c = offs_c < num_clusters
    mask_d = offs_d < D
    count = tl.zeros([BLOCK_C], tl.int32)
    count = _add_parts(count, counts_ptr + offs_c, mask_c, num_parts, num_clusters)
    counts_here = mask_c
    if MASKED:
        counts_here = mask_c & (count > 0)
    total = _add_parts(
        tl.zeros([BLOCK_C, BLOCK_D], tl.float32),
        deviations_ptr + int64(offs_c)[:, None] * D + offs_d[None, :],
        mask_c[:, None] & mask_d[None, :],
        num_parts,
        int64(num_clusters) * D,
    )
    weight = 1.0 / (total / tl.maximum(count, 1).to(tl.float32)[:, None] + eps)
    return tl.where(counts_here[:, None] & mask_d[None, :], weight, 0.0), counts_here


@triton.jit
def _sum_of_weights(
    deviations_ptr, counts_ptr, D, num_clusters, num_parts, eps, limit,
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
                deviations_ptr, counts_ptr, offs_c, offs_d, D, num_clusters, num_parts, eps,
                MASKED, BLOCK_D, BLOCK_C,
            )  # fmt: skip
            columns += tl.sum(tl.minimum(weight, limit, propagate_nan=tl.PropagateNan.ALL), axis=0)
            if start_d == 0:
                rows += tl.sum(present.to(tl.float32), axis=0)
    return tl.sum(columns, axis=0), tl.maximum(rows, 1.0)


@triton.jit
def _feature_weights_fwd(
    deviations_ptr,  # [parts, C, D] fp32, contiguous
    counts_ptr,  # [parts, C] int32, contiguous
    out_ptr,  # [C, D] fp32, contiguous
    D, num_clusters, num_parts, eps, clip,
    NORM: tl.constexpr, HAS_CLIP: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program writes BLOCK_D features, and adds up the global sums by itself."""
    offs_d = int64(tl.program_id(0)) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    limit = float("inf")
    total, rows = _sum_of_weights(
        deviations_ptr, counts_ptr, D, num_clusters, num_parts, eps, limit,
        MASKED, BLOCK_D, BLOCK_C,
    )  # fmt: skip
    before = total / (rows * D)
    if HAS_CLIP:
        limit = clip * before
    divisor = tl.full([BLOCK_D], 1.0, tl.float32)
    if NORM == "global_pre":
        divisor *= before
    if NORM == "global_post":
        total, rows = _sum_of_weights(
            deviations_ptr, counts_ptr, D, num_clusters, num_parts, eps, limit,
            MASKED, BLOCK_D, BLOCK_C,
        )  # fmt: skip
        divisor *= total / (rows * D)
    if NORM == "feature_post":
        column = tl.zeros([BLOCK_D], tl.float32)
        for start_c in range(0, num_clusters, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            weight, _present = _load_weight(
                deviations_ptr, counts_ptr, offs_c, offs_d, D, num_clusters, num_parts, eps,
                MASKED, BLOCK_D, BLOCK_C,
            )  # fmt: skip
            column += tl.sum(tl.minimum(weight, limit, propagate_nan=tl.PropagateNan.ALL), axis=0)
        divisor = column / rows
    for start_c in range(0, num_clusters, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        weight, present = _load_weight(
            deviations_ptr, counts_ptr, offs_c, offs_d, D, num_clusters, num_parts, eps,
            MASKED, BLOCK_D, BLOCK_C,
        )  # fmt: skip
        weight = tl.minimum(weight, limit, propagate_nan=tl.PropagateNan.ALL) / divisor[None, :]
        tl.store(
            out_ptr + offs_c.to(tl.int64)[:, None] * D + offs_d[None, :],
            tl.where(present[:, None], weight, 1.0),
            mask=(offs_c < num_clusters)[:, None] & mask_d[None, :],
        )
