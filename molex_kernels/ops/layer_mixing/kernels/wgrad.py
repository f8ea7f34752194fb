"""Gradients of the chosen layers' parameters: sums over rows and branches, in a fixed order."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import along, at, int64, load_fp32, nth, store
from molex_kernels._triton.tiles import add_product
from molex_kernels.ops.layer_mixing.kernels.layers import chosen_layer


@triton.jit
def _is_first_of_layer(index, g, layer, num_layers):
    """Whether no branch before g has chosen this layer."""
    earlier = 0
    for other in range(g):
        its_layer = chosen_layer(index, other, num_layers)
        earlier += (its_layer == layer).to(tl.int32)
    return earlier == 0


@triton.jit
def _layer_mixing_bwd_wgrad(
    left,  # [G, T, N]
    right,  # [G, T, D]
    index,  # [G]
    out,  # [L, N, D], zero
    parts,  # [pieces, G, N, D] fp32, or None: there is one piece
    piece_rows,
    scaling,
    num_layers,
    num_branches,
    num_tokens,
    num_columns,
    num_features,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_l = scaling * sum over the branches g of layer l of left_g^T right_g.

    Or a piece of the rows to a program: parts_pg is the unscaled sum over the rows of piece p.
    """
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    tiles = tl.cdiv(num_columns, BLOCK_N) * tiles_d
    first = pid // tiles % num_branches
    piece = pid // tiles // num_branches
    tile = pid % tiles
    layer = chosen_layer(index, first, num_layers)
    if not _is_first_of_layer(index, first, layer, num_layers):
        return
    offs_n = int64(tile // tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = int64(tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < num_columns
    mask_d = offs_d < num_features
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(first, num_branches):
        its_layer = chosen_layer(index, g, num_layers)
        num_rows = tl.where(its_layer == layer, num_tokens, 0)
        left_columns = nth(left, g) + along(offs_n[:, None], left.col)
        right_columns = nth(right, g) + along(offs_d[None, :], right.col)
        num_rows = tl.minimum(num_rows, (piece + 1) * piece_rows)
        for row in range(piece * piece_rows, num_rows, BLOCK_T):
            offs_t = row + tl.arange(0, BLOCK_T)
            mask_t = offs_t < num_rows
            offs_t = int64(offs_t)
            left_tile = tl.load(
                left_columns + along(offs_t[None, :], left.row),
                mask=mask_n[:, None] & mask_t[None, :],
                other=0.0,
            )
            right_tile = tl.load(
                right_columns + along(offs_t[:, None], right.row),
                mask=mask_t[:, None] & mask_d[None, :],
                other=0.0,
            )
            total = add_product(total, left_tile, right_tile, PRECISION)
    mask = mask_n[:, None] & mask_d[None, :]
    if parts is None:
        out_ptrs = nth(out, layer) + along(offs_n[:, None], out.row)
        store(out_ptrs + along(offs_d[None, :], out.col), scaling * total, mask)
    else:
        part_ptrs = nth(parts, piece * num_branches + first) + along(offs_n[:, None], parts.row)
        tl.store(part_ptrs + along(offs_d[None, :], parts.col), total, mask=mask)


@triton.jit
def _layer_mixing_bwd_bias(
    dy,  # [G, T, N]
    index,  # [G]
    out,  # [L, N], zero
    parts,  # [pieces, G, N] fp32, or None, as above
    piece_rows,
    num_layers,
    num_branches,
    num_tokens,
    num_columns,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out_l = sum over the branches g of layer l, and over rows, of dy_g."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(num_columns, BLOCK_N)
    first = pid // tiles % num_branches
    piece = pid // tiles // num_branches
    layer = chosen_layer(index, first, num_layers)
    if not _is_first_of_layer(index, first, layer, num_layers):
        return
    offs_n = int64(pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_columns
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for g in range(first, num_branches):
        its_layer = chosen_layer(index, g, num_layers)
        num_rows = tl.where(its_layer == layer, num_tokens, 0)
        num_rows = tl.minimum(num_rows, (piece + 1) * piece_rows)
        for row in range(piece * piece_rows, num_rows, BLOCK_T):
            offs_t = row + tl.arange(0, BLOCK_T)
            mask = (offs_t < num_rows)[:, None] & mask_n[None, :]
            dy_ptrs = nth(dy, g) + along(offs_t[:, None], dy.row)
            dy_ptrs += along(offs_n[None, :], dy.col)
            total += load_fp32(dy_ptrs, mask)
    if parts is None:
        store(at(out, layer, offs_n), tl.sum(total, axis=0), mask_n)
    else:
        part_ptrs = at(parts, piece * num_branches + first, offs_n)
        tl.store(part_ptrs, tl.sum(total, axis=0), mask=mask_n)


@triton.jit
def _layer_mixing_bwd_pieces(
    parts,  # [pieces, G, N, D] fp32
    index,  # [G]
    out,  # [L, N, D], zero
    scaling,
    num_pieces,
    num_layers,
    num_branches,
    num_columns,
    num_features,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_l = scaling * sum over the pieces p of parts_pg, g being the layer's first branch."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    tiles = tl.cdiv(num_columns, BLOCK_N) * tiles_d
    first = pid // tiles
    tile = pid % tiles
    layer = chosen_layer(index, first, num_layers)
    if not _is_first_of_layer(index, first, layer, num_layers):
        return
    offs_n = int64(tile // tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = int64(tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_n < num_columns)[:, None] & (offs_d < num_features)[None, :]
    inside = along(offs_n[:, None], parts.row) + along(offs_d[None, :], parts.col)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for piece in range(num_pieces):
        total += tl.load(nth(parts, piece * num_branches + first) + inside, mask=mask, other=0.0)
    out_ptrs = nth(out, layer) + along(offs_n[:, None], out.row)
    store(out_ptrs + along(offs_d[None, :], out.col), scaling * total, mask)
