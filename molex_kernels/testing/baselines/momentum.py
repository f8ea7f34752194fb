"""What the momentum ops are measured against: the authors' operations, one for one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels.ops.momentum.api import Norm
from molex_kernels.ops.momentum.state import State
from molex_kernels.ops.momentum.types import Adam, HeavyBall, Rule
from molex_kernels.testing.baselines.dispatch import library_moe_mlp, published_moe_mlp


def published_momentum_update(
    x: Tensor, f: Tensor, state: State | None, rule: Rule, *, norm: Norm | None = None
) -> tuple[Tensor, State]:
    """Element-wise steps in eager PyTorch, on states that start as tensors of zeros.

    With a residual, which the released Adam layer cancels (`decay=1`).
    """
    if state is None:
        state = tuple(torch.zeros_like(x, dtype=torch.float32) for _ in rule.states)
    if isinstance(rule, Adam):
        p = rule.beta1 * state[0] + (1 - rule.beta1) * f
        v = rule.beta2 * state[1] + (1 - rule.beta2) * (f**2)
        step = (rule.gamma / torch.sqrt(v + rule.eps)) * p
        y, new = (1 - rule.decay) * x - step, [p, v]
    elif type(rule) is HeavyBall:
        m = rule.mu * state[0] + rule.gamma * f
        y, new = x - m, [m]
    else:
        raise NotImplementedError(f"the authors released no code for {type(rule).__name__}")
    y = y.to(x.dtype)
    if norm is not None:
        weight, bias = (None if p is None else p.to(y.dtype) for p in norm[:2])
        y = F.layer_norm(y, y.shape[-1:], weight, bias, norm[2])
    return y, tuple(new)


def three_clones(x: Tensor, **_: Any) -> tuple[Tensor, ...]:
    """Three copies of x: six of the seven tensors that Adam's update must read or write."""
    if torch.is_grad_enabled():
        raise NotImplementedError("the copies stand for the forward pass alone")
    return x.clone(), x.clone(), x.clone()


def published_moe_mlp_momentum(
    x: Tensor,
    *,
    state: State | None,
    rule: Rule,
    expert_input: Tensor | None = None,
    norm: Norm | None = None,
    **experts: Any,
) -> tuple[Tensor, State]:
    """FastMoE's steps, then the update's."""
    f = published_moe_mlp(x if expert_input is None else expert_input, **experts)
    return published_momentum_update(x, f, state, rule, norm=norm)


def library_moe_mlp_momentum(
    x: Tensor, *, state: State | None, rule: Rule, norm: Norm | None = None, **experts: Any
) -> tuple[Tensor, State]:
    """`F.grouped_mm` between a permutation and its inverse, then the update's eager steps."""
    return published_momentum_update(x, library_moe_mlp(x, **experts), state, rule, norm=norm)
