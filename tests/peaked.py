"""Attention in which each token sees mostly itself, and what its gradient errs by."""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = (8, 2, 24, 32)


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and the gradient of the result, in fp32."""
    sign = torch.randn(SIZES, generator=generator).sign()
    k = sign * (1.7 + 0.2 * torch.rand(SIZES, generator=generator))
    v, upstream = (torch.randn(SIZES, generator=generator) for _ in range(2))
    return k, v, upstream


def roundings(dk: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> float:
    """The root mean square error of dk, where 1 is that of D off by half a unit in its last place.

    With dZ = P (dP - D), dk = scale (dZ + dZ^T) k. Where P is close to 1, what is rounded in dP or
    in P cancels in dP - D, for a D of the same numbers; what is rounded in D stays.
    """
    leaf, scale = k.double().requires_grad_(), k.shape[-1] ** -0.5
    out = (leaf @ leaf.mT * scale).softmax(-1) @ v.double()
    truth = torch.autograd.grad(out, leaf, upstream.double())[0]
    inner = (out.detach() * upstream).sum(-1, keepdim=True)
    half = 2 * scale * k * inner * torch.finfo(torch.float32).eps / 2
    return ((dk.double() - truth).norm() / half.norm()).item()
