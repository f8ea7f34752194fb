"""Robust attention on a CPU, on ATen's products: a few heads at a time through all iterations.

N x N tensors are made for the heads of one chunk alone, so that they stay in the cache, and made
again by the backward pass. Arithmetic is fp32 whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molex_kernels import _philox

_CHUNK = 2**19  # scores to a chunk, where one head does not have more
_NEVER = -1e30  # a score that is not seen; finite, so that a row which sees nothing stays finite


@dataclass
class _Heads:
    """Some heads in fp32, [C, N, d] each."""

    own: slice
    k: Tensor
    v: Tensor
    q: Tensor | None
    bound: Tensor  # [C, 1 or N, 1]
    rows: Tensor | None  # which tokens there are, [C, N, 1]
    unseen: Tensor | None  # which scores do not count, [1 or C, 1 or N, N]
    scale: float
    dtype: torch.dtype

    def only(self, x: Tensor) -> Tensor:
        """x with 0 in the place of masked tokens."""
        return x if self.rows is None else torch.where(self.rows, x, 0)

    def shrunk(self, a: Tensor) -> Tensor:
        """sign(a) max(|a| - T, 0)."""
        return torch.where(a.abs() < self.bound, 0, a - a.sign() * self.bound)

    def rounded(self, x: Tensor) -> Tensor:
        """x as the products see it."""
        return x if self.dtype == torch.float32 else x.to(self.dtype).float()

    def weights(self, clean: Tensor) -> Tensor:
        """The softmax over the scores of the cleaned keys."""
        z = ((clean if self.q is None else self.q) * self.scale) @ clean.mT
        if self.unseen is not None:
            z.masked_fill_(self.unseen, _NEVER)
        return torch.softmax(z, -1, out=z)


@dataclass
class _Dropout:
    """Dropout in the last iteration."""

    p: float
    seed: Tensor | None
    last: int

    def __call__(self, x: Tensor, t: int, heads: _Heads) -> Tensor:
        if self.seed is None or t != self.last:
            return x
        return _philox.dropout(x, self.p, self.seed, heads.own.start * x[0].numel())


def forward(
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    threshold: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    num_iters: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    keeps_state: bool,
    returns_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L, S of the last iteration, and L of all others; the rows' statistics are left as they are.

    The backward pass makes each softmax anew, so it has no use for them.
    """
    wide: Any = {"dtype": torch.float32}
    out = k.new_empty(k.shape)
    sparse_out = k.new_empty(k.shape if returns_sparse else (0,), **wide)
    lows = k.new_empty((num_iters - 1, *k.shape) if keeps_state else (0,), **wide)
    stats = k.new_zeros((num_iters, 2, *k.shape[:3]) if keeps_state else (0,), **wide)
    dropped = _Dropout(dropout_p, seed, num_iters - 1)
    for heads in _chunks(k, v, q, threshold, key_mask, scale, is_causal):
        low, u = torch.zeros_like(heads.k), torch.zeros_like(heads.k)
        for t in range(num_iters):
            sparse = heads.shrunk(heads.k - low + u)
            weights = heads.weights(heads.rounded(heads.k - sparse - u))
            low = heads.only(dropped(weights, t, heads) @ heads.v)
            if t < num_iters - 1:
                u += heads.k
                u -= low
                u -= sparse
                if keeps_state:
                    lows[t].flatten(0, 1)[heads.own] = low
        out.flatten(0, 1)[heads.own] = low
        if returns_sparse:
            sparse_out.flatten(0, 1)[heads.own] = sparse
    return out, sparse_out, lows, stats


def backward(
    dout: Tensor,
    dsparse: Tensor | None,
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    threshold: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lows: Tensor,
    stats: Tensor,
    num_iters: int,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, q and the threshold; those not needed are empty.

    With d for the gradient of a name: in iteration t, dL - du goes through the attention to the
    cleaned keys and v, and from the cleaned keys and u through the shrinkage to L and u before it.
    """
    dk, dv, dq = (k.new_empty(k.shape if need else (0,)) for need in needs[:3])
    dthreshold = threshold.new_empty(threshold.shape if needs[3] else (0,))
    dropped = _Dropout(dropout_p, seed, num_iters - 1)
    for heads in _chunks(k, v, q, threshold, key_mask, scale, is_causal):
        history = _recomputed(heads, [low.flatten(0, 1)[heads.own] for low in lows])
        dlow = _taken(dout, heads.own, heads.rows)
        dsparse_own = None if dsparse is None else _taken(dsparse, heads.own, heads.rows)
        totals = [torch.zeros_like(heads.k) for _ in range(5)]
        dk_own, dv_own, dq_own, dbound, du = totals
        for t in reversed(range(num_iters)):
            a, clean = history[t]
            dtotal = dlow - du
            dk_own += du
            weights = heads.weights(clean)
            dv_own += dropped(weights, t, heads).mT @ dtotal
            dweights = dropped(dtotal @ heads.v.mT, t, heads)
            dscores = torch._softmax_backward_data(dweights, weights, -1, torch.float32)
            if heads.q is None:
                dclean = torch.baddbmm(dscores @ clean, dscores.mT, clean)
            else:
                dq_own.add_(dscores @ clean, alpha=heads.scale)
                dclean = dscores.mT @ heads.q
            dclean *= heads.scale
            da = -du - dclean
            if dsparse_own is not None and t == num_iters - 1:
                da += dsparse_own
            da.masked_fill_(a.abs() < heads.bound, 0)
            dbound.addcmul_(a.sign(), da, value=-1)
            dk_own += dclean
            dk_own += da
            dlow = heads.only(-da)
            du = du - dclean + da
        for gradient, need, own in zip((dk, dv, dq), needs, totals, strict=False):
            if need:
                gradient.flatten(0, 1)[heads.own] = heads.only(own)
        if needs[3]:
            by_token = dbound.sum(-1)
            whole = threshold.dim() == 2
            dthreshold.flatten(0, 1)[heads.own] = by_token.sum(-1) if whole else by_token
    return dk, dv, dq, dthreshold


def _recomputed(heads: _Heads, lows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What every iteration shrinks, and its cleaned keys."""
    history = []
    a, u = heads.k, torch.zeros_like(heads.k)
    for low in (*lows, None):
        sparse = heads.shrunk(a)
        history.append((a, heads.rounded(heads.k - sparse - u)))
        if low is not None:
            u = u + heads.k - low - sparse
            a = heads.k - low + u
    return history


def _chunks(
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
    threshold: Tensor,
    key_mask: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Iterator[_Heads]:
    batch, num_heads, tokens, _ = k.shape
    if k.numel() == 0:
        return
    size = max(_CHUNK // tokens**2, 1)
    bounds = threshold.reshape(batch * num_heads, -1, 1)
    later = torch.ones(1, tokens, tokens, dtype=torch.bool).triu(1) if is_causal else None
    for start in range(0, batch * num_heads, size):
        own = slice(start, min(start + size, batch * num_heads))
        rows, unseen = None, later
        if key_mask is not None:
            mine = key_mask[torch.arange(own.start, own.stop) // num_heads]
            rows, absent = mine[..., None], ~mine[:, None]
            unseen = absent if later is None else absent | later
        mine_q = None if q is None else _taken(q, own, rows)
        mine_k, mine_v = _taken(k, own, rows), _taken(v, own, rows)
        yield _Heads(own, mine_k, mine_v, mine_q, bounds[own], rows, unseen, scale, k.dtype)


def _taken(x: Tensor, own: slice, rows: Tensor | None) -> Tensor:
    """Heads of x [B, H, N, d] in fp32, [C, N, d], with 0 in the place of masked tokens."""
    mine = x.reshape(-1, *x.shape[2:])[own].float()
    return mine if rows is None else torch.where(rows, mine, 0)
