"""The update, with or without the combine of the experts' outputs in front and a norm behind."""

import triton
import triton.language as tl

from molex_kernels._triton.tiles import keep_mask, sum_expert_rows
from molex_kernels.ops.momentum.kernels.step import step_forward


@triton.jit
def _momentum_fwd(
    x_ptr,  # [T, D]
    stride_xt,
    stride_xd,
    f_ptr,  # [T, D]; the experts' rows [R, D] where IS_COMBINED
    stride_ft,
    stride_fd,
    s0_ptr,  # [T, D]
    stride_s0t,
    stride_s0d,
    s1_ptr,  # [T, D]
    stride_s1t,
    stride_s1d,
    s2_ptr,  # [T, D]
    stride_s2t,
    stride_s2d,
    y_ptr,  # [T, D]; so are all outputs
    stride_yt,
    stride_yd,
    n0_ptr,
    stride_n0t,
    stride_n0d,
    n1_ptr,
    stride_n1t,
    stride_n1d,
    n2_ptr,
    stride_n2t,
    stride_n2d,
    kept_ptr,  # f after the combine and dropout
    stride_kt,
    stride_kd,
    expert_weight_ptr,  # [T, K]
    stride_et,
    stride_ek,
    offsets_ptr,  # [E] int32
    inverse_ptr,  # [R] int64
    norm_weight_ptr,  # [D]
    stride_nw,
    norm_bias_ptr,  # [D]
    stride_nb,
    mu_ptr,  # [1]
    gamma_ptr,  # [1]
    seed_ptr,  # [] int64
    num_tokens,
    num_features,
    num_experts,
    top_k,
    threshold,
    inverse_kept,
    norm_eps,
    mu,
    gamma,
    beta1,
    rest1,
    beta2,
    rest2,
    beta3,
    rest3,
    alpha,
    eps,
    keep,
    scale1,
    scale2,
    KIND: tl.constexpr,
    NUM_STATES: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    IS_COMBINED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = keep x - step(f, state), normalised with HAS_NORM; the new states. See step.py."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    offs_t = (pid // tiles_d).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = (pid % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask_d = offs_d < num_features
    mask = mask_t[:, None] & mask_d[None, :]
    rows, columns = offs_t[:, None], offs_d[None, :]
    if mu_ptr is not None:
        mu = tl.load(mu_ptr).to(tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr).to(tl.float32)

    if IS_COMBINED:
        f = sum_expert_rows(
            f_ptr,
            stride_ft,
            stride_fd,
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
            True,
            BLOCK_T,
            BLOCK_D,
        )
    else:
        f = tl.load(f_ptr + rows * stride_ft + columns * stride_fd, mask=mask, other=0.0)
        f = f.to(tl.float32)
    if HAS_DROPOUT:
        kept = keep_mask(tl.load(seed_ptr), rows * num_features + columns, threshold)
        f = tl.where(kept, f * inverse_kept, 0.0)
    if HAS_KEPT:
        kept_ptrs = kept_ptr + rows * stride_kt + columns * stride_kd
        tl.store(kept_ptrs, f.to(kept_ptr.dtype.element_ty), mask=mask)

    s0 = tl.zeros_like(f)
    s1, s2 = s0, s0
    if HAS_STATE:
        s0 = tl.load(s0_ptr + rows * stride_s0t + columns * stride_s0d, mask=mask, other=0.0)
        s0 = s0.to(tl.float32)
        if NUM_STATES > 1:
            s1 = tl.load(s1_ptr + rows * stride_s1t + columns * stride_s1d, mask=mask, other=0.0)
            s1 = s1.to(tl.float32)
        if NUM_STATES > 2:
            s2 = tl.load(s2_ptr + rows * stride_s2t + columns * stride_s2d, mask=mask, other=0.0)
            s2 = s2.to(tl.float32)
    step, n0, n1, n2 = step_forward(
        f, s0, s1, s2,
        mu, gamma, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, scale1, scale2,
        KIND, False,
    )  # fmt: skip
    n0_ptrs = n0_ptr + rows * stride_n0t + columns * stride_n0d
    tl.store(n0_ptrs, n0.to(n0_ptr.dtype.element_ty), mask=mask)
    if NUM_STATES > 1:
        n1_ptrs = n1_ptr + rows * stride_n1t + columns * stride_n1d
        tl.store(n1_ptrs, n1.to(n1_ptr.dtype.element_ty), mask=mask)
    if NUM_STATES > 2:
        n2_ptrs = n2_ptr + rows * stride_n2t + columns * stride_n2d
        tl.store(n2_ptrs, n2.to(n2_ptr.dtype.element_ty), mask=mask)

    x = tl.load(x_ptr + rows * stride_xt + columns * stride_xd, mask=mask, other=0.0)
    y = keep * x.to(tl.float32) - step
    if HAS_NORM:
        mean = tl.sum(tl.where(mask, y, 0.0), axis=1) / num_features
        centred = tl.where(mask, y - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / num_features
        y = centred * (1.0 / tl.sqrt(variance + norm_eps))[:, None]
        if norm_weight_ptr is not None:
            weight = tl.load(norm_weight_ptr + offs_d * stride_nw, mask=mask_d, other=0.0)
            y *= weight.to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            bias = tl.load(norm_bias_ptr + offs_d * stride_nb, mask=mask_d, other=0.0)
            y += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows * stride_yt + columns * stride_yd
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
