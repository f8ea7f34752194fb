"""Merging in plain PyTorch: the specification. Autocast or not, weights are merged in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molex_kernels._dtypes import accumulate_dtype, without_autocast

# Without an election a sum of weights below it, in size, divides nothing: as mergekit has it.
SMALLEST_SUM = 1e-8


def deltas(base: Tensor, experts: Tensor, factors: Sequence[Tensor] | None, ties: bool) -> Tensor:
    """Delta_e = mask_e M_e tau_e with tau_e = experts_e - base; all of it in fp32 or fp64.

    The mask, [sign(tau_e) == sign(sum_j tau_j)], is of tau before the curvature, and a constant.
    """
    dtype = accumulate_dtype(experts.dtype)
    tau = experts.to(dtype) - base.to(dtype)
    delta = tau
    if factors is not None:
        with without_autocast(tau):
            delta = _curved(tau, [f.to(dtype) for f in factors])
    if ties:
        agrees = torch.sign(tau) == torch.sign(tau.sum(0))
        delta = torch.where(agrees, delta, 0)
    return delta.to(experts.dtype)


def merge(base: Tensor, deltas: Tensor, gates: Tensor) -> Tensor:
    """W_s = base + sum_e gates_se deltas_e, rounded once."""
    dtype = accumulate_dtype(base.dtype)
    with without_autocast(base):
        moved = torch.matmul(gates.to(dtype), deltas.to(dtype).flatten(1))
    return (base.to(dtype) + moved.unflatten(1, base.shape)).to(base.dtype)


def trim(base: Tensor, experts: Tensor, density: float) -> Tensor:
    """The experts with the base in the place of all but the largest elements of tau_e in size.

    Of equal sizes the first stay; at least one does, and a NaN is the largest.
    """
    dtype = accumulate_dtype(experts.dtype)
    size = (experts.detach().to(dtype) - base.detach().to(dtype)).abs().flatten(1)
    count = min(max(int(density * size.shape[1]), 1), size.shape[1])
    order = size.argsort(dim=1, descending=True, stable=True)[:, :count]
    stays = torch.zeros_like(size, dtype=torch.bool).scatter(1, order, True)
    return torch.where(stays.view(experts.shape), experts, base)


def elected(base: Tensor, experts: Tensor, gates: Tensor | None) -> Tensor:
    """Which task vectors have the elected sign: [S, E, O, D] by gates, [1, E, O, D] without.

    By gates it is the sign of sum_e gates_se tau_e, positive where that is 0, and a task vector's
    is that of gates_se tau_e. The election is a constant.
    """
    dtype = accumulate_dtype(experts.dtype)
    tau = (experts.to(dtype) - base.to(dtype)).detach()
    if gates is None:
        return (torch.sign(tau) == torch.sign(tau.sum(0)))[None]
    weighted = gates.detach()[:, :, None, None] * tau
    majority = torch.where(weighted.sum(1, keepdim=True) >= 0, 1, -1)
    return torch.sign(weighted) == majority


def merge_kept(
    base: Tensor,
    deltas: Tensor,
    gates: Tensor,
    kept: Tensor | None,
    normalize: bool,
    alpha: float,
) -> Tensor:
    """W_s = base + alpha sum_e kept_se gates_se deltas_e / n_s, rounded once.

    n_s is the sum of the gates that are kept where `normalize` and that sum is not 0, else 1.
    """
    dtype = accumulate_dtype(base.dtype)
    weights = gates.to(dtype)[:, :, None, None]
    moved = weights * deltas.to(dtype)
    if kept is not None:
        moved = torch.where(kept, moved, 0)
    moved = moved.sum(1)
    if normalize:
        total = (weights if kept is None else torch.where(kept, weights, 0)).sum(1)
        is_zero = total.abs() < SMALLEST_SUM if kept is None else total == 0
        moved = moved / torch.where(is_zero, 1, total)
    return (base.to(dtype) + alpha * moved).to(base.dtype)


def linear(x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor | None) -> Tensor:
    """y_s = x_s W_s^T + bias_s."""
    y = torch.matmul(x, merge(base, deltas, gates).mT)
    return y if bias is None else (y + bias[:, None]).to(x.dtype)


def _curved(tau: Tensor, factors: Sequence[Tensor]) -> Tensor:
    sizes = [factor.shape[2] for factor in factors]
    split = tau.reshape(tau.shape[0], *sizes)
    out = torch.zeros_like(split)
    for out1, out2, in1, in2 in zip(*factors, strict=True):
        part = torch.einsum("exm,ejklm->ejklx", in2, split)
        part = torch.einsum("exl,ejklm->ejkxm", in1, part)
        part = torch.einsum("exk,ejklm->ejxlm", out2, part)
        out = out + torch.einsum("exj,ejklm->exklm", out1, part)
    return out.reshape(tau.shape)
