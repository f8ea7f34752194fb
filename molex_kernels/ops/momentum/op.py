"""Operators of the momentum ops and their gradients.

One pair of operators serves every rule, with the experts' outputs already summed or not. `numbers`
are a rule's coefficients; `mu` and `gamma` take the place of the first two where they are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from molex_kernels import _operators
from molex_kernels.ops.dispatch import op as dispatch

Tensors = tuple[Tensor, ...]
Optional = Tensor | None
Numbers = Sequence[float]

KEEP = 10  # where 1 - decay stands among the numbers


def _forward_fake(
    x: Tensor,
    f: Tensor,
    s0: Optional,
    s1: Optional,
    s2: Optional,
    expert_weight: Optional,
    offsets: Optional,
    inverse: Optional,
    norm_weight: Optional,
    norm_bias: Optional,
    mu: Optional,
    gamma: Optional,
    seed: Optional,
    numbers: Numbers,
    kind: str,
    num_states: int,
    norm_eps: float | None,
    dropout_p: float,
    keeps_f: bool,
) -> Tensors:
    dtype = torch.float32 if s0 is None else s0.dtype
    sizes = [x.shape if index < num_states else (0,) for index in range(3)]
    new = [x.new_empty(size, dtype=dtype) for size in sizes]
    return x.new_empty(x.shape), *new, f.new_empty(x.shape if keeps_f else (0,))


def _forward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.momentum.kernels import launch

    return launch.forward(*arguments)


def _backward_fake(
    like: Tensor,
    dy: Optional,
    g0: Optional,
    g1: Optional,
    g2: Optional,
    x: Optional,
    f: Optional,
    s0: Optional,
    s1: Optional,
    s2: Optional,
    norm_weight: Optional,
    mu: Optional,
    gamma: Optional,
    seed: Optional,
    numbers: Numbers,
    kind: str,
    num_states: int,
    norm_eps: float | None,
    dropout_p: float,
    from_state: bool,
    x_dtype: torch.dtype,
    f_dtype: torch.dtype,
    state_dtype: torch.dtype,
    needs: Sequence[bool],
) -> Tensors:
    sizes = (*(like.shape,) * 5, (2, like.shape[1]), (2,))
    dtypes = (x_dtype, f_dtype, *(state_dtype,) * 3, torch.float32, torch.float32)
    return tuple(
        like.new_empty(size if need else (0,), dtype=dtype)
        for size, dtype, need in zip(sizes, dtypes, needs, strict=True)
    )


def _backward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.momentum.kernels import launch

    return launch.backward(*arguments)


_FORWARD = (
    "(Tensor x, Tensor f, Tensor? s0, Tensor? s1, Tensor? s2, Tensor? expert_weight, "
    "Tensor? offsets, Tensor? inverse, Tensor? norm_weight, Tensor? norm_bias, Tensor? mu, "
    "Tensor? gamma, Tensor? seed, float[] numbers, str kind, int num_states, float? norm_eps, "
    "float dropout_p, bool keeps_f) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor like, Tensor? dy, Tensor? g0, Tensor? g1, Tensor? g2, Tensor? x, Tensor? f, "
    "Tensor? s0, Tensor? s1, Tensor? s2, Tensor? norm_weight, Tensor? mu, Tensor? gamma, "
    "Tensor? seed, float[] numbers, str kind, int num_states, float? norm_eps, float dropout_p, "
    "bool from_state, ScalarType x_dtype, ScalarType f_dtype, ScalarType state_dtype, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_forward = {
    "triton": _operators.define(
        "momentum_fwd_triton", _FORWARD, fake=_forward_fake, run=_forward_triton
    ),
    "cpu": _operators.define("momentum_fwd_cpu", _FORWARD, fake=_forward_fake),
}
_backward = {
    "triton": _operators.define(
        "momentum_bwd_triton", _BACKWARD, fake=_backward_fake, run=_backward_triton
    ),
    "cpu": _operators.define("momentum_bwd_cpu", _BACKWARD, fake=_backward_fake),
}

NUM_OPTIONS = 5  # numbers, kind, num_states, norm_eps, dropout_p


class _Update(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor,
        s0: Optional,
        s1: Optional,
        s2: Optional,
        norm_weight: Optional,
        norm_bias: Optional,
        mu: Optional,
        gamma: Optional,
        impl: str,
        *options: Any,
    ) -> Tensors:
        out = _forward[impl](
            *(x, f, s0, s1, s2, None, None, None, norm_weight, norm_bias, mu, gamma, None),
            *options,
            False,
        )
        y, *new = out[: 1 + options[2]]
        saved = _saved(x, f, new[0], (s0, s1, s2), (norm_weight, norm_bias), mu, gamma, options)
        ctx.save_for_backward(*saved, None)
        ctx.impl, ctx.options = impl, options
        ctx.dtypes = (x.dtype, f.dtype, new[0].dtype)
        ctx.set_materialize_grads(False)
        return y, *new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Optional, *states: Optional) -> tuple[Any, ...]:
        gradients = _update_backward(ctx, ctx.saved_tensors, dy, states, ctx.needs_input_grad[:9])
        return *gradients, None, *(None,) * NUM_OPTIONS


class _MoeMomentum(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s0: Optional,
        s1: Optional,
        s2: Optional,
        norm_weight: Optional,
        norm_bias: Optional,
        mu: Optional,
        gamma: Optional,
        expert_input: Tensor,
        expert_weight: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        b_up: Optional,
        b_down: Optional,
        offsets: Tensor,
        permutation: Tensor,
        inverse: Tensor,
        seed: Optional,
        activation: str,
        layout: str,
        impl: str,
        *options: Any,
    ) -> Tensors:
        experts = (offsets, permutation, w_up, w_down, b_up, b_down, expert_weight.shape[1])
        packed, hidden = dispatch.experts_forward[impl](
            expert_input, *experts, activation, layout, True
        )
        numbers_and_norm = (norm_weight, norm_bias, mu, gamma, seed)
        keeps_f = _needs_step(norm_weight, norm_bias, mu, gamma, options) and not _from_state(
            gamma, options
        )
        y, n0, n1, n2, kept = _forward[impl](
            *(x, packed, s0, s1, s2, expert_weight, offsets, inverse),
            *numbers_and_norm,
            *options,
            keeps_f,
        )
        new = (n0, n1, n2)[: options[2]]
        saved = _saved(x, kept, n0, (s0, s1, s2), (norm_weight, norm_bias), mu, gamma, options)
        plan = (offsets, permutation, inverse)
        ctx.save_for_backward(
            *saved, seed, expert_input, hidden, expert_weight, *plan, w_up, w_down, b_down
        )
        ctx.impl, ctx.options, ctx.activation, ctx.layout = impl, options, activation, layout
        ctx.dtypes = (x.dtype, expert_input.dtype, n0.dtype)
        ctx.set_materialize_grads(False)
        return y, *new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Optional, *states: Optional) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_experts = list(needs[8:14])
        rule_needs = (needs[0], any(needs_experts), *needs[1:8])
        dx, df, *rest = _update_backward(ctx, saved[:10], dy, states, rule_needs)
        experts: tuple[Optional, ...] = (None,) * 6
        if df is not None:
            gradients = dispatch.moe_mlp_backward[ctx.impl](
                df, *saved[10:], ctx.activation, ctx.layout, needs_experts
            )
            experts = tuple(
                g if need else None for g, need in zip(gradients, needs_experts, strict=True)
            )
        return dx, *rest, *experts, *(None,) * (7 + NUM_OPTIONS)


def _from_state(gamma: Optional, options: tuple[Any, ...]) -> bool:
    """Whether the new state, which lives on anyway, stands in for f in the backward pass."""
    return options[2] == 1 and gamma is None


def _needs_step(
    norm_weight: Optional,
    norm_bias: Optional,
    mu: Optional,
    gamma: Optional,
    options: tuple[Any, ...],
) -> bool:
    """Whether the backward pass computes the step anew: a fixed linear one, it does not."""
    return options[2] > 1 or options[3] is not None or mu is not None or gamma is not None


def _saved(
    x: Tensor,
    f: Tensor,
    new: Tensor,
    states: tuple[Optional, ...],
    norm: tuple[Optional, Optional],
    mu: Optional,
    gamma: Optional,
    options: tuple[Any, ...],
) -> tuple[Optional, ...]:
    """x, f, the states, and the parameters: None for what the backward pass does not read."""
    if not _needs_step(*norm, mu, gamma, options):
        return (None,) * 9
    kept = new if _from_state(gamma, options) else f
    return x if options[3] is not None else None, kept, *states, *norm, mu, gamma


def _update_backward(
    ctx: Any,
    saved: Sequence[Optional],
    dy: Optional,
    states: Sequence[Optional],
    needs: Sequence[bool],
) -> tuple[Optional, ...]:
    """Gradients of x, f, the three states, the norm's weight and bias, mu and gamma."""
    x, f, s0, s1, s2, norm_weight, norm_bias, mu, gamma, seed = saved
    numbers, _, num_states, norm_eps, _ = ctx.options
    like = next((g for g in (dy, *states) if g is not None), None)
    if like is None:
        return (None,) * 9
    # Without a norm and decay x goes through as it is, and so does its gradient.
    same = norm_eps is None and numbers[KEEP] == 1.0
    wanted = [
        needs[0] and not same and dy is not None,
        *needs[1:5],
        (needs[5] or needs[6]) and dy is not None,
        needs[7] or needs[8],
    ]
    if not any(wanted):
        return dy if needs[0] and same else None, *(None,) * 8
    gs = (*states, *(None,) * (3 - num_states))
    found = _backward[ctx.impl](
        *(like, dy, *gs, x, f, s0, s1, s2, norm_weight, mu, gamma, seed),
        *ctx.options,
        f is not None and _from_state(gamma, ctx.options),
        *ctx.dtypes,
        wanted,
    )
    dx, df, d0, d1, d2, dnorm, dnumbers = (
        g if want else None for g, want in zip(found, wanted, strict=True)
    )
    if needs[0] and same:
        dx = dy
    return (
        *(dx, df, d0, d1, d2),
        _row(dnorm, 0, norm_weight, needs[5]),
        _row(dnorm, 1, norm_bias, needs[6]),
        _row(dnumbers, 0, mu, needs[7]),
        _row(dnumbers, 1, gamma, needs[8]),
    )


def _row(sums: Optional, index: int, parameter: Optional, needed: bool) -> Optional:
    if sums is None or parameter is None or not needed:
        return None
    return sums[index].to(parameter.dtype).view(parameter.shape)


def update(
    x: Tensor,
    f: Tensor,
    state: Sequence[Tensor],
    norm: tuple[Optional, Optional],
    mu: Optional,
    gamma: Optional,
    impl: str,
    options: tuple[Any, ...],
) -> Tensors:
    """y and the new state by the operator of `impl`, through autograd where a gradient is wanted.

    `options` are numbers, kind, num_states, norm_eps and dropout_p (0 here).
    """
    states = (*state, *(None,) * (3 - len(state)))
    if _operators.wants_grad(x, f, *states, *norm, mu, gamma):
        return _Update.apply(x, f, *states, *norm, mu, gamma, impl, *options)
    out = _forward[impl](x, f, *states, None, None, None, *norm, mu, gamma, None, *options, False)
    return out[: 1 + options[2]]


def moe_momentum(
    x: Tensor,
    state: Sequence[Tensor],
    norm: tuple[Optional, Optional],
    mu: Optional,
    gamma: Optional,
    expert_input: Tensor,
    expert_weight: Tensor,
    experts: tuple[Tensor, Tensor, Optional, Optional],
    plan: tuple[Tensor, Tensor, Tensor],
    seed: Optional,
    activation: str,
    layout: str,
    impl: str,
    options: tuple[Any, ...],
) -> Tensors:
    """y and the new state of the experts, their combine, the update and the norm."""
    states = (*state, *(None,) * (3 - len(state)))
    parameters = (*norm, mu, gamma)
    if _operators.wants_grad(x, *states, *parameters, expert_input, expert_weight, *experts):
        return _MoeMomentum.apply(
            *(x, *states, *parameters, expert_input, expert_weight, *experts, *plan, seed),
            *(activation, layout, impl),
            *options,
        )
    offsets, permutation, inverse = plan
    packed, _ = dispatch.experts_forward[impl](
        *(expert_input, offsets, permutation, *experts, expert_weight.shape[1]),
        *(activation, layout, False),
    )
    out = _forward[impl](
        *(x, packed, *states, expert_weight, offsets, inverse, *parameters, seed),
        *options,
        False,
    )
    return out[: 1 + options[2]]
