"""Router backward: gradients of the logits, then of x, the gate and its bias.

All products are of fp32 gradients, so that small ones do not vanish in fp16. Sums over tokens are
cut into a number of parts that depends on the shape alone, and added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex_kernels._triton.tuning import Config, choose
from molex_kernels.ops.routing.kernels.router import (
    _feature_weights,
    _load_x,
    matrix,
    precision,
    sizes_of,
    weights_of,
)

_PROGRAMS = 264  # about two for each multiprocessor of a large GPU


@triton.jit
def _router_bwd_logits(
    grad_weight_ptr, stride_gt, stride_gk,  # [T, K] or None
    grad_logits_ptr, stride_zt, stride_ze,  # [T, E] or None
    logits_ptr, index_ptr, weight_ptr,  # [T, E], [T, K], [T, K], contiguous
    dz_ptr,  # [T, E] fp32, contiguous
    T, E, top_k,
    SCORE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask_e = offs_e < E
    mask = mask_t[:, None] & mask_e[None, :]

    dz = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if grad_weight_ptr is not None:
        stride_gk = tl.cast(stride_gk, tl.int64)
        dot = tl.zeros([BLOCK_T], tl.float32)
        if SCORE != "sigmoid":
            for k in range(top_k):
                grad = tl.load(
                    grad_weight_ptr + offs_t * stride_gt + k * stride_gk, mask=mask_t, other=0.0
                )
                dot += grad * tl.load(weight_ptr + offs_t * top_k + k, mask=mask_t, other=0.0)
        for k in range(top_k):
            grad = tl.load(
                grad_weight_ptr + offs_t * stride_gt + k * stride_gk, mask=mask_t, other=0.0
            )
            weight = tl.load(weight_ptr + offs_t * top_k + k, mask=mask_t, other=0.0)
            expert = tl.load(index_ptr + offs_t * top_k + k, mask=mask_t, other=-1)
            if SCORE == "sigmoid":
                value = grad * weight * (1.0 - weight)
            elif SCORE == "softmax":
                value = grad * weight
            else:
                value = weight * (grad - dot)
            dz += tl.where(offs_e[None, :] == expert[:, None], value[:, None], 0.0)
        if SCORE == "softmax":
            z = tl.load(
                logits_ptr + offs_t[:, None] * E + offs_e[None, :], mask=mask, other=float("-inf")
            )
            z = tl.where(mask_t[:, None], z, 0.0)
            z = tl.exp(z - tl.max(z, axis=1)[:, None])
            dz -= z / tl.sum(z, axis=1)[:, None] * dot[:, None]
    if grad_logits_ptr is not None:
        stride_ze = tl.cast(stride_ze, tl.int64)
        pointers = grad_logits_ptr + offs_t[:, None] * stride_zt + offs_e[None, :] * stride_ze
        dz += tl.load(pointers, mask=mask, other=0.0)
    tl.store(dz_ptr + offs_t[:, None] * E + offs_e[None, :], dz, mask=mask)


@triton.jit
def _router_bwd_x(
    dz_ptr,  # [T, E] fp32, contiguous
    gate_ptr, stride_ge, stride_gd,  # [E, D]
    table_ptr, stride_wc, stride_wd,  # [C, D] fp32 or None
    labels_ptr, stride_lt, stride_lm,  # [T, M] or None
    mix_ptr, stride_mt, stride_mm,  # [T, M] or None
    dx_ptr,  # [T, D], contiguous
    T, D, E, num_labels, num_clusters,
    PRECISION: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_MIX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
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
        gate = tl.load(
            gate_ptr + offs_e.to(tl.int64)[:, None] * stride_ge + offs_d[None, :] * stride_gd,
            mask=mask_e[:, None] & mask_d[None, :],
            other=0.0,
        )
        dx = tl.dot(dz, gate.to(tl.float32), dx, input_precision=PRECISION)
    if HAS_WEIGHTS:
        dx *= _feature_weights(
            table_ptr, stride_wc, stride_wd, labels_ptr, stride_lt, stride_lm,
            mix_ptr, stride_mt, stride_mm, offs_t, offs_d, mask_t, mask_d,
            num_labels, num_clusters, HAS_MIX, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    pointers = dx_ptr + offs_t[:, None] * D + offs_d[None, :]
    tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d[None, :])


@triton.jit
def _router_bwd_gate(
    dz_ptr,  # [T, E] fp32, contiguous
    x_ptr, stride_xt, stride_xd,  # [T, D]
    table_ptr, stride_wc, stride_wd,  # [C, D] fp32 or None
    labels_ptr, stride_lt, stride_lm,  # [T, M] or None
    mix_ptr, stride_mt, stride_mm,  # [T, M] or None
    dgate_ptr,  # [S, E, D] fp32, contiguous
    dbias_ptr,  # [S, E] fp32, contiguous, or None
    T, D, E, rows, num_labels, num_clusters,
    PRECISION: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_MIX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Tokens [s * rows, (s + 1) * rows) of part s."""
    pid_d = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_e = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_d = offs_d < D
    mask_e = offs_e < E
    first = split * rows
    end = tl.minimum(first + rows, T)
    dgate = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, rows, BLOCK_T):
        offs_t = first + start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        dz = tl.load(
            dz_ptr + offs_t[None, :] * E + offs_e[:, None],
            mask=mask_t[None, :] & mask_e[:, None],
            other=0.0,
        )
        x = _load_x(
            x_ptr, stride_xt, stride_xd, table_ptr, stride_wc, stride_wd,
            labels_ptr, stride_lt, stride_lm, mix_ptr, stride_mt, stride_mm,
            offs_t, offs_d, mask_t, mask_d, num_labels, num_clusters,
            True, HAS_WEIGHTS, HAS_MIX, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        dgate = tl.dot(dz, x, dgate, input_precision=PRECISION)
        dbias += tl.sum(dz, axis=1)
    pointers = dgate_ptr + (split * E + offs_e[:, None]) * D + offs_d[None, :]
    tl.store(pointers, dgate, mask=mask_e[:, None] & mask_d[None, :])
    # Two ifs: the first one is decided at compile time.
    if dbias_ptr is not None:  # noqa: SIM102
        if pid_d == 0:
            tl.store(dbias_ptr + split * E + offs_e, dbias, mask=mask_e)


def launch_bwd(
    x: Tensor,
    gate: Tensor,
    logits: Tensor,
    index: Tensor,
    weight: Tensor,
    grad_weight: Tensor | None,
    grad_logits: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
    mix: Tensor | None,
    score: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and bias (fp32); an empty tensor for each that is not needed."""
    tokens, experts = logits.shape
    dx = x.new_empty(x.shape if needs[0] else (0,))
    dgate = gate.new_empty(gate.shape if needs[1] else (0,))
    dbias = logits.new_empty(experts if needs[2] else 0)
    if tokens == 0:
        return dx, dgate.zero_(), dbias.zero_()
    dz = torch.empty_like(logits)
    _launch_logits(grad_weight, grad_logits, logits, index, weight, dz, score)
    mixture = (table, labels, mix)
    if needs[0]:
        _launch_x(dz, gate, mixture, dx)
    if needs[1]:
        dgate, partial_bias = _launch_gate(dz, x, gate, mixture, needs[2])
        dbias = partial_bias.sum(0) if needs[2] else dbias
    elif needs[2]:
        dbias = dz.sum(0)
    return dx, dgate, dbias


def _launch_logits(
    grad_weight: Tensor | None,
    grad_logits: Tensor | None,
    logits: Tensor,
    index: Tensor,
    weight: Tensor,
    dz: Tensor,
    score: str,
) -> None:
    tokens, experts = logits.shape
    block_e = max(16, triton.next_power_of_2(experts))
    block_t = max(1, min(64, 4096 // block_e))
    config = Config({"BLOCK_T": block_t, "BLOCK_E": block_e})
    _router_bwd_logits[(triton.cdiv(tokens, block_t),)](
        *matrix(grad_weight), *matrix(grad_logits), logits, index, weight, dz,
        tokens, experts, index.shape[1],
        SCORE=score, **config.launch_options(),
    )  # fmt: skip


def _launch_x(dz: Tensor, gate: Tensor, mixture: tuple, dx: Tensor) -> None:
    tokens, dim = dx.shape
    experts = gate.shape[0]

    def launch(config: Config) -> None:
        blocks = config.blocks
        grid = (triton.cdiv(tokens, blocks["BLOCK_T"]), triton.cdiv(dim, blocks["BLOCK_D"]))
        _router_bwd_x[grid](
            dz, gate, *gate.stride(), *weights_of(*mixture), dx,
            tokens, dim, experts, *sizes_of(*mixture[:2]),
            PRECISION=precision(dx.dtype, True), HAS_WEIGHTS=mixture[0] is not None,
            HAS_MIX=mixture[2] is not None, **config.launch_options(),
        )  # fmt: skip

    pinned = Config({"BLOCK_T": 32, "BLOCK_D": 64, "BLOCK_E": 32}, 8, 2)
    candidates = [Config({"BLOCK_T": t, "BLOCK_D": 32, "BLOCK_E": 32}, 4, 2) for t in (32, 64)]
    shape_class = (dx.dtype, mixture[0] is not None, triton.next_power_of_2(dim))
    launch(choose("router_bwd_x", shape_class, pinned, candidates, launch, on_gpu=dz.is_cuda))


def _launch_gate(
    dz: Tensor, x: Tensor, gate: Tensor, mixture: tuple, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    tokens, dim = x.shape
    experts = gate.shape[0]
    block_e = min(64, max(16, triton.next_power_of_2(experts)))
    config = Config({"BLOCK_T": 32, "BLOCK_D": 64, "BLOCK_E": block_e}, 8, 2)
    blocks = config.blocks
    tiles = triton.cdiv(dim, blocks["BLOCK_D"]) * triton.cdiv(experts, block_e)
    splits = min(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(tokens, 128))
    rows = triton.cdiv(triton.cdiv(tokens, splits), blocks["BLOCK_T"]) * blocks["BLOCK_T"]
    splits = triton.cdiv(tokens, rows)
    partial = dz.new_empty(splits, experts, dim)
    partial_bias = dz.new_empty(splits, experts) if wants_bias else None
    _router_bwd_gate[(triton.cdiv(dim, blocks["BLOCK_D"]), triton.cdiv(experts, block_e), splits)](
        dz, x, *x.stride(), *weights_of(*mixture), partial, partial_bias,
        tokens, dim, experts, rows, *sizes_of(*mixture[:2]),
        PRECISION=precision(x.dtype, True), HAS_WEIGHTS=mixture[0] is not None,
        HAS_MIX=mixture[2] is not None, **config.launch_options(),
    )  # fmt: skip
    dgate = partial.sum(0) if splits > 1 else partial[0].clone()
    return dgate.to(gate.dtype), partial_bias if wants_bias else dz
