"""The update, with or without the combine of the experts' outputs in front and a norm behind."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, places, store
from molex_kernels._triton.tiles import keep_mask, sum_expert_rows
from molex_kernels.ops.momentum.kernels.correction import clipped
from molex_kernels.ops.momentum.kernels.step import step_forward


@triton.jit
def _momentum_fwd(
    x,  # [T, D]
    f,  # [T, D]; the experts' rows [R, D] where there is an expert_weight
    f_prev,  # [T, D], of the rule that corrects f
    s0,  # [T, D] old states
    s1,
    s2,
    y,  # [T, D]; so are all outputs
    n0,  # new states
    n1,
    n2,
    kept,  # f after the combine and dropout
    expert_weight,  # [T, K]
    offsets_ptr,  # [E] int32
    inverse_ptr,  # [R] int64
    norm_weight,  # [D]
    norm_bias,  # [D]
    mu_ptr,  # [1]
    gamma_ptr,  # [1]
    seed_ptr,  # [] int64
    squares_ptr,  # [samples] fp32, of the norms that clip a corrected f
    num_tokens,
    num_features,
    num_experts,
    top_k,
    sample_tokens,
    threshold,
    inverse_kept,
    norm_eps,
    numbers,  # types.Coefficients
    KIND: tl.constexpr,
    NUM_STATES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = keep x - step(f, state), normalised with HAS_NORM; the new states. See step.py."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    offs_t = int64(pid // tiles_d) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = int64(pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask_d = offs_d < num_features
    mask = mask_t[:, None] & mask_d[None, :]
    rows, columns = offs_t[:, None], offs_d[None, :]
    mu, gamma = numbers.mu, numbers.gamma
    if mu_ptr is not None:
        mu = tl.load(mu_ptr).to(tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr).to(tl.float32)

    if expert_weight is not None:
        output = sum_expert_rows(
            f, expert_weight, offsets_ptr, inverse_ptr,
            offs_t, offs_d, mask_t, mask_d, num_experts, top_k, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    elif squares_ptr is not None:
        output = clipped(
            f, f_prev, squares_ptr, offs_t, mask_t, columns, mask,
            num_tokens, sample_tokens, numbers.variance_reduction,
        )  # fmt: skip
    else:
        output = load_fp32(at(f, rows, columns), mask)
    if seed_ptr is not None:
        keeps = keep_mask(tl.load(seed_ptr), rows * num_features + columns, threshold)
        output = tl.where(keeps, output * inverse_kept, 0.0)
    if kept is not None:
        store(at(kept, rows, columns), output, mask)

    old0 = tl.zeros_like(output)
    old1, old2 = old0, old0
    if s0 is not None:
        old0 = load_fp32(at(s0, rows, columns), mask)
    if s1 is not None:
        old1 = load_fp32(at(s1, rows, columns), mask)
    if s2 is not None:
        old2 = load_fp32(at(s2, rows, columns), mask)
    step, new0, new1, new2 = step_forward(output, old0, old1, old2, mu, gamma, numbers, KIND, False)
    store(at(n0, rows, columns), new0, mask)
    if NUM_STATES > 1:
        store(at(n1, rows, columns), new1, mask)
    if NUM_STATES > 2:
        store(at(n2, rows, columns), new2, mask)

    result = numbers.keep * load_fp32(at(x, rows, columns), mask) - step
    if HAS_NORM:
        mean = tl.sum(tl.where(mask, result, 0.0), axis=1) / num_features
        centred = tl.where(mask, result - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / num_features
        result = centred * (1.0 / tl.sqrt(variance + norm_eps))[:, None]
        if norm_weight is not None:
            result *= load_fp32(places(norm_weight, offs_d), mask_d)[None, :]
        if norm_bias is not None:
            result += load_fp32(places(norm_bias, offs_d), mask_d)[None, :]
    store(at(y, rows, columns), result, mask)
