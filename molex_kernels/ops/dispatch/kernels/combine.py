"""From rows in expert order back to tokens."""

import triton
import triton.language as tl

from molex_kernels._triton.tiles import sum_expert_rows


@triton.jit
def _dispatch_fwd_combine(
    packed_ptr,  # [R, D]
    stride_pt,
    stride_pd,
    expert_weight_ptr,  # [T, K]
    stride_et,
    stride_ek,
    out_ptr,  # [T, D]
    stride_ot,
    stride_od,
    offsets_ptr,  # [E] int32
    inverse_ptr,  # [R] int64
    num_tokens,
    num_experts,
    num_features,
    top_k,
    IS_WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_t = sum_k w_tk packed[inverse_tk], in the order of k, without what is not here."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    offs_t = (pid // tiles_d).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = (pid % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask_d = offs_d < num_features
    out = sum_expert_rows(
        packed_ptr,
        stride_pt,
        stride_pd,
        expert_weight_ptr,
        stride_et,
        stride_ek,
        offsets_ptr,
        inverse_ptr,
        offs_t,
        offs_d,
        mask_t,
        mask_d,
        num_experts,
        top_k,
        IS_WEIGHTED,
        BLOCK_T,
        BLOCK_D,
    )
    out_ptrs = out_ptr + offs_t[:, None] * stride_ot + offs_d[None, :] * stride_od
    mask = mask_t[:, None] & mask_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dispatch_bwd_weight(
    partial_ptr,  # [R, column tiles] fp32
    stride_pt,
    stride_pn,
    dy_ptr,  # [T, D]
    stride_yt,
    stride_yd,
    bias_ptr,  # b_down [E, D]
    stride_be,
    stride_bd,
    out_ptr,  # [T * K]
    stride_oa,
    offsets_ptr,  # [E] int32
    inverse_ptr,  # [R] int64
    num_rows,
    num_experts,
    num_partials,
    num_features,
    top_k,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of each assignment's weight: its row's partial sums, plus <dy_t, b_down_e>."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_rows
    row = tl.load(inverse_ptr + offs_t, mask=mask_t, other=0)
    here = mask_t & (row < tl.load(offsets_ptr + num_experts - 1))
    out = tl.zeros((BLOCK_T,), tl.float32)
    stride_pn = tl.cast(stride_pn, tl.int64)
    for n in range(num_partials):
        partial_ptrs = partial_ptr + row * stride_pt + n * stride_pn
        out += tl.load(partial_ptrs, mask=here, other=0.0)
    if HAS_BIAS:
        offs_e = tl.arange(0, BLOCK_E)
        mask_e = offs_e < num_experts
        ends = tl.load(offsets_ptr + offs_e, mask=mask_e, other=0)
        before = mask_e[None, :] & (ends[None, :] <= row[:, None])
        expert = tl.sum(before.to(tl.int64), axis=1)
        token = offs_t // top_k
        stride_yd = tl.cast(stride_yd, tl.int64)
        stride_bd = tl.cast(stride_bd, tl.int64)
        offs_d = tl.arange(0, BLOCK_D)
        inner = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for d in range(0, num_features, BLOCK_D):
            offs = (d + offs_d)[None, :]
            mask = here[:, None] & (offs < num_features)
            dy_ptrs = dy_ptr + token[:, None] * stride_yt + offs * stride_yd
            bias_ptrs = bias_ptr + expert[:, None] * stride_be + offs * stride_bd
            dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
            inner += dy * tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
        out += tl.sum(inner, axis=1)
    tl.store(out_ptr + offs_t * stride_oa, out.to(out_ptr.dtype.element_ty), mask=mask_t)
