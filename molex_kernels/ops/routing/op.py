"""Operators of the routing ops and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from molex_kernels import _register
from molex_kernels.ops.routing.plan import RoutePlan, Routing

Tensors = tuple[Tensor, ...]


def _route_fake(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    expert_bias: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
    mix: Tensor | None,
    top_k: int,
    score: str,
) -> Tensors:
    tokens, experts = x.shape[0], gate.shape[0]
    return (
        x.new_empty(tokens, top_k, dtype=torch.int64),
        x.new_empty(tokens, top_k, dtype=torch.float32),
        x.new_empty(tokens, experts, dtype=torch.float32),
    )


def _route_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.routing.kernels import router

    return router.launch_fwd(*arguments)


def _route_backward_fake(
    x: Tensor,
    gate: Tensor,
    logits: Tensor,
    index: Tensor,
    weight: Tensor,
    grad_weight: Tensor | None,
    grad_logits: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
    mix: Tensor | None,
    score: str,
    needs: list[bool],
) -> Tensors:
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        gate.new_empty(gate.shape if needs[1] else (0,)),
        logits.new_empty(gate.shape[0] if needs[2] else 0),
    )


def _route_backward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.routing.kernels import router_backward

    return router_backward.launch_bwd(*arguments)


def _plan_fake(expert_index: Tensor, num_experts: int) -> Tensors:
    total = expert_index.shape[0] * expert_index.shape[1]
    return (
        expert_index.new_empty(num_experts, dtype=torch.int32),
        expert_index.new_empty(num_experts, dtype=torch.int32),
        expert_index.new_empty(total, dtype=torch.int64),
        expert_index.new_empty(total, dtype=torch.int64),
    )


def _plan_triton(expert_index: Tensor, num_experts: int) -> Tensors:
    from molex_kernels.ops.routing.kernels import plan

    return plan.launch_plan(expert_index, num_experts)


def _sum_fake(x: Tensor, permutation: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], dtype=torch.float32)


def _sum_triton(x: Tensor, permutation: Tensor, offsets: Tensor) -> Tensor:
    from molex_kernels.ops.routing.kernels import statistics

    return statistics.launch_sum(x, permutation, offsets)


def _deviation_fake(
    x: Tensor,
    cluster: Tensor,
    permutation: Tensor,
    offsets: Tensor,
    sums: Tensor,
    counts: Tensor,
    stat: str,
) -> Tensor:
    return sums.new_empty(sums.shape)


def _deviation_triton(
    x: Tensor,
    cluster: Tensor,
    permutation: Tensor,
    offsets: Tensor,
    sums: Tensor,
    counts: Tensor,
    stat: str,
) -> Tensor:
    from molex_kernels.ops.routing.kernels import statistics

    if stat == "pairwise":
        return statistics.launch_pairwise(x, cluster, offsets, sums, counts)
    return statistics.launch_deviation(x, permutation, offsets, sums, counts, stat)


def _weights_fake(
    deviations: Tensor, counts: Tensor, eps: float, clip: float, norm: str, mask: bool
) -> Tensor:
    return deviations.new_empty(deviations.shape)


def _weights_triton(
    deviations: Tensor, counts: Tensor, eps: float, clip: float, norm: str, mask: bool
) -> Tensor:
    from molex_kernels.ops.routing.kernels import statistics

    return statistics.launch_weights(deviations, counts, eps, clip, norm, mask)


def _statistics_fake(
    x: Tensor,
    cluster: Tensor,
    sums: Tensor | None,
    counts: Tensor | None,
    num_clusters: int,
    stat: str,
) -> Tensors:
    return (
        x.new_empty(num_clusters, x.shape[1], dtype=torch.float32),
        x.new_empty(num_clusters, dtype=torch.int32),
    )


_PLAN_SCHEMA = "(Tensor expert_index, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)"

_ROUTE_SCHEMA = (
    "(Tensor x, Tensor gate, Tensor? gate_bias, Tensor? expert_bias, Tensor? table, "
    "Tensor? labels, Tensor? mix, int top_k, str score) -> (Tensor, Tensor, Tensor)"
)
_ROUTE_BACKWARD_SCHEMA = (
    "(Tensor x, Tensor gate, Tensor logits, Tensor index, Tensor weight, Tensor? grad_weight, "
    "Tensor? grad_logits, Tensor? table, Tensor? labels, Tensor? mix, str score, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)"
)
_WEIGHTS_SCHEMA = (
    "(Tensor deviations, Tensor counts, float eps, float clip, str norm, bool mask) -> Tensor"
)

_route = {
    "triton": _register.define(
        "router_fwd_triton", _ROUTE_SCHEMA, fake=_route_fake, run=_route_triton
    ),
    "cpu": _register.define("router_fwd_cpu", _ROUTE_SCHEMA, fake=_route_fake),
}
_route_backward = {
    "triton": _register.define(
        "router_bwd_triton",
        _ROUTE_BACKWARD_SCHEMA,
        fake=_route_backward_fake,
        run=_route_backward_triton,
    ),
    "cpu": _register.define("router_bwd_cpu", _ROUTE_BACKWARD_SCHEMA, fake=_route_backward_fake),
}
PLAN_TRITON = _register.define("route_plan_triton", _PLAN_SCHEMA, fake=_plan_fake, run=_plan_triton)
PLAN_CPU = _register.define("route_plan_cpu", _PLAN_SCHEMA, fake=_plan_fake)
SUM_TRITON = _register.define(
    "cluster_sum_triton",
    "(Tensor x, Tensor permutation, Tensor offsets) -> Tensor",
    fake=_sum_fake,
    run=_sum_triton,
)
DEVIATION_TRITON = _register.define(
    "cluster_deviation_triton",
    "(Tensor x, Tensor cluster, Tensor permutation, Tensor offsets, Tensor sums, Tensor counts, "
    "str stat) -> Tensor",
    fake=_deviation_fake,
    run=_deviation_triton,
)
WEIGHTS_TRITON = _register.define(
    "feature_weights_triton", _WEIGHTS_SCHEMA, fake=_weights_fake, run=_weights_triton
)
WEIGHTS_CPU = _register.define("feature_weights_cpu", _WEIGHTS_SCHEMA, fake=_weights_fake)
STATISTICS_CPU = _register.define(
    "cluster_statistics_cpu",
    "(Tensor x, Tensor cluster, Tensor? sums, Tensor? counts, int num_clusters, str stat) "
    "-> (Tensor, Tensor)",
    fake=_statistics_fake,
)


def _scalar(logits: Tensor) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


def _balance_fake(
    logits: Tensor, index: Tensor, temperature: float, per_assignment: bool
) -> Tensors:
    padded = -(-logits.shape[1] // 16) * 16  # whole vectors, kWide of csrc/cpu/common/vector.h
    return _scalar(logits), logits.new_empty(padded, dtype=torch.float32)


def _logits_fake(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_balance = _register.define(
    "load_balance_fwd_cpu",
    "(Tensor logits, Tensor index, float temperature, bool per_assignment) -> (Tensor, Tensor)",
    fake=_balance_fake,
)
_balance_backward = _register.define(
    "load_balance_bwd_cpu",
    "(Tensor grad, Tensor logits, Tensor slopes, float temperature) -> Tensor",
    fake=_logits_fake,
)
_z = _register.define("router_z_fwd_cpu", "(Tensor logits) -> Tensor", fake=_scalar)
_z_backward = _register.define(
    "router_z_bwd_cpu", "(Tensor grad, Tensor logits) -> Tensor", fake=_logits_fake
)


class _Balance(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, index: Tensor, temperature: float, per_assignment: bool
    ) -> Tensor:
        loss, slopes = _balance(logits, index, temperature, per_assignment)
        ctx.save_for_backward(logits, slopes)
        ctx.temperature = temperature
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _balance_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None, None


class _Z(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return _z(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _z_backward(grad, *ctx.saved_tensors)


def load_balance(logits: Tensor, index: Tensor, temperature: float, per_assignment: bool) -> Tensor:
    """The loss by the compiled extension, through autograd where a gradient is wanted."""
    if _register.wants_grad(logits):
        return _Balance.apply(logits, index, temperature, per_assignment)
    return _balance(logits, index, temperature, per_assignment)[0]


def router_z(logits: Tensor) -> Tensor:
    """The loss by the compiled extension, through autograd where a gradient is wanted."""
    return _Z.apply(logits) if _register.wants_grad(logits) else _z(logits)


class _Route(Function):
    """The router with gradients of x, the gate and its bias, from both of its float results."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        gate_bias: Tensor | None,
        expert_bias: Tensor | None,
        table: Tensor | None,
        labels: Tensor | None,
        mix: Tensor | None,
        top_k: int,
        score: str,
        impl: str,
    ) -> Tensors:
        index, weight, logits = _route[impl](
            x, gate, gate_bias, expert_bias, table, labels, mix, top_k, score
        )
        ctx.save_for_backward(x, gate, logits, index, weight, table, labels, mix)
        ctx.score, ctx.impl = score, impl
        ctx.bias_dtype = None if gate_bias is None else gate_bias.dtype
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return index, weight, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, grad_weight: Tensor | None, grad_logits: Tensor | None) -> Any:
        x, gate, logits, index, weight, table, labels, mix = ctx.saved_tensors
        if grad_weight is None and grad_logits is None:
            return (None,) * 10
        needs = list(ctx.needs_input_grad[:3])
        dx, dgate, dbias = _route_backward[ctx.impl](
            x, gate, logits, index, weight, grad_weight, grad_logits,
            table, labels, mix, ctx.score, needs,
        )  # fmt: skip
        return (
            dx if needs[0] else None,
            dgate if needs[1] else None,
            dbias.to(ctx.bias_dtype) if needs[2] else None,
            *(None,) * 7,
        )


def route(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    expert_bias: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
    mix: Tensor | None,
    top_k: int,
    score: str,
    impl: str,
) -> Routing:
    """The router by the operator of `impl`, through autograd where a gradient is wanted."""
    arguments = (x, gate, gate_bias, expert_bias, table, labels, mix, top_k, score)
    if _register.wants_grad(x, gate, gate_bias):
        return Routing(*_Route.apply(*arguments, impl))
    return Routing(*_route[impl](*arguments))


def plan_triton(expert_index: Tensor, num_experts: int) -> RoutePlan:
    """The plan by three Triton kernels."""
    return RoutePlan(*PLAN_TRITON(expert_index, num_experts))


def plan_cpu(expert_index: Tensor, num_experts: int) -> RoutePlan:
    """The plan by the compiled extension."""
    return RoutePlan(*PLAN_CPU(expert_index, num_experts))
