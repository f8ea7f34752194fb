"""From rows in expert order back to tokens."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, store
from molex_kernels._triton.tiles import sum_expert_rows


@triton.jit
def _dispatch_fwd_combine(
    packed,  # [R, D]
    expert_weight,  # [T, K]; None: each row counts once
    out,  # [T, D]
    offsets_ptr,  # [E] int32
    inverse_ptr,  # [R] int64
    num_tokens,
    num_experts,
    num_features,
    top_k,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_t = sum_k w_tk packed[inverse_tk], in the order of k, over local experts."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    offs_t = int64(pid // tiles_d) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = int64(pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask_d = offs_d < num_features
    total = sum_expert_rows(
        packed, expert_weight, offsets_ptr, inverse_ptr,
        offs_t, offs_d, mask_t, mask_d, num_experts, top_k, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    store(at(out, offs_t[:, None], offs_d[None, :]), total, mask_t[:, None] & mask_d[None, :])


@triton.jit
def _dispatch_bwd_weight(
    partial,  # [R, column tiles] fp32
    dy,  # [T, D]
    bias,  # b_down [E, D]
    out_ptr,  # [T, K] contiguous
    offsets_ptr,  # [E] int32
    inverse_ptr,  # [R] int64
    num_rows,
    num_experts,
    num_partials,
    num_features,
    top_k,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of each assignment's weight: its row's partial sums, plus <dy_t, b_down_e>."""
    offs_t = int64(tl.program_id(0)) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_rows
    row = tl.load(inverse_ptr + offs_t, mask=mask_t, other=0)
    is_local = mask_t & (row < tl.load(offsets_ptr + num_experts - 1))
    total = tl.zeros((BLOCK_T,), tl.float32)
    for n in range(num_partials):
        total += tl.load(at(partial, row, int64(n)), mask=is_local, other=0.0)
    if bias is not None:
        offs_e = tl.arange(0, BLOCK_E)
        mask_e = offs_e < num_experts
        ends = tl.load(offsets_ptr + offs_e, mask=mask_e, other=0)
        before = mask_e[None, :] & (ends[None, :] <= row[:, None])
        expert = tl.sum(before.to(tl.int64), axis=1)
        token = offs_t // top_k
        offs_d = tl.arange(0, BLOCK_D)
        inner = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for d in range(0, num_features, BLOCK_D):
            offs = (d + offs_d)[None, :]
            mask = is_local[:, None] & (offs < num_features)
            dy_ptrs = at(dy, token[:, None], offs)
            bias_ptrs = at(bias, expert[:, None], offs)
            inner += load_fp32(dy_ptrs, mask) * load_fp32(bias_ptrs, mask)
        total += tl.sum(inner, axis=1)
    store(out_ptr + offs_t, total, mask_t)
