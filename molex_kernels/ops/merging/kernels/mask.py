"""Task vectors, the ties mask and the sum over experts, element by element."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, store


@triton.jit
def _sign(x):
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@triton.jit
def _merging_fwd_mask(
    base,  # [O, D]
    experts,  # [E, O, D]
    source,  # [E, O, D], or None for tau
    out,  # [E, O, D], or None
    dbase,  # [O, D], or None
    num_rows,
    num_features,
    num_experts,
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
    offs_o = int64(pid // tiles_d)[None, None] * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    offs_d = int64(pid % tiles_d)[None, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_o < num_rows) & (offs_d < num_features)
    if HAS_TIES or source is None:
        shared = load_fp32(at(base, offs_o, offs_d), mask)
        experts_ptrs = at(experts, offs_o, offs_d)
    if HAS_TIES:
        total = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
        expert_ptrs = experts_ptrs
        for _ in range(num_experts):
            total += load_fp32(expert_ptrs, mask) - shared
            expert_ptrs += experts.outer
        majority = _sign(total)
    if dbase is not None:
        rest = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    if source is not None:
        source_ptrs = at(source, offs_o, offs_d)
    if out is not None:
        out_ptrs = at(out, offs_o, offs_d)
    for _ in range(num_experts):
        if HAS_TIES or source is None:
            tau = load_fp32(experts_ptrs, mask) - shared
            experts_ptrs += experts.outer
        if source is not None:
            kept = load_fp32(source_ptrs, mask)
            source_ptrs += source.outer
        else:
            kept = tau
        if HAS_TIES:
            kept = tl.where(_sign(tau) == majority, kept, 0.0)
        if out is not None:
            store(out_ptrs, kept, mask)
            out_ptrs += out.outer
        if dbase is not None:
            rest -= kept
    if dbase is not None:
        store(at(dbase, offs_o, offs_d), rest, mask)
