"""The update backwards: the step is computed anew rather than kept."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, places, store
from molex_kernels._triton.tiles import keep_mask
from molex_kernels.ops.momentum.kernels.correction import clipped
from molex_kernels.ops.momentum.kernels.step import step_backward, step_forward


@triton.jit
def _operands(
    f, f_prev, squares_ptr, s0, s1, s2, offs_t, mask_t, columns, mask,
    num_tokens, sample_tokens, weight,
):  # fmt: skip
    """f, corrected where there are squares, and the old states, 0 where there are none."""
    rows = offs_t[:, None]
    if squares_ptr is not None:
        output = clipped(
            f, f_prev, squares_ptr, offs_t, mask_t, columns, mask, num_tokens, sample_tokens, weight
        )
    else:
        output = load_fp32(at(f, rows, columns), mask)
    old0 = tl.zeros_like(output)
    old1, old2 = old0, old0
    if s0 is not None:
        old0 = load_fp32(at(s0, rows, columns), mask)
    if s1 is not None:
        old1 = load_fp32(at(s1, rows, columns), mask)
    if s2 is not None:
        old2 = load_fp32(at(s2, rows, columns), mask)
    return output, old0, old1, old2


@triton.jit
def _upstream(g, rows, columns, mask, zero):
    """A gradient from above, 0 where there is none."""
    loaded = zero
    if g is not None:
        loaded = load_fp32(at(g, rows, columns), mask)
    return loaded


@triton.jit
def _momentum_bwd(
    dy,  # [T, D]; so is everything down to d2
    g0,  # gradients of the new states
    g1,
    g2,
    x,
    f,  # the new state where FROM_STATE; None: the gradients depend on the upstream ones alone
    f_prev,  # of the rule that corrects f
    s0,  # old states
    s1,
    s2,
    dx,
    df,  # with squares: the gradient of the corrected and clipped f
    d0,  # gradients of the old states
    d1,
    d2,
    norm_weight,  # [D]
    norm_parts_ptr,  # [2, programs, D] fp32: of the norm's weight and bias
    number_parts_ptr,  # [2, programs] fp32: of mu and gamma
    mu_ptr,  # [1]
    gamma_ptr,  # [1]
    seed_ptr,  # [] int64
    squares_ptr,  # [samples] fp32, of the norms that clip a corrected f
    product_parts_ptr,  # [tiles of a row, T] fp32: of that f and its gradient
    num_tokens,
    num_features,
    num_tiles,
    sample_tokens,
    threshold,
    inverse_kept,
    norm_eps,
    numbers,  # types.Coefficients
    KIND: tl.constexpr,
    NUM_STATES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FROM_STATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of x, f and the states; sums over this program's tiles for the parameters."""
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    mu, gamma = numbers.mu, numbers.gamma
    if mu_ptr is not None:
        mu = tl.load(mu_ptr).to(tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    dmu_sum = 0.0
    dgamma_sum = 0.0
    for tile in range(pid, num_tiles, num_programs):
        offs_t = int64(tile // tiles_d) * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_d = int64(tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < num_features
        mask_t = offs_t < num_tokens
        mask = mask_t[:, None] & mask_d[None, :]
        rows, columns = offs_t[:, None], offs_d[None, :]
        zero = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        d = _upstream(dy, rows, columns, mask, zero)
        if HAS_NORM:
            output, old0, old1, old2 = _operands(
                f, f_prev, squares_ptr, s0, s1, s2, offs_t, mask_t, columns, mask,
                num_tokens, sample_tokens, numbers.variance_reduction,
            )  # fmt: skip
            step, _, _, _ = step_forward(
                output, old0, old1, old2, mu, gamma, numbers, KIND, FROM_STATE
            )
            y = numbers.keep * load_fp32(at(x, rows, columns), mask) - step
            mean = tl.sum(tl.where(mask, y, 0.0), axis=1) / num_features
            centred = tl.where(mask, y - mean[:, None], 0.0)
            variance = tl.sum(centred * centred, axis=1) / num_features
            inverse = (1.0 / tl.sqrt(variance + norm_eps))[:, None]
            normed = centred * inverse
            dweight += tl.sum(d * normed, axis=0)
            dbias += tl.sum(d, axis=0)
            if norm_weight is not None:
                d *= load_fp32(places(norm_weight, offs_d), mask_d)[None, :]
            along = tl.sum(d * normed, axis=1) / num_features
            mean_d = tl.sum(d, axis=1) / num_features
            d = inverse * (d - normed * along[:, None] - mean_d[:, None])
            d = tl.where(mask, d, 0.0)  # past the row's end a root of 0 would divide it
        if dx is not None:
            passed = numbers.keep * d
            store(at(dx, rows, columns), passed, mask)
        output, old0, old1, old2, new0, new1, new2 = zero, zero, zero, zero, zero, zero, zero
        if f is not None:
            # Read again rather than held through the norm's sums: registers are scarcer than cache.
            output, old0, old1, old2 = _operands(
                f, f_prev, squares_ptr, s0, s1, s2, offs_t, mask_t, columns, mask,
                num_tokens, sample_tokens, numbers.variance_reduction,
            )  # fmt: skip
            _, new0, new1, new2 = step_forward(
                output, old0, old1, old2, mu, gamma, numbers, KIND, FROM_STATE
            )
        above0 = _upstream(g0, rows, columns, mask, zero)
        above1 = _upstream(g1, rows, columns, mask, zero)
        above2 = _upstream(g2, rows, columns, mask, zero)
        doutput, dold0, dold1, dold2, dmu, dgamma = step_backward(
            -d, output, old0, new0, new1, new2, above0, above1, above2, mu, gamma, numbers, KIND
        )
        if df is not None:
            if seed_ptr is not None:
                keeps = keep_mask(tl.load(seed_ptr), rows * num_features + columns, threshold)
                doutput = tl.where(keeps, doutput * inverse_kept, 0.0)
            store(at(df, rows, columns), doutput, mask)
        if product_parts_ptr is not None:
            product = tl.sum(tl.where(mask, doutput * output, 0.0), axis=1)
            ptrs = product_parts_ptr + int64(tile % tiles_d) * num_tokens + offs_t
            tl.store(ptrs, product, mask=mask_t)
        if d0 is not None:
            store(at(d0, rows, columns), dold0, mask)
        if d1 is not None:
            store(at(d1, rows, columns), dold1, mask)
        if d2 is not None:
            store(at(d2, rows, columns), dold2, mask)
        if number_parts_ptr is not None:
            dmu_sum += tl.sum(tl.where(mask, dmu, 0.0))
            dgamma_sum += tl.sum(tl.where(mask, dgamma, 0.0))
    if norm_parts_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < num_features
        ptrs = norm_parts_ptr + int64(pid) * num_features + offs_d
        tl.store(ptrs, dweight, mask=mask_d)
        ptrs += int64(num_programs) * num_features
        tl.store(ptrs, dbias, mask=mask_d)
    if number_parts_ptr is not None:
        tl.store(number_parts_ptr + pid, dmu_sum)
        tl.store(number_parts_ptr + num_programs + pid, dgamma_sum)
