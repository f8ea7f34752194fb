"""What the attention ops are measured against."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels._dtypes import accumulate_dtype


def published_rpc_attention(
    k: Tensor,
    v: Tensor,
    *,
    num_iters: int,
    lam: float | None = None,
    threshold: str | Tensor = "lam_times_mu",
    causal: bool = False,
) -> Tensor:
    """The authors' operations one for one, starting with two tensors of zeros on the CPU.

    With a causal mask on the scores, for which they released no code.
    """
    low = torch.zeros(k.shape).to(k.device, non_blocking=True)
    y = torch.zeros(k.shape).to(k.device, non_blocking=True)
    mu, bound = _published_threshold(k, lam, threshold)
    scale = k.shape[-1] ** -0.5
    for _ in range(num_iters):
        s = k - low + y / mu
        below = s.le(-bound).int()
        above = s.ge(bound).int()
        s = (s - bound) * above + (s + bound) * below
        clean = k - s - y / mu
        # Autocast, under which the authors train, casts the operands of products.
        clean = clean.to(k.dtype)
        scores = (clean @ clean.transpose(-2, -1)) * scale
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=k.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        weights = scores.float().softmax(dim=-1)
        low = weights.to(k.dtype) @ v
        y = y + mu * (k - low - s)
    return low


def library_rpc_attention(
    k: Tensor,
    v: Tensor,
    *,
    num_iters: int,
    lam: float | None = None,
    threshold: str | Tensor = "lam_times_mu",
    causal: bool = False,
) -> Tensor:
    """PyTorch's fused attention in each iteration, and eager element-wise steps in scaled form."""
    _, bound = _published_threshold(k, lam, threshold)
    low = u = torch.zeros((), device=k.device)
    for _ in range(num_iters):
        s = _soft(k - low + u, bound)
        clean = (k - s - u).to(k.dtype)
        low = F.scaled_dot_product_attention(clean, clean, v, is_causal=causal)
        u = u + k - low - s
    return low


def compiled_library_rpc_attention(k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The same, its element-wise steps fused by `torch.compile`."""
    return _compiled_library()(k, v, **options)


@functools.cache
def _compiled_library() -> Any:
    """When it is called first, as this loads Dynamo."""
    return torch.compile(library_rpc_attention, fullgraph=True, dynamic=False)


def attention_per_iteration(
    k: Tensor, v: Tensor, *, num_iters: int, causal: bool = False, **_: Any
) -> tuple[Tensor, ...]:
    """PyTorch's fused attention as often as there are iterations, and nothing else."""
    return tuple(
        F.scaled_dot_product_attention(k, k, v, is_causal=causal) for _ in range(num_iters)
    )


def _soft(a: Tensor, bound: Tensor) -> Tensor:
    return a - a.clamp(-bound, bound)


def _published_threshold(k: Tensor, lam: Any, threshold: str | Tensor) -> tuple[Tensor, Tensor]:
    tokens, width = k.shape[2], k.shape[1] * k.shape[3]
    mu = tokens * width / 4 / k.float().norm(p=1, dim=[-1, -2], keepdim=True)
    if isinstance(threshold, Tensor):
        return mu, threshold[..., None, None]
    return mu, lam * mu if threshold == "lam_times_mu" else lam / mu


def published_scaled_attention(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """The authors' operations one for one: an identity of B x H x N x N from the CPU in each call.

    For a scalar s as well as a matrix.
    """
    batch, heads, tokens, width = q.shape
    scale, wide = width**-0.5, accumulate_dtype(q.dtype)
    if s.dim() == 3:
        corrected = torch.eye(tokens).expand(batch, heads, -1, -1).to(q) - s.to(q.dtype)
        values = corrected @ v
    else:
        own = ((k @ k.transpose(-2, -1)) * scale).to(wide).softmax(dim=-1)
        values = v - s.to(q.dtype) * (own.to(q.dtype) @ v)
    weights = ((q @ k.transpose(-2, -1)) * scale).to(wide).softmax(dim=-1)
    return weights.to(q.dtype) @ values
