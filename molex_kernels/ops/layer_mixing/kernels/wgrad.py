"""Gradients of the chosen layers' parameters: sums over rows and branches, in a fixed order."""

import triton
import triton.language as tl

from molex_kernels.ops.layer_mixing.kernels.layers import chosen_layer


@triton.jit
def _is_first_of_layer(index_ptr, stride_ig, g, layer, num_layers):
    """Whether no branch before g has chosen this layer."""
    earlier = 0
    for other in range(g):
        its_layer, _ = chosen_layer(index_ptr, stride_ig, other, num_layers)
        earlier += (its_layer == layer).to(tl.int32)
    return earlier == 0


@triton.jit
def _layer_mixing_bwd_wgrad(
    left_ptr,  # [G, T, N]
    stride_lg,
    stride_lt,
    stride_ln,
    right_ptr,  # [G, T, D]
    stride_rg,
    stride_rt,
    stride_rd,
    index_ptr,  # [G]
    stride_ig,
    out_ptr,  # [L, N, D], zero
    stride_ol,
    stride_on,
    stride_od,
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
    """out_l = scaling * sum over the branches g of layer l of left_g^T right_g."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    tiles = tl.cdiv(num_columns, BLOCK_N) * tiles_d
    first = pid // tiles
    tile = pid % tiles
    layer, _ = chosen_layer(index_ptr, stride_ig, first, num_layers)
    if not _is_first_of_layer(index_ptr, stride_ig, first, layer, num_layers):
        return
    offs_n = (tile // tiles_d).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = (tile % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n = offs_n < num_columns
    mask_d = offs_d < num_features
    out = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(first, num_branches):
        its_layer, _ = chosen_layer(index_ptr, stride_ig, g, num_layers)
        num_rows = tl.where(its_layer == layer, num_tokens, 0)
        left = left_ptr + tl.cast(g, tl.int64) * stride_lg + offs_n[:, None] * stride_ln
        right = right_ptr + tl.cast(g, tl.int64) * stride_rg + offs_d[None, :] * stride_rd
        for row in range(0, num_rows, BLOCK_T):
            offs_t = row + tl.arange(0, BLOCK_T)
            mask_t = offs_t < num_rows
            offs_t = offs_t.to(tl.int64)
            mask = mask_n[:, None] & mask_t[None, :]
            left_tile = tl.load(left + offs_t[None, :] * stride_lt, mask=mask, other=0.0)
            mask = mask_t[:, None] & mask_d[None, :]
            right_tile = tl.load(right + offs_t[:, None] * stride_rt, mask=mask, other=0.0)
            out = tl.dot(left_tile, right_tile, out, input_precision=PRECISION)
    out_ptrs = out_ptr + layer * stride_ol + offs_n[:, None] * stride_on
    out_ptrs += offs_d[None, :] * stride_od
    out = (scaling * out).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=mask_n[:, None] & mask_d[None, :])


@triton.jit
def _layer_mixing_bwd_bias(
    dy_ptr,  # [G, T, N]
    stride_yg,
    stride_yt,
    stride_yn,
    index_ptr,  # [G]
    stride_ig,
    out_ptr,  # [L, N], zero
    stride_ol,
    stride_on,
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
    first = pid // tiles
    layer, _ = chosen_layer(index_ptr, stride_ig, first, num_layers)
    if not _is_first_of_layer(index_ptr, stride_ig, first, layer, num_layers):
        return
    offs_n = (pid % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_columns
    out = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for g in range(first, num_branches):
        its_layer, _ = chosen_layer(index_ptr, stride_ig, g, num_layers)
        num_rows = tl.where(its_layer == layer, num_tokens, 0)
        for row in range(0, num_rows, BLOCK_T):
            offs_t = row + tl.arange(0, BLOCK_T)
            mask = (offs_t < num_rows)[:, None] & mask_n[None, :]
            dy_ptrs = dy_ptr + tl.cast(g, tl.int64) * stride_yg
            dy_ptrs += offs_t.to(tl.int64)[:, None] * stride_yt + offs_n[None, :] * stride_yn
            out += tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + layer * stride_ol + offs_n * stride_on
    tl.store(out_ptrs, tl.sum(out, axis=0).to(out_ptr.dtype.element_ty), mask=mask_n)
