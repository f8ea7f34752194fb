"""Momentum over the outputs of expert layers: public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels import _check, _dtypes, _philox
from molex_kernels._backends import CPU, REFERENCE, TRITON, declare, select
from molex_kernels.ops.dispatch.api import experts_arguments, moe_mlp
from molex_kernels.ops.dispatch.types import Activation
from molex_kernels.ops.momentum import op, reference
from molex_kernels.ops.momentum import state as states
from molex_kernels.ops.momentum.state import State
from molex_kernels.ops.momentum.types import Mars, Rule
from molex_kernels.ops.routing.types import RoutePlan

Norm = tuple[Tensor | None, Tensor | None, float]

declare("momentum_update", TRITON, CPU, REFERENCE)
declare("moe_mlp_momentum", TRITON, CPU, REFERENCE)
# By the number of averages: wider rows do not fit into the registers of one Triton program.
_MAX_NORM_WIDTH = {1: 4096, 2: 4096, 3: 2048}


def momentum_update(
    x: Tensor,
    f: Tensor,
    state: State | None,
    rule: Rule,
    *,
    norm: Norm | None = None,
    impl: str | None = None,
) -> tuple[Tensor, State]:
    """One step of a rule: the experts' output f is taken for a gradient and x moves against it.

    y = (1 - decay) x - step(f, state), state' = ..., by the equations of the rule: `HeavyBall`,
    `Nesterov`, `Adam`, `RobustMomentum`, `AdEMAMix`, `Signum` or `Mars`. With `norm`, LayerNorm(y)
    is returned in place of y, in the same pass.

    MomentumSMoE (arXiv 2410.14574) writes p = -m and adds f; its code subtracts m, as here. The two
    differ by the sign of f, which the experts' last layer learns; it matters only for weights that
    were trained without momentum (`MomentumMoE` has `sign` for them).

    Differentiable in x, f, the state, learned mu and gamma, and the norm's weight and bias, once;
    nothing is detached except where the rule says so. For a fixed linear rule without norm the
    backward pass keeps no tensor at all. Under autocast nothing is cast to 16 bits: state and norm
    may be of any 16-bit dtype or fp32. Deterministic. Never waits for the device.

    Args:
        x: [..., D], the layer's input, D >= 1. fp16, bf16, fp32 (fp64: reference only).
        f: of x's shape, the experts' output. Of any of these dtypes, so that a residual stream in
            fp32 takes an f from autocast; fp64 with fp64 only.
        state: what the call of the previous layer returned, or None in the first layer, where all
            of it is 0. Its tensors have x's shape and are fp32, or x's dtype to save memory; the
            arithmetic is fp32 either way. Never modified in place.
        rule: one of the dataclasses above. `mu` and `gamma` may be tensors of one element, which
            then receive gradients; they are read on the device.
        norm: (weight [D] or None, bias [D] or None, eps > 0), of x's dtype or fp32.
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports the inputs. Under
            "triton", rows of more than 4096 features (2048 for AdEMAMix) are normalised by
            `F.layer_norm` in a second pass.

    Returns:
        y of x's shape and dtype, and the new state, in fp32 if `state` is None. Parts of the state
        that need no arithmetic (`x_prev`, `f_prev`) are x and f themselves, not copies.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or length of the state.
        NotImplementedError: the explicit `impl` cannot run.
    """
    _check_rule(rule)
    _check_x(x)
    f_dtypes = _dtypes.f_dtypes(x)
    _check.same_shape("f", f, f_dtypes, x, "x")
    state = states.checked(state, rule, x, f_dtypes)
    norm = _checked_norm(norm, x)
    _check_learned(rule, x)
    chosen = select("momentum_update", impl, x)
    return _update(x, f, state, rule, norm, chosen, impl)


def moe_mlp_momentum(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    state: State | None,
    rule: Rule,
    *,
    expert_input: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: Activation = "relu",
    gate_layout: str = "concat",
    plan: RoutePlan | None = None,
    norm: Norm | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, State]:
    """A sparse mixture of experts and a step of momentum over its output, in one pass.

    f = dropout(moe_mlp(expert_input, ...));  y, state' = momentum_update(x, f, state, rule, norm).

    The sum over the chosen experts, their weights, dropout, the step and the norm are one kernel: f
    is not written, except where the backward pass needs it (rules with two or more states, a
    learned gamma). `Mars` has a norm over the whole sample before its step, so there f is written
    and the two functions run one after the other.

    Differentiable in everything floating but the seed, once. Under autocast, expert_input and the
    experts' parameters are cast; x, the state and the norm keep their precision. Deterministic for
    a given seed. Never waits for the device.

    Args:
        x: [..., D], the residual stream that the step is subtracted from. Leading dimensions are
            flattened to T tokens for the experts.
        expert_index: [..., K] int64 or int32.
        expert_weight: [..., K], fp32 or expert_input's dtype.
        w_up: as in `moe_mlp`.
        w_down: as in `moe_mlp`.
        state: as in `momentum_update`.
        rule: as in `momentum_update`.
        expert_input: of x's shape, what the experts see; None is x. `rule.lookahead(x, state)` for
            `RobustMomentum`, the normalised x in a pre-LN block.
        b_up: as in `moe_mlp`.
        b_down: as in `moe_mlp`.
        activation: as in `moe_mlp`.
        gate_layout: as in `moe_mlp`.
        plan: as in `moe_mlp`.
        norm: as in `momentum_update`.
        dropout_p: probability that an element of f is dropped, in [0, 1); the others are divided by
            1 - dropout_p. 0 in evaluation.
        dropout_seed: int64 scalar on x's device; the same seed drops the same elements, whatever
            the implementation. None draws one from torch's generator. Ignored when dropout_p is 0.
        impl: "triton" (E <= 1024), "cpu" or "reference"; None takes the fastest that supports the
            inputs. The reference sends every token to every expert.

    Returns:
        y of x's shape and dtype, and the new state.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or option.
        NotImplementedError: the explicit `impl` cannot run.
    """
    _check_rule(rule)
    _check_x(x)
    width = x.shape[-1]
    inner = x if expert_input is None else expert_input
    _check.same_shape("expert_input", inner, _dtypes.f_dtypes(x), x, "x")
    _check_routing("expert_index", expert_index, x, _dtypes.INDEX_DTYPES)
    _check_routing("expert_weight", expert_weight, x, _dtypes.FLOAT_DTYPES)
    state = states.checked(state, rule, x, _dtypes.f_dtypes(x))
    norm = _checked_norm(norm, x)
    _check_learned(rule, x)
    _philox.check(dropout_p, dropout_seed, x)
    given: Any = (
        inner.reshape(-1, width),
        expert_index.reshape(-1, expert_index.shape[-1]),
        expert_weight.reshape(-1, expert_weight.shape[-1]),
        *(w_up, w_down, b_up, b_down, activation, gate_layout, plan),
    )
    experts = experts_arguments(*given)
    chosen = select("moe_mlp_momentum", impl, x, triton=experts.too_many)
    seed = None
    if dropout_p > 0:
        seed = _philox.draw_seed(x) if dropout_seed is None else dropout_seed
    if chosen == "reference" or isinstance(rule, Mars):
        f = moe_mlp(
            *given[:5],
            b_up=b_up,
            b_down=b_down,
            activation=activation,
            gate_layout=gate_layout,
            plan=plan,
            impl=chosen if chosen == "reference" else impl,
        )
        f = reference.dropout(f, dropout_p, seed).view(x.shape)
        return _update(x, f, state, rule, norm, chosen, impl)
    step = states.step_number(state, rule)
    within, apart = _split(norm, rule, x, chosen)
    averages = states.averages(state, rule, width)
    w_up, w_down, b_up, b_down = experts.weights
    offsets, permutation, inverse = experts.rows()
    pointwise, layout, numbers = experts.activation
    arguments = _arguments(x.reshape(-1, width), None, averages, rule, step, within)._replace(
        dropout_p=float(dropout_p),
        seed=seed,
        expert_input=experts.x,
        expert_weight=experts.expert_weight,
        w_up=w_up,
        w_down=w_down,
        b_up=b_up,
        b_down=b_down,
        offsets=offsets,
        permutation=permutation,
        inverse=inverse,
        activation=pointwise,
        layout=layout,
        activation_numbers=numbers,
    )
    new = op.update(impl, arguments)
    return _normalised(new[0], apart).view(x.shape), states.after(new[1:], rule, x, None, step)


def dropout(f: Tensor, p: float) -> Tensor:
    """The dropout of `moe_mlp_momentum`, which drops the same elements for the same generator."""
    return f if p == 0 else reference.dropout(f, p, _philox.draw_seed(f))


def _update(
    x: Tensor,
    f: Tensor,
    state: State | None,
    rule: Rule,
    norm: Norm | None,
    chosen: str,
    impl: str | None,
) -> tuple[Tensor, State]:
    width = x.shape[-1]
    step = states.step_number(state, rule)
    f_prev = states.output_before(state, rule)
    pushed = rule.corrected(f, f_prev) if chosen == "reference" and isinstance(rule, Mars) else f
    flat = (x.reshape(-1, width), pushed.reshape(-1, width), states.averages(state, rule, width))
    within, apart = _split(norm, rule, x, chosen)
    if chosen == "reference":
        numbers, count = rule.coefficients(step), states.num_averages(rule)
        learned = (rule.learned_mu, rule.learned_gamma)
        out = reference.update(*flat, rule.kind, numbers, *learned, within, count)
    else:
        arguments = _arguments(*flat, rule, step, within)
        if isinstance(rule, Mars):
            before = None if f_prev is None else f_prev.detach().reshape(-1, width)
            sample_tokens = x.shape[-2] if x.dim() > 1 else 1
            arguments = arguments._replace(f_prev=before, sample_tokens=sample_tokens)
        out = op.update(impl, arguments)
    return _normalised(out[0], apart).view(x.shape), states.after(out[1:], rule, x, f, step)


def _split(norm: Norm | None, rule: Rule, x: Tensor, impl: str) -> tuple[Norm | None, Norm | None]:
    """The norm inside the kernel, and the one behind it: one of the two is None."""
    widest = _MAX_NORM_WIDTH[states.num_averages(rule)]
    if impl == "triton" and x.shape[-1] > widest:
        return None, norm
    return norm, None


def _normalised(y: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return y
    dtype = _dtypes.accumulate_dtype(y.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in norm[:2])
    return F.layer_norm(y.to(dtype), y.shape[-1:], weight, bias, norm[2]).to(y.dtype)


def _arguments(
    x: Tensor,
    f: Tensor | None,
    state: list[Tensor],
    rule: Rule,
    step: int,
    norm: Norm | None,
) -> op.Arguments:
    """As the operators take them, without dropout and experts."""
    weight, bias, eps = norm or (None, None, None)
    s0, s1, s2 = [*state, None, None, None][:3]
    return op.Arguments(
        x,
        f,
        s0,
        s1,
        s2,
        norm_weight=weight,
        norm_bias=bias,
        mu=rule.learned_mu,
        gamma=rule.learned_gamma,
        numbers=tuple(rule.coefficients(step)),
        kind=rule.kind,
        num_states=states.num_averages(rule),
        norm_eps=None if eps is None else float(eps),
        dropout_p=0.0,
    )


def _check_rule(rule: Any) -> None:
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: expected a rule such as HeavyBall(0.7), got {type(rule).__name__}")


def _check_x(x: Any) -> None:
    _check.trailing("x", x, "..., D")
    if x.shape[-1] < 1:
        raise ValueError(f"x: expected shape [..., D] with D at least 1, got {list(x.shape)}")


def _check_routing(name: str, value: Any, x: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    _check.trailing(name, value, "..., K", dtypes=dtypes)
    if value.shape[:-1] != x.shape[:-1] or value.shape[-1] < 1:
        leading = ", ".join(map(str, x.shape[:-1]))
        raise ValueError(
            f"{name}: expected shape [{leading}, K] with K at least 1, got {list(value.shape)}"
        )


def _checked_norm(norm: Any, x: Tensor) -> Norm | None:
    if norm is None:
        return None
    if not isinstance(norm, tuple | list) or len(norm) != 3:
        raise TypeError(f"norm: expected (weight, bias, eps) or None, got {type(norm).__name__}")
    dtypes = (x.dtype, _dtypes.accumulate_dtype(x.dtype))
    weight, bias = _dtypes.kept(x, *norm[:2])
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check.tensor(f"norm.{name}", value, "D", x.shape[-1:], dtypes, x)
    _check.number("norm.eps", norm[2], 0.0, exclusive=True)
    return weight, bias, norm[2]


def _check_learned(rule: Rule, x: Tensor) -> None:
    for name, value in (("mu", rule.learned_mu), ("gamma", rule.learned_gamma)):
        if value is not None:
            dtypes = (
                _dtypes.KERNEL_DTYPES if x.dtype in _dtypes.KERNEL_DTYPES else _dtypes.FLOAT_DTYPES
            )
            _check.tensor(f"rule.{name}", value, "1", value.shape, dtypes, x)
