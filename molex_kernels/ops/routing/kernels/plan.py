"""Stable counting sort of assignments by expert, in three launches and without a host read.

Blocks of assignments are counted, one program turns the counts into row numbers, and the blocks
scatter. Integer arithmetic only, each row written once: the result does not depend on the order in
which the programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex_kernels._triton.tuning import Config, choose

_SCAN_TILE = 16384  # counts held in registers by the scan


@triton.jit
def _load_buckets(
    index_ptr, stride_t, stride_k, total, top_k, num_experts, offs_a
):  # [T, K] -> the bucket of each assignment; the last one is for ids outside [0, E)
    mask_a = offs_a < total
    t = offs_a // top_k
    k = offs_a % top_k
    ids = tl.load(index_ptr + t * stride_t + k * stride_k, mask=mask_a, other=-1)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit
def _plan_fwd_count(
    index_ptr, stride_t, stride_k,  # [T, K] int32 or int64
    histogram_ptr, stride_h,  # [blocks, BLOCK_E] int32
    total, top_k, num_experts,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    offs_a = block * BLOCK_A + tl.arange(0, BLOCK_A)
    bucket = _load_buckets(index_ptr, stride_t, stride_k, total, top_k, num_experts, offs_a)
    # Past the end counts into the last, unused bin.
    counts = tl.histogram(tl.where(offs_a < total, bucket, BLOCK_E - 1), BLOCK_E)
    tl.store(histogram_ptr + block * stride_h + tl.arange(0, BLOCK_E), counts)


@triton.jit
def _plan_fwd_scan(
    histogram_ptr, stride_h,  # [blocks, BLOCK_E] int32: in, counts; out, see below
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
        tile = tl.load(
            histogram_ptr + rows[:, None] * stride_h + offs_e[None, :], mask=mask, other=0
        )
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
        pointers = histogram_ptr + rows[:, None] * stride_h + offs_e[None, :]
        tile = tl.load(pointers, mask=mask, other=0)
        before = tl.cumsum(tile, axis=0) - tile
        inside = tl.cumsum(tile, axis=1) - tile
        tl.store(pointers, first[None, :] + before - inside, mask=mask)
        first += tl.sum(tile, axis=0)


@triton.jit
def _plan_fwd_scatter(
    index_ptr, stride_t, stride_k,  # [T, K] int32 or int64
    shift_ptr, stride_s,  # [blocks, BLOCK_E] int32
    permutation_ptr, inverse_ptr,  # [T * K] int64, contiguous
    total, top_k, num_experts,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_A)
    offs_a = block * BLOCK_A + place
    bucket = _load_buckets(index_ptr, stride_t, stride_k, total, top_k, num_experts, offs_a)
    # Keys are distinct and carry the place, so any sort is stable; past the end sorts last.
    key = tl.where(offs_a < total, bucket, num_experts + 1) * BLOCK_A + place
    key = tl.sort(key)
    bucket = key // BLOCK_A
    assignment = block * BLOCK_A + key % BLOCK_A
    mask = bucket <= num_experts
    row = place + tl.load(shift_ptr + block * stride_s + bucket, mask=mask, other=0)
    tl.store(permutation_ptr + row, assignment, mask=mask)
    tl.store(inverse_ptr + assignment, row.to(tl.int64), mask=mask)


def launch_plan(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """counts, offsets, permutation, inverse of expert_index [T, K]."""
    total, top_k = expert_index.numel(), expert_index.shape[1]
    permutation = expert_index.new_empty(total, dtype=torch.int64)
    inverse = expert_index.new_empty(total, dtype=torch.int64)
    if total == 0:
        zeros = expert_index.new_zeros(2, num_experts, dtype=torch.int32)
        return zeros[0].clone(), zeros[1].clone(), permutation, inverse
    counts = expert_index.new_empty(num_experts, dtype=torch.int32)
    offsets = expert_index.new_empty(num_experts, dtype=torch.int32)
    # One bin for "not here" and one for past the end.
    block_e = max(64, triton.next_power_of_2(num_experts + 2))

    def launch(config: Config) -> None:
        block_a = config.blocks["BLOCK_A"]
        blocks = triton.cdiv(total, block_a)
        histogram = expert_index.new_empty(blocks, block_e, dtype=torch.int32)
        strides = expert_index.stride()
        _plan_fwd_count[(blocks,)](
            expert_index, *strides, histogram, block_e, total, top_k, num_experts,
            BLOCK_E=block_e, **config.launch_options(),
        )  # fmt: skip
        block_b = min(triton.next_power_of_2(blocks), max(1, _SCAN_TILE // block_e))
        _plan_fwd_scan[(1,)](
            histogram, block_e, counts, offsets, blocks, num_experts,
            **_scan_config(block_b, block_e).launch_options(),
        )  # fmt: skip
        _plan_fwd_scatter[(blocks,)](
            expert_index, *strides, histogram, block_e, permutation, inverse,
            total, top_k, num_experts, **config.launch_options(),
        )  # fmt: skip

    pinned = _config(total)
    candidates = [Config({"BLOCK_A": a}, num_warps=w) for a, w in ((512, 4), (1024, 4), (2048, 8))]
    shape_class = (triton.next_power_of_2(total), block_e)
    launch(choose("plan", shape_class, pinned, candidates, launch, on_gpu=expert_index.is_cuda))
    return counts, offsets, permutation, inverse


def _config(total: int) -> Config:
    """Few blocks for the scan, but enough of them to fill the machine."""
    if total <= 4096:
        return Config({"BLOCK_A": 128}, num_warps=4)
    return Config({"BLOCK_A": 1024 if total < 2**17 else 2048}, num_warps=4 if total < 2**17 else 8)


def _scan_config(block_b: int, block_e: int) -> Config:
    """As many warps as hold a tile at 32 counts a thread."""
    warps = min(16, max(4, block_b * block_e // 1024))
    return Config({"BLOCK_B": block_b, "BLOCK_E": block_e}, warps)
