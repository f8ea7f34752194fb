"""The update backwards: the step is computed anew rather than kept."""

import triton
import triton.language as tl

from molex_kernels._triton.tiles import keep_mask
from molex_kernels.ops.momentum.kernels.step import step_backward, step_forward


@triton.jit
def _load(ptr, stride_t, stride_d, rows, columns, mask):
    return tl.load(ptr + rows * stride_t + columns * stride_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _operands(
    f_ptr, stride_ft, stride_fd, s0_ptr, stride_s0t, stride_s0d,
    s1_ptr, stride_s1t, stride_s1d, s2_ptr, stride_s2t, stride_s2d,
    rows, columns, mask, NUM_STATES: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """f and the old states, 0 where there are none."""
    f = _load(f_ptr, stride_ft, stride_fd, rows, columns, mask)
    s0 = tl.zeros_like(f)
    s1, s2 = s0, s0
    if HAS_STATE:
        s0 = _load(s0_ptr, stride_s0t, stride_s0d, rows, columns, mask)
        if NUM_STATES > 1:
            s1 = _load(s1_ptr, stride_s1t, stride_s1d, rows, columns, mask)
        if NUM_STATES > 2:
            s2 = _load(s2_ptr, stride_s2t, stride_s2d, rows, columns, mask)
    return f, s0, s1, s2


@triton.jit
def _store(ptr, stride_t, stride_d, rows, columns, mask, value):
    tl.store(ptr + rows * stride_t + columns * stride_d, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _momentum_bwd(
    dy_ptr,  # [T, D]; so is everything down to d2
    stride_yt,
    stride_yd,
    g0_ptr,  # gradients of the new states
    stride_g0t,
    stride_g0d,
    g1_ptr,
    stride_g1t,
    stride_g1d,
    g2_ptr,
    stride_g2t,
    stride_g2d,
    x_ptr,
    stride_xt,
    stride_xd,
    f_ptr,  # the new state where FROM_STATE
    stride_ft,
    stride_fd,
    s0_ptr,
    stride_s0t,
    stride_s0d,
    s1_ptr,
    stride_s1t,
    stride_s1d,
    s2_ptr,
    stride_s2t,
    stride_s2d,
    dx_ptr,
    stride_dxt,
    stride_dxd,
    df_ptr,
    stride_dft,
    stride_dfd,
    d0_ptr,
    stride_d0t,
    stride_d0d,
    d1_ptr,
    stride_d1t,
    stride_d1d,
    d2_ptr,
    stride_d2t,
    stride_d2d,
    norm_weight_ptr,  # [D]
    stride_nw,
    norm_parts_ptr,  # [2, programs, D] fp32: of the norm's weight and bias
    number_parts_ptr,  # [2, programs] fp32: of mu and gamma
    mu_ptr,  # [1]
    gamma_ptr,  # [1]
    seed_ptr,  # [] int64
    num_tokens,
    num_features,
    num_tiles,
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
    HAS_FORWARD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    FROM_STATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of x, f and the states; sums over this program's tiles for the parameters.

    HAS_FORWARD: the step is needed. Without, the gradients depend on the upstream ones alone.
    """
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    if mu_ptr is not None:
        mu = tl.load(mu_ptr).to(tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    dmu_sum = 0.0
    dgamma_sum = 0.0
    for tile in range(pid, num_tiles, num_programs):
        offs_t = (tile // tiles_d).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_d = (tile % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < num_features
        mask = (offs_t < num_tokens)[:, None] & mask_d[None, :]
        rows, columns = offs_t[:, None], offs_d[None, :]
        dy = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        zero = dy
        if dy_ptr is not None:
            dy = _load(dy_ptr, stride_yt, stride_yd, rows, columns, mask)
        if HAS_NORM:
            f, s0, s1, s2 = _operands(
                f_ptr, stride_ft, stride_fd, s0_ptr, stride_s0t, stride_s0d,
                s1_ptr, stride_s1t, stride_s1d, s2_ptr, stride_s2t, stride_s2d,
                rows, columns, mask, NUM_STATES, HAS_STATE,
            )  # fmt: skip
            step, _, _, _ = step_forward(
                f, s0, s1, s2,
                mu, gamma, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, scale1, scale2,
                KIND, FROM_STATE,
            )  # fmt: skip
            y = keep * _load(x_ptr, stride_xt, stride_xd, rows, columns, mask) - step
            mean = tl.sum(tl.where(mask, y, 0.0), axis=1) / num_features
            centred = tl.where(mask, y - mean[:, None], 0.0)
            variance = tl.sum(centred * centred, axis=1) / num_features
            inverse = (1.0 / tl.sqrt(variance + norm_eps))[:, None]
            normed = centred * inverse
            dweight += tl.sum(dy * normed, axis=0)
            dbias += tl.sum(dy, axis=0)
            if norm_weight_ptr is not None:
                weight = tl.load(norm_weight_ptr + offs_d * stride_nw, mask=mask_d, other=0.0)
                dy *= weight.to(tl.float32)[None, :]
            along = tl.sum(dy * normed, axis=1) / num_features
            mean_dy = tl.sum(dy, axis=1) / num_features
            dy = inverse * (dy - normed * along[:, None] - mean_dy[:, None])
            dy = tl.where(mask, dy, 0.0)  # past the row's end a root of 0 would divide it
        if dx_ptr is not None:
            _store(dx_ptr, stride_dxt, stride_dxd, rows, columns, mask, keep * dy)
        f, s0, s1, s2, n0, n1, n2 = zero, zero, zero, zero, zero, zero, zero
        if HAS_FORWARD:
            # Read again rather than held through the norm's sums: registers are scarcer than cache.
            f, s0, s1, s2 = _operands(
                f_ptr, stride_ft, stride_fd, s0_ptr, stride_s0t, stride_s0d,
                s1_ptr, stride_s1t, stride_s1d, s2_ptr, stride_s2t, stride_s2d,
                rows, columns, mask, NUM_STATES, HAS_STATE,
            )  # fmt: skip
            _, n0, n1, n2 = step_forward(
                f, s0, s1, s2,
                mu, gamma, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, scale1, scale2,
                KIND, FROM_STATE,
            )  # fmt: skip
        g0, g1, g2 = zero, zero, zero
        if g0_ptr is not None:
            g0 = _load(g0_ptr, stride_g0t, stride_g0d, rows, columns, mask)
        if g1_ptr is not None:
            g1 = _load(g1_ptr, stride_g1t, stride_g1d, rows, columns, mask)
        if g2_ptr is not None:
            g2 = _load(g2_ptr, stride_g2t, stride_g2d, rows, columns, mask)
        df, d0, d1, d2, dmu, dgamma = step_backward(
            -dy, f, s0, n0, n1, n2, g0, g1, g2,
            mu, gamma, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, scale1, scale2,
            KIND,
        )  # fmt: skip
        if df_ptr is not None:
            if HAS_DROPOUT:
                kept = keep_mask(tl.load(seed_ptr), rows * num_features + columns, threshold)
                df = tl.where(kept, df * inverse_kept, 0.0)
            _store(df_ptr, stride_dft, stride_dfd, rows, columns, mask, df)
        if d0_ptr is not None:
            _store(d0_ptr, stride_d0t, stride_d0d, rows, columns, mask, d0)
        if d1_ptr is not None:
            _store(d1_ptr, stride_d1t, stride_d1d, rows, columns, mask, d1)
        if d2_ptr is not None:
            _store(d2_ptr, stride_d2t, stride_d2d, rows, columns, mask, d2)
        if number_parts_ptr is not None:
            dmu_sum += tl.sum(tl.where(mask, dmu, 0.0))
            dgamma_sum += tl.sum(tl.where(mask, dgamma, 0.0))
    if norm_parts_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < num_features
        ptrs = norm_parts_ptr + pid.to(tl.int64) * num_features + offs_d
        tl.store(ptrs, dweight, mask=mask_d)
        ptrs += num_programs.to(tl.int64) * num_features
        tl.store(ptrs, dbias, mask=mask_d)
    if number_parts_ptr is not None:
        tl.store(number_parts_ptr + pid, dmu_sum)
        tl.store(number_parts_ptr + num_programs + pid, dgamma_sum)
