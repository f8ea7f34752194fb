"""Robust and scaled attention in plain PyTorch: the specification.

Element-wise steps, softmax and everything carried from one iteration to the next are fp32; the
operands of the products are in the inputs' dtype. That is what the published code does under
autocast. B batch, H heads, N tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molex_kernels import _philox
from molex_kernels._dtypes import accumulate_dtype
from molex_kernels._masks import selected

# Heads with a smaller norm (all of k is 0) take this one, so that mu is finite.
SMALLEST_NORM = 1e-20


def thresholds(
    k: Tensor,
    key_mask: Tensor | None,
    lam: float,
    over_mu: bool,
    mu_width: int,
    mu_divisor: float,
    is_prefix: bool,
) -> Tensor:
    """T = lam * mu or lam / mu in fp32, mu = N * mu_width / (mu_divisor * ||k||_1): [B, H].

    Tokens outside `key_mask` count neither in N nor in the norm. `is_prefix`: [B, H, N], token i
    with N and the norm of the tokens up to i.
    """
    k = _only(key_mask, k)
    dtype = accumulate_dtype(k.dtype)
    tokens = torch.ones(k.shape[2], device=k.device) if key_mask is None else key_mask[:, None]
    if is_prefix:
        norm = torch.linalg.vector_norm(k, 1, dim=-1, dtype=dtype).cumsum(-1)
        count = tokens.cumsum(-1, dtype=dtype)
    else:
        norm = torch.linalg.vector_norm(k, 1, dim=(-2, -1), dtype=dtype)
        count = tokens.sum(-1, dtype=dtype)
    count = count.clamp_min(1)  # without a token there is nothing to compare with T
    mu = count * mu_width / (mu_divisor * norm.clamp_min(SMALLEST_NORM))
    return lam / mu if over_mu else lam * mu


def rpc_attention(
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    threshold: Tensor,
    key_mask: Tensor | None,
    num_iters: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The low-rank part L [B, H, N, d] and, in fp32, the sparse part S of the last iteration.

    threshold: T in fp32, [B, H] or, for each token its own, [B, H, N].
    """
    dtype = k.dtype
    k, v = _only(key_mask, k).to(accumulate_dtype(dtype)), _only(key_mask, v)
    q = None if q is None else _only(key_mask, q)
    sees = _sees(k, key_mask, is_causal)
    bound = threshold.view(*threshold.shape, *(1,) * (4 - threshold.dim()))
    low, u = torch.zeros_like(k), torch.zeros_like(k)
    for t in range(num_iters):
        sparse = soft(k - low + u, bound)
        clean = (k - sparse - u).to(dtype)
        p = _softmax(clean if q is None else q, clean, scale, sees)
        if t == num_iters - 1 and seed is not None:
            p = _philox.dropout(p, dropout_p, seed)
        low = _only(key_mask, (p.to(dtype) @ v).to(k.dtype))
        u = u + k - low - sparse
    return low.to(dtype), sparse


def soft(a: Tensor, bound: Tensor) -> Tensor:
    """sign(a) max(|a| - T, 0), whose gradient at |a| = T is that of |a| > T; NaN where T is NaN."""
    return torch.where(a.abs() < bound, 0, a - a.sign() * bound)


def scaled_attention(q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: float) -> Tensor:
    """P (V - S V) with P = softmax(q k^T scale), s [H, N, N]; P (V - s softmax(k k^T scale) V)."""
    dtype = v.dtype
    if s.dim() == 3:
        part = s.to(dtype) @ v
    else:
        part = s.to(dtype) * (_softmax(k, k, scale, None).to(dtype) @ v)
    return _softmax(q, k, scale, None).to(dtype) @ (v - part)


def _softmax(q: Tensor, k: Tensor, scale: float, sees: Tensor | None) -> Tensor:
    """softmax(q k^T scale) over what each row sees, in fp32."""
    z = (q @ k.mT).to(accumulate_dtype(q.dtype)) * scale
    if sees is not None:
        z = torch.where(sees, z, torch.finfo(z.dtype).min)
    return z.softmax(-1)


def _sees(k: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Which keys a row sees, broadcast to [B, H, N, N]; None for all of them."""
    sees = None if key_mask is None else key_mask[:, None, None, :]
    if is_causal:
        order = torch.arange(k.shape[2], device=k.device)
        earlier = order <= order[:, None]
        sees = earlier if sees is None else sees & earlier
    return sees


def _only(key_mask: Tensor | None, x: Tensor) -> Tensor:
    """x [B, H, N, d] with 0 in the place of masked tokens, whatever stands there."""
    return selected(x, None if key_mask is None else key_mask[:, None])
