"""Merged weights of several segments, which read the base and the deltas once."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import along, at, int64, load_fp32, store


@triton.jit
def stack_places(stack, outer, rows, cols):
    """Pointers [outer, rows, cols] to elements of a Stack."""
    ptrs = stack.ptr + along(int64(outer)[:, None, None], stack.outer)
    ptrs += along(int64(rows)[None, :, None], stack.row)
    return ptrs + along(int64(cols)[None, None, :], stack.col)


@triton.jit
def _merging_fwd_merge(
    base,  # [N, D]
    deltas,  # [E, N, D]
    gates,  # [S, E] fp32
    out,  # [S, N, D]
    num_segments,
    num_rows,
    num_features,
    num_experts,
    NUM_UNROLLED: tl.constexpr,  # the number of experts where it is small, else 0
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_s = base + sum_e gates_se deltas_e, rounded once."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    tiles = tl.cdiv(num_rows, BLOCK_N) * tiles_d
    offs_s = int64(pid // tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_n = int64(pid % tiles // tiles_d) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = int64(pid % tiles % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_s = offs_s < num_segments
    mask = (offs_n < num_rows)[:, None] & (offs_d < num_features)[None, :]
    delta_ptrs = at(deltas, offs_n[:, None], offs_d[None, :])
    total = load_fp32(at(base, offs_n[:, None], offs_d[None, :]), mask)[None, :, :]
    total = tl.broadcast_to(total, (BLOCK_S, BLOCK_N, BLOCK_D))
    if NUM_UNROLLED > 0:
        for e in tl.static_range(NUM_UNROLLED):
            gate = tl.load(at(gates, offs_s, e), mask=mask_s, other=0.0)
            total += gate[:, None, None] * load_fp32(delta_ptrs, mask)[None, :, :]
            delta_ptrs += deltas.outer
    else:
        for e in range(num_experts):
            gate = tl.load(at(gates, offs_s, e), mask=mask_s, other=0.0)
            total += gate[:, None, None] * load_fp32(delta_ptrs, mask)[None, :, :]
            delta_ptrs += deltas.outer
    mask_end = mask_s[:, None, None] & mask[None, :, :]
    store(stack_places(out, offs_s, offs_n, offs_d), total, mask_end)
