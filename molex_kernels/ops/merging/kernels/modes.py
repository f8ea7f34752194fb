"""Products along one of the four modes of tau, and their contractions.

Everything of size [E, O, D] is contiguous fp32 here, seen as [E, outer, size, inner].
"""

import triton
import triton.language as tl


@triton.jit
def _merging_fwd_mode(
    factor_ptr,  # [E, size, size]
    stride_fe,
    stride_fi,
    stride_fj,
    x_ptr,  # [E, outer, size, inner] fp32
    out_ptr,  # [E, outer, size, inner] fp32
    size,
    inner,
    num_columns,  # outer * inner
    num_experts,
    IS_ADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e, a, i, b] = sum_j factor[e, i, j] x[e, a, j, b], added to what is there if IS_ADDED.

    The indices a and b together are the columns of one product.
    """
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(size, BLOCK_I)
    expert = (pid % num_experts).to(tl.int64)
    tile = pid // num_experts
    offs_i = (tile % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_n = (tile // tiles_i).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = tl.arange(0, BLOCK_J)
    mask_i = offs_i < size
    mask_n = offs_n < num_columns
    column = (offs_n // inner) * size * inner + offs_n % inner
    start = expert * num_columns * size
    factor_ptrs = factor_ptr + expert * stride_fe + offs_i[:, None] * stride_fi
    x_ptrs = x_ptr + start + column[None, :]
    out = tl.zeros((BLOCK_I, BLOCK_N), tl.float32)
    for j in range(0, size, BLOCK_J):
        offs = j + offs_j
        mask_j = offs < size
        factor = tl.load(
            factor_ptrs + offs[None, :] * stride_fj,
            mask=mask_i[:, None] & mask_j[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptrs + offs[:, None].to(tl.int64) * inner,
            mask=mask_j[:, None] & mask_n[None, :],
            other=0.0,
        )
        out = tl.dot(factor.to(tl.float32), x, out, input_precision=PRECISION)
    out_ptrs = out_ptr + start + offs_i[:, None].to(tl.int64) * inner + column[None, :]
    mask = mask_i[:, None] & mask_n[None, :]
    if IS_ADDED:
        out += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, out, mask=mask)


@triton.jit
def _merging_bwd_mode(
    left_ptr,  # [E, outer, size, inner] fp32
    right_ptr,  # [E, outer, size, inner] fp32
    partial_ptr,  # [parts, E, size, size] fp32
    size,
    inner,
    num_columns,  # outer * inner
    num_experts,
    num_parts,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial[p, e, i, j] = sum over part p of a and b of left[e, a, i, b] right[e, a, j, b]."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(size, BLOCK_I)
    expert = (pid % num_experts).to(tl.int64)
    pid = pid // num_experts
    tile = pid % (tiles * tiles)
    part = (pid // (tiles * tiles)).to(tl.int64)
    offs_i = (tile // tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = (tile % tiles) * BLOCK_J + tl.arange(0, BLOCK_J)
    mask_i = offs_i < size
    mask_j = offs_j < size
    start = expert * num_columns * size
    left_ptrs = left_ptr + start + offs_i[:, None].to(tl.int64) * inner
    right_ptrs = right_ptr + start + offs_j[None, :].to(tl.int64) * inner
    out = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    steps = tl.cdiv(num_columns, BLOCK_N)
    per_part = tl.cdiv(steps, num_parts)
    last = tl.minimum((part + 1) * per_part, steps)
    for step in range(part * per_part, last):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_columns
        column = (offs_n // inner) * size * inner + offs_n % inner
        mask_left = mask_i[:, None] & mask_n[None, :]
        left = tl.load(left_ptrs + column[None, :], mask=mask_left, other=0.0)
        mask_right = mask_n[:, None] & mask_j[None, :]
        right = tl.load(right_ptrs + column[:, None], mask=mask_right, other=0.0)
        out = tl.dot(left, right, out, input_precision=PRECISION)
    partial_ptrs = partial_ptr + ((part * num_experts + expert) * size + offs_i[:, None]) * size
    partial_ptrs += offs_j[None, :]
    tl.store(partial_ptrs, out, mask=mask_i[:, None] & mask_j[None, :])
