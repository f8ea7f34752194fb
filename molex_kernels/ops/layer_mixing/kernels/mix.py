"""The mixture of branches, with the residual and the next norm."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat, at, int64, load_fp32, nth, store


@triton.jit
def _moved(outputs_ptr, residual_ptr, outputs, residual, rows, columns, mask):
    """outputs_g + residual_g in fp32; the pointers are those of branch g."""
    ptrs = at(Mat(outputs_ptr, outputs.row, outputs.col), rows, columns)
    moved = load_fp32(ptrs, mask)
    if residual is not None:
        ptrs = at(Mat(residual_ptr, residual.row, residual.col), rows, columns)
        moved += load_fp32(ptrs, mask)
    return moved


@triton.jit
def _mixed(
    outputs, residual, coeff_ptr, num_branches, rows, columns, mask,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum_g coeff_g (outputs_g + residual_g) in fp32."""
    y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    outputs_ptr = outputs.ptr
    residual_ptr = outputs.ptr
    if residual is not None:
        residual_ptr = residual.ptr
    for g in range(num_branches):
        moved = _moved(outputs_ptr, residual_ptr, outputs, residual, rows, columns, mask)
        y += tl.load(coeff_ptr + g) * moved
        outputs_ptr += outputs.outer
        if residual is not None:
            residual_ptr += residual.outer
    return y


@triton.jit
def _layer_mixing_fwd_mix(
    outputs,  # [G, T, D]
    residual,  # [G, T, D]
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
    offs_t = int64(pid // tiles_d) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = int64(pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < num_features
    mask = (offs_t < num_tokens)[:, None] & mask_d[None, :]
    rows, columns = offs_t[:, None], offs_d[None, :]
    y = _mixed(outputs, residual, coeff_ptr, num_branches, rows, columns, mask, BLOCK_T, BLOCK_D)
    place = rows * num_features + columns
    store(y_ptr + place, y, mask)
    if normed_ptr is not None:
        mean = tl.sum(tl.where(mask, y, 0.0), axis=1) / num_features
        centred = tl.where(mask, y - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / num_features
        normed = centred * (1.0 / tl.sqrt(variance + eps))[:, None]
        if weight_ptr is not None:
            normed *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        if bias_ptr is not None:
            normed += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        store(normed_ptr + place, normed, mask)


@triton.jit
def _layer_mixing_bwd_mix(
    dy,  # [T, D]
    dnormed,  # [T, D]
    outputs,  # [G, T, D]
    residual,  # [G, T, D]
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
        offs_t = int64(tile // tiles_d) * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_d = int64(tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < num_features
        mask = (offs_t < num_tokens)[:, None] & mask_d[None, :]
        rows, columns = offs_t[:, None], offs_d[None, :]
        d = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if dnormed is not None:
            y = _mixed(
                outputs, residual, coeff_ptr, num_branches, rows, columns, mask, BLOCK_T, BLOCK_D
            )
            mean = tl.sum(tl.where(mask, y, 0.0), axis=1) / num_features
            centred = tl.where(mask, y - mean[:, None], 0.0)
            variance = tl.sum(centred * centred, axis=1) / num_features
            inverse = (1.0 / tl.sqrt(variance + eps))[:, None]
            normed = centred * inverse
            upstream = load_fp32(at(dnormed, rows, columns), mask)
            dweight += tl.sum(upstream * normed, axis=0)
            dbias += tl.sum(upstream, axis=0)
            if weight_ptr is not None:
                upstream *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
            inner = tl.sum(upstream * normed, axis=1) / num_features
            mean = tl.sum(upstream, axis=1) / num_features
            d = inverse * (upstream - normed * inner[:, None] - mean[:, None])
            d = tl.where(mask, d, 0.0)
        if dy is not None:
            d += load_fp32(at(dy, rows, columns), mask)
        for g in range(num_branches):
            branch = int64(g)
            if doutputs_ptr is not None:
                place = (branch * num_tokens + rows) * num_features + columns
                store(doutputs_ptr + place, tl.load(coeff_ptr + g) * d, mask)
            if coeff_parts_ptr is not None:
                outputs_ptr = nth(outputs, branch)
                residual_ptr = outputs_ptr
                if residual is not None:
                    residual_ptr = nth(residual, branch)
                moved = _moved(outputs_ptr, residual_ptr, outputs, residual, rows, columns, mask)
                dcoeff += tl.where(offs_g == g, tl.sum(tl.sum(d * moved, axis=1), axis=0), 0.0)
    if coeff_parts_ptr is not None:
        ptrs = coeff_parts_ptr + pid * num_branches + offs_g
        tl.store(ptrs, dcoeff, mask=offs_g < num_branches)
    if norm_parts_ptr is not None:
        offs_d = tl.arange(0, BLOCK_D)
        ptrs = norm_parts_ptr + int64(pid) * num_features + offs_d
        tl.store(ptrs, dweight, mask=offs_d < num_features)
        ptrs += int64(num_programs) * num_features
        tl.store(ptrs, dbias, mask=offs_d < num_features)
