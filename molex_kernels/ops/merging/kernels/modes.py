"""Products along one of the four modes of tau, and their contractions.

Every [O, D] is contiguous here, seen as [outer, size, inner]; a and b are the outer and the inner
index. A Mat has one such block for each expert and rank. Inputs and intermediate results may be
fp32 or the parameters' dtype, sums are fp32.
"""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import along, at, int64, load_fp32, store
from molex_kernels._triton.tiles import add_product


@triton.jit
def _merging_fwd_mode(
    factor,  # [r, E, size, size]
    x,  # [E, r, outer, size, inner] as a Mat of [outer, size, inner]
    out,  # [E, r, outer, size, inner], likewise; summed: [E, outer, size, inner]
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
    pid = tl.program_id(0)
    tiles_i = tl.cdiv(size, BLOCK_I)
    expert = int64(pid % num_experts)
    pid = pid // num_experts
    steps_j = tl.cdiv(size, BLOCK_J)
    if IS_SUMMED:
        tile = pid
        rank = tl.zeros((), tl.int64)
        steps = num_ranks * steps_j
    else:
        tile = pid // num_ranks
        rank = int64(pid % num_ranks)
        steps = steps_j
    offs_i = (tile % tiles_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_n = int64(tile // tiles_i) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = tl.arange(0, BLOCK_J)
    mask_i = offs_i < size
    mask_n = offs_n < num_columns
    column = (offs_n // inner) * size * inner + offs_n % inner
    factor_ptrs = factor.ptr + expert * factor.head + rank * factor.batch
    factor_ptrs += along(offs_i[:, None], factor.row)
    x_ptrs = at(x, expert, rank) + column[None, :]
    total = tl.zeros((BLOCK_I, BLOCK_N), tl.float32)
    for step in range(steps):
        offs = (step % steps_j) * BLOCK_J + offs_j
        later = int64(step // steps_j)
        mask_j = offs < size
        factor_tile = tl.load(
            factor_ptrs + later * factor.batch + along(offs[None, :], factor.col),
            mask=mask_i[:, None] & mask_j[None, :],
            other=0.0,
        )
        x_tile = tl.load(
            x_ptrs + later * x.col + int64(offs[:, None]) * inner,
            mask=mask_j[:, None] & mask_n[None, :],
            other=0.0,
        )
        factor_tile = factor_tile.to(x_tile.dtype)
        total = add_product(total, factor_tile, x_tile, PRECISION)
    out_ptrs = at(out, expert, rank) + (int64(offs_i[:, None]) * inner + column[None, :])
    mask = mask_i[:, None] & mask_n[None, :]
    if IS_ADDED:
        total += load_fp32(out_ptrs, mask)
    store(out_ptrs, total, mask)


@triton.jit
def _merging_bwd_mode(
    left,  # [E, r, outer, size, inner] as a Mat of [outer, size, inner]
    right,  # [E, r, outer, size, inner], likewise
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
    expert = int64(pid % num_experts)
    pid = pid // num_experts
    rank = int64(pid % num_ranks)
    pid = pid // num_ranks
    tile = pid % (tiles * tiles)
    part = int64(pid // (tiles * tiles))
    offs_i = (tile // tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = (tile % tiles) * BLOCK_J + tl.arange(0, BLOCK_J)
    mask_i = offs_i < size
    mask_j = offs_j < size
    left_ptrs = at(left, expert, rank) + int64(offs_i[:, None]) * inner
    right_ptrs = at(right, expert, rank) + int64(offs_j[None, :]) * inner
    out = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    steps = tl.cdiv(num_columns, BLOCK_N)
    per_part = tl.cdiv(steps, num_parts)
    last = tl.minimum((part + 1) * per_part, steps)
    for step in range(part * per_part, last):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_columns
        column = (offs_n // inner) * size * inner + offs_n % inner
        mask_left = mask_i[:, None] & mask_n[None, :]
        left_tile = tl.load(left_ptrs + column[None, :], mask=mask_left, other=0.0)
        mask_right = mask_n[:, None] & mask_j[None, :]
        right_tile = load_fp32(right_ptrs + column[:, None], mask_right)
        out = add_product(out, left_tile.to(tl.float32), right_tile, PRECISION)
    start = ((part * num_ranks + rank) * num_experts + expert) * size
    partial_ptrs = partial_ptr + (start + offs_i[:, None]) * size + offs_j[None, :]
    tl.store(partial_ptrs, out, mask=mask_i[:, None] & mask_j[None, :])
