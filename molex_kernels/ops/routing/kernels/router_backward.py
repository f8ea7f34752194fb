"""Router backward: from gradients of the logits, those of x, the gate and its bias.

All products are of fp32 gradients, so that small ones do not vanish in fp16; with a factor of 16
bits they are of the gradients' parts. Sums over tokens are cut into a number of parts that depends
on the shape alone, and added in order.
"""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, store
from molex_kernels.ops.routing.kernels.products import dot_parts
from molex_kernels.ops.routing.kernels.router import feature_weights, load_x


@triton.jit
def _router_bwd_x(
    dz_ptr,  # [T, E] fp32, contiguous
    gate,  # [E, D]
    table,  # [C, D] fp32 or None
    labels,  # [T, M] or None
    mix,  # [T, M] or None
    dx_ptr,  # [T, D], contiguous
    T, D, E, num_labels, num_clusters,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx = w (dz gate)."""
    offs_t = int64(tl.program_id(0)) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = int64(tl.program_id(1)) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < T
    mask_d = offs_d < D
    dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, E, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask_e = offs_e < E
        dz = tl.load(
            dz_ptr + offs_t[:, None] * E + offs_e[None, :],
            mask=mask_t[:, None] & mask_e[None, :],
            other=0.0,
        )
        gate_ptrs = at(gate, int64(offs_e)[:, None], offs_d[None, :])
        gate_tile = tl.load(gate_ptrs, mask=mask_e[:, None] & mask_d[None, :], other=0.0)
        dx = dot_parts(dz, gate_tile, dx, PRECISION, False)
    if table is not None:
        dx *= feature_weights(
            table, labels, mix, offs_t, offs_d, mask_t, mask_d,
            num_labels, num_clusters, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    dx_ptrs = dx_ptr + offs_t[:, None] * D + offs_d[None, :]
    store(dx_ptrs, dx, mask_t[:, None] & mask_d[None, :])


@triton.jit
def _router_bwd_gate(
    dz_ptr,  # [T, E] fp32, contiguous
    x,  # [T, D]
    table,  # [C, D] fp32 or None
    labels,  # [T, M] or None
    mix,  # [T, M] or None
    dgate_ptr,  # [S, E, D] fp32, contiguous
    dbias_ptr,  # [S, E] fp32, contiguous, or None
    T, D, E, rows, num_labels, num_clusters,
    PRECISION: tl.constexpr, IN_PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Tokens [s * rows, (s + 1) * rows) of part s."""
    pid_d = int64(tl.program_id(0))
    split = int64(tl.program_id(2))
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_e = int64(tl.program_id(1)) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_d = offs_d < D
    mask_e = offs_e < E
    first = split * rows
    end = tl.minimum(first + rows, T)
    dgate = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, rows, BLOCK_T):
        offs_t = first + start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        # By 16 bits it is loaded as it lies and turned in registers, or wgmmas would wait in turn.
        if IN_PARTS:
            mask = mask_t[:, None] & mask_e[None, :]
            dz = tl.load(dz_ptr + offs_t[:, None] * E + offs_e[None, :], mask=mask, other=0.0)
            dz = tl.trans(dz)
        else:
            mask = mask_t[None, :] & mask_e[:, None]
            dz = tl.load(dz_ptr + offs_t[None, :] * E + offs_e[:, None], mask=mask, other=0.0)
        x_tile = load_x(
            x, table, labels, mix, offs_t, offs_d, mask_t, mask_d,
            num_labels, num_clusters, table is not None, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        dgate = dot_parts(dz, x_tile, dgate, PRECISION, False)
        dbias += tl.sum(dz, axis=1)
    pointers = dgate_ptr + (split * E + offs_e[:, None]) * D + offs_d[None, :]
    tl.store(pointers, dgate, mask=mask_e[:, None] & mask_d[None, :])
    # Two ifs: the first one is decided at compile time.
    if dbias_ptr is not None:  # noqa: SIM102
        if pid_d == 0:
            tl.store(dbias_ptr + split * E + offs_e, dbias, mask=mask_e)
