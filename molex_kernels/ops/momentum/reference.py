"""The momentum updates in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels import _philox
from molex_kernels._dtypes import accumulate_dtype
from molex_kernels.ops.momentum.types import Coefficients

States = tuple[Tensor, ...]
Norm = tuple[Tensor | None, Tensor | None, float]
Old = Sequence[Tensor]
Step = tuple[Tensor, States]


def update(
    x: Tensor,
    f: Tensor,
    state: Sequence[Tensor],
    kind: str,
    c: Coefficients,
    mu: Tensor | None,
    gamma: Tensor | None,
    norm: Norm | None,
    num_states: int,
) -> States:
    """y = keep x - step, normalised if `norm` is given; and the new state.

    `mu` and `gamma` take the place of the coefficients where they are given. An empty state is 0.
    """
    dtype = accumulate_dtype(x.dtype)
    state_dtype = state[0].dtype if state else dtype
    f = f.to(dtype)
    old = [s.to(dtype) for s in state] if state else [torch.zeros_like(f)] * num_states
    m = c.mu if mu is None else mu.to(dtype).reshape(())
    g = c.gamma if gamma is None else gamma.to(dtype).reshape(())
    step, new = _STEPS[kind](f, old, c, m, g)
    y = c.keep * x.to(dtype) - step
    if norm is not None:
        weight, bias, eps = norm
        y = F.layer_norm(y, y.shape[-1:], _to(weight, dtype), _to(bias, dtype), eps)
    return y.to(x.dtype), *(s.to(state_dtype) for s in new)


def dropout(f: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """The dropout of the fused combine: a function of the seed and the element's position."""
    return f if seed is None else _philox.dropout(f, p, seed)


def _linear(f: Tensor, old: Old, c: Coefficients, mu: Any, gamma: Any) -> Step:
    m = mu * old[0] + gamma * f
    return m, (m,)


def _nesterov(f: Tensor, old: Old, c: Coefficients, mu: Any, gamma: Any) -> Step:
    m = mu * old[0] + gamma * f
    return mu * m + gamma * f, (m,)


def _signum(f: Tensor, old: Old, c: Coefficients, mu: Any, gamma: Any) -> Step:
    v = mu * old[0] + gamma * torch.sign(f)
    return v, (v,)


def _adam(f: Tensor, old: Old, c: Coefficients, mu: Any, gamma: Any) -> Step:
    p = c.beta1 * old[0] + c.rest1 * f
    v = c.beta2 * old[1] + c.rest2 * f.square()
    return gamma * p / torch.sqrt(v + c.eps), (p, v)


def _ademamix(f: Tensor, old: Old, c: Coefficients, mu: Any, gamma: Any) -> Step:
    m1 = c.beta1 * old[0] + c.rest1 * f
    v = c.beta2 * old[1] + c.rest2 * f.square()
    m2 = c.beta3 * old[2] + c.rest3 * f
    positive = v > 0  # the root has no slope at 0
    root = torch.where(positive, torch.sqrt(torch.where(positive, c.scale2 * v, 1)), 0)
    return gamma * (c.scale1 * m1 + c.alpha * m2) / (root + c.eps), (m1, v, m2)


_STEPS = {
    "linear": _linear,
    "nesterov": _nesterov,
    "signum": _signum,
    "adam": _adam,
    "mars": _adam,  # of an f that has been corrected
    "ademamix": _ademamix,
}


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
