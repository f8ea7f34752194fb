"""Products of branches with the weights of their chosen layers, adapters included."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat, along, at, int64, load_fp32, nth, store
from molex_kernels._triton.tiles import add_product
from molex_kernels.ops.layer_mixing.kernels.layers import (
    along_steps,
    chosen_layer,
    layer_ptr,
)


@triton.jit
def _layer_mixing_fwd_linear(
    x,  # [G, T, D]
    index,  # [G]
    weight,  # [L, N, D], or the first layer's where there is a table
    weight_table_ptr,  # [L] int64
    bias,  # [L, 1, N], likewise
    bias_table_ptr,
    a,  # [L, r, D], likewise
    a_table_ptr,
    b,  # [L, N, r], likewise
    b_table_ptr,
    out,  # [G, T, N]; [1, T, N] where summed
    scaling,
    num_layers,
    num_summed,  # branches to a program: all of them, or 1
    num_tokens,
    num_columns,
    num_features,
    rank,
    IS_ALIGNED: tl.constexpr,
    ADAPTERS_ALIGNED: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out_g = x_g W_l^T + bias_l + scaling (x_g A_l^T) B_l^T, or its sum over the branches.

    The first BLOCK_R ranks of x A^T are accumulated beside x W^T, from the same tiles of x. The
    rank, and the strides of A and B that are not 1, are multiples of STEP: as much of an adapter
    moves at a time, whatever the alignment of W.
    """
    pid = tl.program_id(0)
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    tiles = tiles_t * tl.cdiv(num_columns, BLOCK_N)
    first = int64(pid // tiles)
    tile = pid % tiles
    offs_t = int64(tile % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = int64(tile // tiles_t) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask_n = offs_n < num_columns
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for g in range(first, first + num_summed):
        layer = chosen_layer(index, g, num_layers)
        rows = nth(x, g) + along(offs_t[:, None], x.row)
        x_ptrs = rows + along(offs_d[None, :], x.col)
        own = Mat(layer_ptr(weight, weight_table_ptr, layer, IS_ALIGNED), weight.row, weight.col)
        weight_ptrs = at(own, offs_n[None, :], offs_d[:, None])
        if a is not None:
            offs_r = tl.arange(0, BLOCK_R)
            mask_r = offs_r // STEP < rank // STEP
            first_a = layer_ptr(a, a_table_ptr, layer, ADAPTERS_ALIGNED)
            a_columns = first_a + along_steps(offs_d[:, None], a.col, STEP)
            a_ptrs = a_columns + along_steps(offs_r[None, :], a.row, STEP)
            down = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for d in range(0, num_features, BLOCK_D):
            mask_d = offs_d < num_features - d
            x_tile = tl.load(x_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
            mask = mask_d[:, None] & mask_n[None, :]
            weight_tile = tl.load(weight_ptrs, mask=mask, other=0.0).to(x_tile.dtype)
            total = add_product(total, x_tile, weight_tile, PRECISION)
            if a is not None:
                a_tile = tl.load(a_ptrs, mask=mask_d[:, None] & mask_r[None, :], other=0.0)
                down = add_product(down, x_tile, a_tile.to(x_tile.dtype), PRECISION)
                a_ptrs += along_steps(BLOCK_D, a.col, STEP)
            x_ptrs += BLOCK_D * int64(x.col)
            weight_ptrs += BLOCK_D * int64(weight.col)
        if a is not None:
            first_b = layer_ptr(b, b_table_ptr, layer, ADAPTERS_ALIGNED)
            b_columns = first_b + along_steps(offs_n[None, :], b.row, STEP)
            for r in range(0, rank, BLOCK_R):
                offs_r = r + tl.arange(0, BLOCK_R)
                mask_r = offs_r // STEP < rank // STEP
                if r > 0:
                    down = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
                    for d in range(0, num_features, BLOCK_D):
                        mask_d = offs_d < num_features - d
                        mask = mask_t[:, None] & mask_d[None, :]
                        x_ptrs = rows + along((d + offs_d)[None, :], x.col)
                        x_tile = tl.load(x_ptrs, mask=mask, other=0.0)
                        a_ptrs = a_columns + along_steps(d, a.col, STEP)
                        a_ptrs += along_steps(offs_r[None, :], a.row, STEP)
                        mask = mask_d[:, None] & mask_r[None, :]
                        a_tile = tl.load(a_ptrs, mask=mask, other=0.0).to(x_tile.dtype)
                        down = add_product(down, x_tile, a_tile, PRECISION)
                b_ptrs = b_columns + along_steps(offs_r[:, None], b.col, STEP)
                b_tile = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
                kept = (scaling * down).to(x.ptr.dtype.element_ty)
                total = add_product(total, kept, b_tile.to(kept.dtype), PRECISION)
        if bias is not None:
            bias_ptrs = layer_ptr(bias, bias_table_ptr, layer, False) + along(offs_n, bias.col)
            total += load_fp32(bias_ptrs, mask_n)[None, :]
    own_out = Mat(nth(out, first), out.row, out.col)
    out_ptrs = at(own_out, offs_t[:, None], offs_n[None, :])
    store(out_ptrs, total, mask_t[:, None] & mask_n[None, :])
