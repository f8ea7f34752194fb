"""The mixture of branches, with the residual and the next norm."""

import triton
import triton.language as tl


@triton.jit
def _moved(
    outputs_ptr, stride_ut, stride_ud, residual_ptr, stride_rt, stride_rd, rows, columns, mask
):
    """outputs_g + residual_g in fp32."""
    ptrs = outputs_ptr + rows * stride_ut + columns * stride_ud
    moved = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        ptrs = residual_ptr + rows * stride_rt + columns * stride_rd
        moved += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return moved


@triton.jit
def _mixed(
    outputs_ptr, stride_ug, stride_ut, stride_ud,
    residual_ptr, stride_rg, stride_rt, stride_rd,
    coeff_ptr, num_branches, rows, columns, mask,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum_g coeff_g (outputs_g + residual_g) in fp32."""
    y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for g in range(num_branches):
        moved = _moved(
            outputs_ptr, stride_ut, stride_ud, residual_ptr, stride_rt, stride_rd,
            rows, columns, mask,
        )  # fmt: skip
        y += tl.load(coeff_ptr + g) * moved
        outputs_ptr += stride_ug
        if residual_ptr is not None:
            residual_ptr += stride_rg
    return y


@triton.jit
def _layer_mixing_fwd_mix(
    outputs_ptr,  # [G, T, D]
    stride_ug,
    stride_ut,
    stride_ud,
    residual_ptr,  # [G, T, D]
    stride_rg,
    stride_rt,
    stride_rd,
    coeff_ptr,  # [G] fp32, contiguous
    weight_ptr,  # [D] fp32, contiguous
    bias_ptr,  # [D] fp32, contiguous
    y_ptr,  # [T, D] contiguous
    normed_ptr,  # [T, D] contiguous
    eps,
    num_branches,
    num_tokens,
    num_features,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = sum_g coeff_g (outputs_g + residual_g); where asked for, LayerNorm(y)."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    offs_t = (pid // tiles_d).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = (pid % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < num_features
    mask = (offs_t < num_tokens)[:, None] & mask_d[None, :]
    rows, columns = offs_t[:, None], offs_d[None, :]
    y = _mixed(
        outputs_ptr, stride_ug, stride_ut, stride_ud,
        residual_ptr, stride_rg, stride_rt, stride_rd,
        coeff_ptr, num_branches, rows, columns, mask, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    place = rows * num_features + columns
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)
    if normed_ptr is not None:
        mean = tl.sum(tl.where(mask, y, 0.0), axis=1) / num_features
        centred = tl.where(mask, y - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / num_features
        normed = centred * (1.0 / tl.sqrt(variance + eps))[:, None]
        if weight_ptr is not None:
            normed *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        if bias_ptr is not None:
            normed += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_mixing_bwd_mix(
    dy_ptr,  # [T, D]
    stride_yt,
    stride_yd,
    dnormed_ptr,  # [T, D]
    stride_nt,
    stride_nd,
    outputs_ptr,  # [G, T, D]
    stride_ug,
    stride_ut,
    stride_ud,
    residual_ptr,  # [G, T, D]
    stride_rg,
    stride_rt,
    stride_rd,
    coeff_ptr,  # [G] fp32, contiguous
    weight_ptr,  # [D] fp32, contiguous
    doutputs_ptr,  # [G, T, D] contiguous
    coeff_parts_ptr,  # [programs, G] fp32
    norm_parts_ptr,  # [2, programs, D] fp32
    eps,
    num_branches,
    num_tokens,
    num_features,
    num_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """doutputs_g = coeff_g dy, dcoeff_g = <dy, outputs_g + residual_g>, with dy through the norm.

    Where there is a norm a tile is whole rows, and y is mixed anew.
    """
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    offs_g = tl.arange(0, BLOCK_G)
    dcoeff = tl.zeros((BLOCK_G,), tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(pid, num_tiles, num_programs):
        offs_t = (tile // tiles_d).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_d = (tile % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < num_features
        mask = (offs_t < num_tokens)[:, None] & mask_d[None, :]
        rows, columns = offs_t[:, None], offs_d[None, :]
        dy = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if dnormed_ptr is not None:
            y = _mixed(
                outputs_ptr, stride_ug, stride_ut, stride_ud,
                residual_ptr, stride_rg, stride_rt, stride_rd,
                coeff_ptr, num_branches, rows, columns, mask, BLOCK_T, BLOCK_D,
            )  # fmt: skip
            mean = tl.sum(tl.where(mask, y, 0.0), axis=1) / num_features
            centred = tl.where(mask, y - mean[:, None], 0.0)
            variance = tl.sum(centred * centred, axis=1) / num_features
            inverse = (1.0 / tl.sqrt(variance + eps))[:, None]
            normed = centred * inverse
            ptrs = dnormed_ptr + rows * stride_nt + columns * stride_nd
            dnormed = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
            dweight += tl.sum(dnormed * normed, axis=0)
            dbias += tl.sum(dnormed, axis=0)
            if weight_ptr is not None:
                dnormed *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
            along = tl.sum(dnormed * normed, axis=1) / num_features
            mean = tl.sum(dnormed, axis=1) / num_features
            dy = inverse * (dnormed - normed * along[:, None] - mean[:, None])
            dy = tl.where(mask, dy, 0.0)
        if dy_ptr is not None:
            ptrs = dy_ptr + rows * stride_yt + columns * stride_yd
            dy += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        for g in range(num_branches):
            branch = tl.cast(g, tl.int64)
            if doutputs_ptr is not None:
                place = (branch * num_tokens + rows) * num_features + columns
                doutputs = tl.load(coeff_ptr + g) * dy
                tl.store(
                    doutputs_ptr + place, doutputs.to(doutputs_ptr.dtype.element_ty), mask=mask
                )
            if coeff_parts_ptr is not None:
                residual = residual_ptr
                if residual_ptr is not None:
                    residual = residual_ptr + branch * stride_rg
                moved = _moved(
                    outputs_ptr + branch * stride_ug, stride_ut, stride_ud,
                    residual, stride_rt, stride_rd, rows, columns, mask,
                )  # fmt: skip
                dcoeff += tl.where(offs_g == g, tl.sum(tl.sum(dy * moved, axis=1), axis=0), 0.0)
    if coeff_parts_ptr is not None:
        ptrs = coeff_parts_ptr + pid * num_branches + offs_g
        tl.store(ptrs, dcoeff, mask=offs_g < num_branches)
    if norm_parts_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        ptrs = norm_parts_ptr + pid.to(tl.int64) * num_features + offs_d
        tl.store(ptrs, dweight, mask=offs_d < num_features)
        ptrs += num_programs.to(tl.int64) * num_features
        tl.store(ptrs, dbias, mask=offs_d < num_features)
