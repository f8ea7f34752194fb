"""From tokens to rows in expert order."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, store


@triton.jit
def _dispatch_fwd_gather(
    x,  # [T, D]
    expert_weight,  # [T, K]; None: each row counts once
    rows,  # [R, D], whose products with x go to `products`; None: there are none
    out,  # [R, D] or None
    products_ptr,  # [T, K] contiguous, or None
    offsets_ptr,  # [E] int32
    permutation_ptr,  # [R] int64
    num_rows,
    num_experts,
    num_features,
    top_k,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_r = w_tk x_t for the row's token t, products_tk = <rows_r, x_t>; 0 without an expert."""
    offs_r = int64(tl.program_id(0)) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_r = offs_r < num_rows
    is_local = mask_r & (offs_r < tl.load(offsets_ptr + num_experts - 1))
    assignment = tl.load(permutation_ptr + offs_r, mask=mask_r, other=0)
    token = assignment // top_k
    if expert_weight is not None:
        weight = load_fp32(at(expert_weight, token, assignment % top_k), is_local)
    if rows is not None:
        product = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for d in range(0, num_features, BLOCK_D):
        offs_d = int64(d) + tl.arange(0, BLOCK_D)
        mask_d = (offs_d < num_features)[None, :]
        mask = is_local[:, None] & mask_d
        value = load_fp32(at(x, token[:, None], offs_d[None, :]), mask)
        if rows is not None:
            product += value * load_fp32(at(rows, offs_r[:, None], offs_d[None, :]), mask)
        if out is not None:
            if expert_weight is not None:
                value *= weight[:, None]
            store(at(out, offs_r[:, None], offs_d[None, :]), value, mask_r[:, None] & mask_d)
    if rows is not None:
        store(products_ptr + assignment, tl.sum(product, axis=1), mask_r)
