"""Products of branches with the weights of their chosen layers, adapters included."""

import triton
import triton.language as tl

from molex_kernels.ops.layer_mixing.kernels.layers import chosen_layer, layer_start


@triton.jit
def _layer_mixing_fwd_linear(
    x_ptr,  # [G, T, D]
    stride_xg,
    stride_xt,
    stride_xd,
    index_ptr,  # [G]
    stride_ig,
    weight_ptr,  # [L, N, D], or the first layer's where there is a table
    stride_wl,
    stride_wn,
    stride_wd,
    weight_table_ptr,  # [L] int64
    bias_ptr,  # [L, N]
    stride_bl,
    stride_bn,
    bias_table_ptr,
    a_ptr,  # [L, r, D]
    stride_al,
    stride_ar,
    stride_ad,
    a_table_ptr,
    b_ptr,  # [L, N, r]
    stride_cl,
    stride_cn,
    stride_cr,
    b_table_ptr,
    out_ptr,  # [G, T, N]; [1, T, N] where summed
    stride_og,
    stride_ot,
    stride_on,
    flag_ptr,  # [1] int32
    scaling,
    num_layers,
    num_summed,  # branches to a program: all of them, or 1
    num_tokens,
    num_columns,
    num_features,
    rank,
    IS_ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out_g = x_g W_l^T + bias_l + scaling (x_g A_l^T) B_l^T, or its sum over the branches.

    The first BLOCK_R ranks of x A^T are accumulated beside x W^T, from the same tiles of x.
    """
    stride_xd = tl.cast(stride_xd, tl.int64)
    stride_wd = tl.cast(stride_wd, tl.int64)
    stride_ad = tl.cast(stride_ad, tl.int64)
    stride_ar = tl.cast(stride_ar, tl.int64)
    stride_cr = tl.cast(stride_cr, tl.int64)
    pid = tl.program_id(0)
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    tiles = tiles_t * tl.cdiv(num_columns, BLOCK_N)
    first = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    offs_t = (tile % tiles_t).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = (tile // tiles_t).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask_n = offs_n < num_columns
    out = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for g in range(first, first + num_summed):
        layer, is_outside = chosen_layer(index_ptr, stride_ig, g, num_layers)
        tl.store(flag_ptr, 1, mask=is_outside)
        rows = x_ptr + g * stride_xg + offs_t[:, None] * stride_xt
        x_ptrs = rows + offs_d[None, :] * stride_xd
        start = layer_start(weight_ptr, stride_wl, weight_table_ptr, layer, IS_ALIGNED)
        weight_ptrs = weight_ptr + start + offs_n[None, :] * stride_wn + offs_d[:, None] * stride_wd
        if a_ptr is not None:
            offs_r = tl.arange(0, BLOCK_R)
            mask_r = offs_r < rank
            a_start = layer_start(a_ptr, stride_al, a_table_ptr, layer, IS_ALIGNED)
            a_columns = a_ptr + a_start + offs_d[:, None] * stride_ad
            a_ptrs = a_columns + offs_r[None, :] * stride_ar
            down = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for d in range(0, num_features, BLOCK_D):
            mask_d = offs_d < num_features - d
            x = tl.load(x_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
            mask = mask_d[:, None] & mask_n[None, :]
            weight = tl.load(weight_ptrs, mask=mask, other=0.0).to(x.dtype)
            out = tl.dot(x, weight, out, input_precision=PRECISION)
            if a_ptr is not None:
                a = tl.load(a_ptrs, mask=mask_d[:, None] & mask_r[None, :], other=0.0).to(x.dtype)
                down = tl.dot(x, a, down, input_precision=PRECISION)
                a_ptrs += BLOCK_D * stride_ad
            x_ptrs += BLOCK_D * stride_xd
            weight_ptrs += BLOCK_D * stride_wd
        if a_ptr is not None:
            b_start = layer_start(b_ptr, stride_cl, b_table_ptr, layer, IS_ALIGNED)
            b_columns = b_ptr + b_start + offs_n[None, :] * stride_cn
            for r in range(0, rank, BLOCK_R):
                offs_r = r + tl.arange(0, BLOCK_R)
                mask_r = offs_r < rank
                if r > 0:
                    down = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
                    for d in range(0, num_features, BLOCK_D):
                        mask_d = offs_d < num_features - d
                        mask = mask_t[:, None] & mask_d[None, :]
                        x = tl.load(rows + (d + offs_d)[None, :] * stride_xd, mask=mask, other=0.0)
                        a_ptrs = a_columns + d * stride_ad + offs_r[None, :] * stride_ar
                        mask = mask_d[:, None] & mask_r[None, :]
                        a = tl.load(a_ptrs, mask=mask, other=0.0).to(x.dtype)
                        down = tl.dot(x, a, down, input_precision=PRECISION)
                b_ptrs = b_columns + offs_r[:, None] * stride_cr
                b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
                kept = (scaling * down).to(x_ptr.dtype.element_ty)
                out = tl.dot(kept, b.to(kept.dtype), out, input_precision=PRECISION)
        if bias_ptr is not None:
            bias_start = layer_start(bias_ptr, stride_bl, bias_table_ptr, layer, False)
            bias_ptrs = bias_ptr + bias_start + offs_n * stride_bn
            out += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + first * stride_og + offs_t[:, None] * stride_ot
    out_ptrs += offs_n[None, :] * stride_on
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=mask_t[:, None] & mask_n[None, :])
