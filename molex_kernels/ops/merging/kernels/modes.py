"""Products along one of the four modes of tau, and their contractions.

Every [O, D] is contiguous here, seen as [outer, size, inner]; a and b are the outer and the inner
index. Inputs and intermediate results may be fp32 or the parameters' dtype, sums are fp32.
"""

import triton
import triton.language as tl


@triton.jit
def _merging_fwd_mode(
    factor_ptr,  # [r, E, size, size]
    stride_fr,
    stride_fe,
    stride_fi,
    stride_fj,
    x_ptr,  # [E, r, outer, size, inner], of which the last three are contiguous
    stride_xe,
    stride_xr,
    out_ptr,  # [E, r, outer, size, inner]; summed: [E, outer, size, inner]
    stride_oe,
    stride_or,
    size,
    inner,
    num_columns,  # outer * inner
    num_experts,
    num_ranks,
    IS_SUMMED: tl.constexpr,
    IS_ADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e, r, a, i, b] = sum_j factor[r, e, i, j] x[e, r, a, j, b].

    IS_SUMMED: of all ranks, as one product over r and j; IS_ADDED: to what is there. The indices a
    and b together are the columns.
    """
    stride_fi = tl.cast(stride_fi, tl.int64)
    stride_fj = tl.cast(stride_fj, tl.int64)
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(size, BLOCK_I)
    expert = (pid % num_experts).to(tl.int64)
    pid = pid // num_experts
    steps_j = tl.cdiv(size, BLOCK_J)
    if IS_SUMMED:
        tile = pid
        rank = tl.zeros((), tl.int64)
        steps = num_ranks * steps_j
    else:
        tile = pid // num_ranks
        rank = (pid % num_ranks).to(tl.int64)
        steps = steps_j
    offs_i = (tile % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_n = (tile // tiles_i).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = tl.arange(0, BLOCK_J)
    mask_i = offs_i < size
    mask_n = offs_n < num_columns
    column = (offs_n // inner) * size * inner + offs_n % inner
    factor_ptrs = factor_ptr + expert * stride_fe + rank * stride_fr
    factor_ptrs += offs_i[:, None] * stride_fi
    x_ptrs = x_ptr + expert * stride_xe + rank * stride_xr + column[None, :]
    out = tl.zeros((BLOCK_I, BLOCK_N), tl.float32)
    for step in range(steps):
        offs = (step % steps_j) * BLOCK_J + offs_j
        later = tl.cast(step // steps_j, tl.int64)
        mask_j = offs < size
        factor = tl.load(
            factor_ptrs + later * stride_fr + offs[None, :] * stride_fj,
            mask=mask_i[:, None] & mask_j[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptrs + later * stride_xr + offs[:, None].to(tl.int64) * inner,
            mask=mask_j[:, None] & mask_n[None, :],
            other=0.0,
        )
        out = tl.dot(factor.to(x.dtype), x, out, input_precision=PRECISION)
    out_ptrs = out_ptr + expert * stride_oe + rank * stride_or
    out_ptrs += offs_i[:, None].to(tl.int64) * inner + column[None, :]
    mask = mask_i[:, None] & mask_n[None, :]
    if IS_ADDED:
        out += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merging_bwd_mode(
    left_ptr,  # [E, r, outer, size, inner], of which the last three are contiguous
    stride_le,
    stride_lr,
    right_ptr,  # [E, r, outer, size, inner], likewise
    stride_re,
    stride_rr,
    partial_ptr,  # [parts, r, E, size, size] fp32
    size,
    inner,
    num_columns,  # outer * inner
    num_experts,
    num_ranks,
    num_parts,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial[p, r, e, i, j]: part p of the sum over a and b of
    left[e, r, a, i, b] right[e, r, a, j, b].
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(size, BLOCK_I)
    expert = (pid % num_experts).to(tl.int64)
    pid = pid // num_experts
    rank = (pid % num_ranks).to(tl.int64)
    pid = pid // num_ranks
    tile = pid % (tiles * tiles)
    part = (pid // (tiles * tiles)).to(tl.int64)
    offs_i = (tile // tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = (tile % tiles) * BLOCK_J + tl.arange(0, BLOCK_J)
    mask_i = offs_i < size
    mask_j = offs_j < size
    left_ptrs = left_ptr + expert * stride_le + rank * stride_lr
    left_ptrs += offs_i[:, None].to(tl.int64) * inner
    right_ptrs = right_ptr + expert * stride_re + rank * stride_rr
    right_ptrs += offs_j[None, :].to(tl.int64) * inner
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
        left = left.to(tl.float32)
        out = tl.dot(left, right.to(tl.float32), out, input_precision=PRECISION)
    start = ((part * num_ranks + rank) * num_experts + expert) * size
    partial_ptrs = partial_ptr + (start + offs_i[:, None]) * size + offs_j[None, :]
    tl.store(partial_ptrs, out, mask=mask_i[:, None] & mask_j[None, :])
