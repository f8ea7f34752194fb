"""Merging in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molex_kernels._dtypes import accumulate_dtype


def deltas(base: Tensor, experts: Tensor, factors: Sequence[Tensor] | None, ties: bool) -> Tensor:
    """Delta_e = mask_e M_e tau_e with tau_e = experts_e - base; all of it in fp32 or fp64.

    The mask, [sign(tau_e) == sign(sum_j tau_j)], is of tau before the curvature, and a constant.
    """
    dtype = accumulate_dtype(experts.dtype)
    tau = experts.to(dtype) - base.to(dtype)
    delta = tau if factors is None else _curved(tau, [f.to(dtype) for f in factors])
    if ties:
        agrees = torch.sign(tau) == torch.sign(tau.sum(0))
        delta = torch.where(agrees, delta, 0)
    return delta.to(experts.dtype)


def merge(base: Tensor, deltas: Tensor, gates: Tensor) -> Tensor:
    """W_s = base + sum_e gates_se deltas_e, rounded once."""
    dtype = accumulate_dtype(base.dtype)
    moved = torch.matmul(gates.to(dtype), deltas.to(dtype).flatten(1))
    return (base.to(dtype) + moved.unflatten(1, base.shape)).to(base.dtype)


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
