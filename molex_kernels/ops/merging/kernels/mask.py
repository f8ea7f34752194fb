"""Task vectors, the ties mask and the sum over experts, element by element."""

import triton
import triton.language as tl


@triton.jit
def _sign(x):
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@triton.jit
def _merging_fwd_mask(
    base_ptr,  # [O, D]
    stride_bo,
    stride_bd,
    experts_ptr,  # [E, O, D]
    stride_ee,
    stride_eo,
    stride_ed,
    source_ptr,  # [E, O, D], or None for tau
    stride_se,
    stride_so,
    stride_sd,
    out_ptr,  # [E, O, D], or None
    stride_oe,
    stride_oo,
    stride_od,
    dbase_ptr,  # [O, D], or None
    stride_do,
    stride_dd,
    num_rows,
    num_features,
    num_experts,
    HAS_SOURCE: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_TIES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_e = mask_e source_e and dbase = -sum_e mask_e source_e; tau_e = experts_e - base.

    The sums go in the order of e, so that every pass has the same mask. The second time a tile of
    the experts is read it comes from a cache.
    """
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    offs_o = (pid // tiles_d).to(tl.int64)[None, None] * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    offs_d = (pid % tiles_d).to(tl.int64)[None, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_o < num_rows) & (offs_d < num_features)
    if HAS_TIES or not HAS_SOURCE:
        base_ptrs = base_ptr + offs_o * stride_bo + offs_d * stride_bd
        base = tl.load(base_ptrs, mask=mask, other=0.0).to(tl.float32)
        experts_ptrs = experts_ptr + offs_o * stride_eo + offs_d * stride_ed
    if HAS_TIES:
        total = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
        expert_ptrs = experts_ptrs
        for _ in range(num_experts):
            total += tl.load(expert_ptrs, mask=mask, other=0.0).to(tl.float32) - base
            expert_ptrs += stride_ee
        majority = _sign(total)
    if HAS_BASE:
        dbase = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    if HAS_SOURCE:
        source_ptrs = source_ptr + offs_o * stride_so + offs_d * stride_sd
    if HAS_OUT:
        out_ptrs = out_ptr + offs_o * stride_oo + offs_d * stride_od
    for _ in range(num_experts):
        if HAS_TIES or not HAS_SOURCE:
            tau = tl.load(experts_ptrs, mask=mask, other=0.0).to(tl.float32) - base
            experts_ptrs += stride_ee
        if HAS_SOURCE:
            out = tl.load(source_ptrs, mask=mask, other=0.0).to(tl.float32)
            source_ptrs += stride_se
        else:
            out = tau
        if HAS_TIES:
            out = tl.where(_sign(tau) == majority, out, 0.0)
        if HAS_OUT:
            tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
            out_ptrs += stride_oe
        if HAS_BASE:
            dbase -= out
    if HAS_BASE:
        dbase_ptrs = dbase_ptr + offs_o * stride_do + offs_d * stride_dd
        tl.store(dbase_ptrs, dbase.to(dbase_ptr.dtype.element_ty), mask=mask)
