"""Stable counting sort of assignments by expert, in three launches and without a host read.

Blocks of assignments are counted, one program turns the counts into row numbers, and the blocks
scatter; where there is one block, a single launch does it all. Integer arithmetic only, each row
written once: the result does not depend on the order in which the programs run.
"""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64


@triton.jit
def _load_buckets(
    index, total, top_k, num_experts, offs_a
):  # [T, K] -> the bucket of each assignment; the last one is for ids outside [0, E)
    mask_a = offs_a < total
    ids = tl.load(at(index, offs_a // top_k, offs_a % top_k), mask=mask_a, other=-1)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit
def _plan_fwd_count(
    index,  # [T, K] int32 or int64
    histogram,  # [blocks, BLOCK_E] int32
    total, top_k, num_experts,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = int64(tl.program_id(0))
    offs_a = block * BLOCK_A + tl.arange(0, BLOCK_A)
    bucket = _load_buckets(index, total, top_k, num_experts, offs_a)
    # Past the end counts into the last, unused bin.
    counts = tl.histogram(tl.where(offs_a < total, bucket, BLOCK_E - 1), BLOCK_E)
    tl.store(at(histogram, block, tl.arange(0, BLOCK_E)), counts)


@triton.jit
def _plan_fwd_scan(
    histogram,  # [blocks, BLOCK_E] int32: in, counts; out, see below
    counts_ptr, offsets_ptr,  # [E] int32, contiguous
    num_blocks, num_experts,
    BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_e = tl.arange(0, BLOCK_E)
    offs_b = tl.arange(0, BLOCK_B).to(tl.int64)
    # The last bin holds no bucket: what _plan_fwd_count put there does not take part.
    mask_e = offs_e <= num_experts
    totals = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, num_blocks, BLOCK_B):
        rows = start + offs_b
        mask = (rows < num_blocks)[:, None] & mask_e[None, :]
        tile = tl.load(at(histogram, rows[:, None], offs_e[None, :]), mask=mask, other=0)
        totals += tl.sum(tile, axis=0)
    ends = tl.cumsum(totals, axis=0)
    is_expert = offs_e < num_experts
    tl.store(counts_ptr + offs_e, totals, mask=is_expert)
    tl.store(offsets_ptr + offs_e, ends, mask=is_expert)
    # An assignment at place p of its block sorted by bucket goes to row p + shift: the first row of
    # (bucket, block) minus the place at which the bucket starts inside the sorted block.
    first = ends - totals
    for start in range(0, num_blocks, BLOCK_B):
        rows = start + offs_b
        mask = (rows < num_blocks)[:, None] & mask_e[None, :]
        pointers = at(histogram, rows[:, None], offs_e[None, :])
        tile = tl.load(pointers, mask=mask, other=0)
        before = tl.cumsum(tile, axis=0) - tile
        inside = tl.cumsum(tile, axis=1) - tile
        tl.store(pointers, first[None, :] + before - inside, mask=mask)
        first += tl.sum(tile, axis=0)


@triton.jit
def _sorted(bucket, place, mask, num_experts, BLOCK_A: tl.constexpr):
    """A block's buckets in order, and the place from which each has come."""
    # Keys are distinct and carry the place, so any sort is stable; past the end sorts last.
    key = tl.sort(tl.where(mask, bucket, num_experts + 1) * BLOCK_A + place)
    return key // BLOCK_A, key % BLOCK_A


@triton.jit
def _plan_fwd_scatter(
    index,  # [T, K] int32 or int64
    shift,  # [blocks, BLOCK_E] int32
    permutation_ptr, inverse_ptr,  # [T * K] int64, contiguous
    total, top_k, num_experts,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    block = int64(tl.program_id(0))
    place = tl.arange(0, BLOCK_A)
    offs_a = block * BLOCK_A + place
    bucket = _load_buckets(index, total, top_k, num_experts, offs_a)
    bucket, source = _sorted(bucket, place, offs_a < total, num_experts, BLOCK_A)
    assignment = block * BLOCK_A + source
    mask = bucket <= num_experts
    row = place + tl.load(at(shift, block, bucket), mask=mask, other=0)
    tl.store(permutation_ptr + row, assignment, mask=mask)
    tl.store(inverse_ptr + assignment, row.to(tl.int64), mask=mask)


@triton.jit
def _plan_fwd_whole(
    index,  # [T, K] int32 or int64
    counts_ptr, offsets_ptr,  # [E] int32, contiguous
    permutation_ptr, inverse_ptr,  # [T * K] int64, contiguous
    total, top_k, num_experts,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """All of them in one block, whose sorted places are the rows."""
    place = tl.arange(0, BLOCK_A)
    mask = place < total
    bucket = _load_buckets(index, total, top_k, num_experts, place)
    offs_e = tl.arange(0, BLOCK_E)
    is_expert = offs_e < num_experts
    counts = tl.histogram(tl.where(mask, bucket, BLOCK_E - 1), BLOCK_E)
    tl.store(counts_ptr + offs_e, counts, mask=is_expert)
    tl.store(offsets_ptr + offs_e, tl.cumsum(counts, axis=0), mask=is_expert)
    _, assignment = _sorted(bucket, place, mask, num_experts, BLOCK_A)
    tl.store(permutation_ptr + place, assignment.to(tl.int64), mask=mask)
    tl.store(inverse_ptr + assignment, place.to(tl.int64), mask=mask)
