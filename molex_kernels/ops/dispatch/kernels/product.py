"""Tile helpers of the grouped products."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64
from molex_kernels._triton.tiles import add_product


@triton.jit
def grouped_order(num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of this program; GROUP row tiles share their columns in the L2."""
    pid = tl.program_id(0)
    per_group = GROUP * num_column_tiles
    first = pid // per_group * GROUP
    size = tl.minimum(num_row_tiles - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def token_of_row(permutation_ptr, offs_t, mask_t, TOP_K: tl.constexpr):
    """The token whose assignment stands at these rows of the expert order; 0 where masked.

    By a number known to the compiler a division is a product and a shift.
    """
    assignment = tl.load(permutation_ptr + offs_t, mask=mask_t, other=0)
    return assignment.to(tl.int32) // TOP_K


@triton.jit
def halves(tile, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns, without a move between threads."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_T, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def multiply(
    x,  # [T, D]
    offs_t,
    mask_t,
    weight,  # [N, D]
    offs_n,
    mask_n,
    weight_blocks,  # descriptor of the stack of weights, or None; see below
    place,  # (matrix, row) of the tile there
    num_features,
    IS_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum_d x[t, d] weight[n, d] in fp32.

    The descriptor is that of [E, 1, N, D], or if IS_TRANSPOSED of [E, D, 1, N]; it has a dimension
    of 2 where a tile comes from both halves. Past an end the chip fills its blocks with zeros.
    """
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = at(x, offs_t[:, None], offs_d[None, :])
    weight_ptrs = at(weight, offs_n[None, :], offs_d[:, None])
    out = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for d in range(0, num_features, BLOCK_D):
        mask_d = offs_d < num_features - d
        x_tile = tl.load(x_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
        if weight_blocks is None:
            mask = mask_d[:, None] & mask_n[None, :]
            weight_tile = tl.load(weight_ptrs, mask=mask, other=0.0)
            weight_ptrs += BLOCK_D * int64(weight.col)
        elif IS_TRANSPOSED:
            weight_tile = weight_blocks.load([place[0], d, 0, place[1]]).reshape(BLOCK_D, BLOCK_N)
        else:
            weight_tile = weight_blocks.load([place[0], 0, place[1], d])
            weight_tile = weight_tile.reshape(BLOCK_N, BLOCK_D).T
        out = add_product(out, x_tile, weight_tile, PRECISION)
        x_ptrs += BLOCK_D * int64(x.col)
    return out
