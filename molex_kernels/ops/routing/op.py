"""Operators of the routing ops and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molex_kernels import _operators
from molex_kernels.ops.routing import reference

_TRITON = "molex_kernels.ops.routing.kernels.launch"
_WEIGHING = "Tensor? table, Tensor? labels, Tensor? mix"
_CHOICE = "int top_k, str score, int num_groups, int top_groups, bool renormalize, float scaling"
_BALANCE = "Tensor? sequence, Tensor? totals, float temperature, bool per_assignment, int ranks"


def _route_fake(a: Any) -> tuple[Tensor, ...]:
    tokens, experts = a.x.shape[0], a.gate.shape[0]
    return (
        a.x.new_empty(tokens, a.top_k, dtype=torch.int64),
        a.x.new_empty(tokens, a.top_k, dtype=torch.float32),
        a.x.new_empty(tokens, experts, dtype=torch.float32),
    )


def _choice_fake(a: Any) -> tuple[Tensor, Tensor]:
    size = (a.logits.shape[0], a.top_k)
    return (
        a.logits.new_empty(size, dtype=torch.int64),
        a.logits.new_empty(size, dtype=torch.float32),
    )


def _plan_fake(a: Any) -> tuple[Tensor, ...]:
    sizes = (a.num_experts, torch.int32), (a.expert_index.numel(), torch.int64)
    return tuple(a.expert_index.new_empty(n, dtype=t) for n, t in sizes for _ in range(2))


def _statistics_fake(a: Any) -> tuple[Tensor, Tensor]:
    return (
        a.x.new_empty(a.num_clusters, a.x.shape[1], dtype=torch.float32),
        a.x.new_empty(a.num_clusters, dtype=torch.int32),
    )


def _scalar(a: Any) -> Tensor:
    return a.logits.new_empty((), dtype=torch.float32)


# The gradients are of x, the gate and its bias, from both of the float results.
route = _operators.Pass(
    "router",
    "(Tensor x, Tensor gate, Tensor? gate_bias, Tensor? expert_bias, "
    f"{_WEIGHING}, {_CHOICE}) -> (Tensor index, Tensor weight, Tensor logits)",
    "(Tensor? dweight, Tensor? dlogits, Tensor x, Tensor gate, Tensor logits, Tensor index, "
    f"Tensor weight, {_WEIGHING}, str score, bool renormalize, float scaling, bool[] needs)"
    " -> (Tensor dx, Tensor dgate, Tensor dgate_bias)",
    fake=_route_fake,
    like={"gate_bias": lambda a: a.logits.new_empty(a.gate.shape[0])},
    triton=_TRITON,
    reference=lambda a: reference.route(*a),
    public=3,
    op="topk_route, ac_route",
)

# `given` experts are weighed as they are; an id outside [0, E) has the index -1 and weight 0.
choice = _operators.Pass(
    "choice",
    f"(Tensor logits, Tensor? expert_bias, Tensor? given, {_CHOICE})"
    " -> (Tensor index, Tensor weight)",
    "(Tensor dweight, Tensor logits, Tensor index, Tensor weight, str score, bool renormalize, "
    "float scaling) -> Tensor dlogits",
    fake=_choice_fake,
    triton=_TRITON,
    reference=lambda a: reference.choose_or_weigh(*a),
    public=2,
    op="route_from_logits, route_from_index",
)

plan = _operators.Pass(
    "route_plan",
    "(Tensor expert_index, int num_experts)"
    " -> (Tensor counts, Tensor offsets, Tensor permutation, Tensor inverse)",
    fake=_plan_fake,
    triton=_TRITON,
    reference=lambda a: reference.route_plan(*a),
)

# stat="sum": the sums of the clusters' tokens. Else the deviations, by the sums and counts of a
# larger whole where they are given. The second result is the counts.
statistics = _operators.Pass(
    "cluster_statistics",
    "(Tensor x, Tensor cluster, Tensor? sums, Tensor? counts, int num_clusters, str stat)"
    " -> (Tensor deviations, Tensor sizes)",
    fake=_statistics_fake,
    triton=_TRITON,
    reference=lambda a: reference.cluster_statistics(*a),
)

weights = _operators.Pass(
    "feature_weights",
    "(Tensor deviations, Tensor counts, float eps, float clip, str norm, bool mask) -> Tensor",
    fake=lambda a: a.deviations.new_empty(a.deviations.shape),
    triton=_TRITON,
    reference=lambda a: reference.feature_weights(*a),
)

# Both for the clusters of these tokens alone, where the parts of the sums need not be put together.
cluster_weights = _operators.Pass(
    "cluster_weights",
    "(Tensor x, Tensor cluster, int num_clusters, str stat, float eps, float clip, str norm, "
    "bool mask) -> Tensor",
    fake=lambda a: _statistics_fake(a)[0],
    triton=_TRITON,
    cpu="molex_kernels.ops.routing.clusters",
    native=(),
    reference=lambda a: reference.cluster_weights(*a),
    op="ac_weights, ac_route",
)

# Totals are sums over that many ranks, for a loss whose mean over the ranks is that of all tokens.
load_balance = _operators.Pass(
    "load_balance",
    f"(Tensor logits, Tensor index, Tensor? mask, {_BALANCE}) -> Tensor loss",
    f"(Tensor dloss, Tensor logits, Tensor index, Tensor? mask, {_BALANCE}) -> Tensor dlogits",
    fake=_scalar,
    reference=lambda a: reference.load_balance(*a),
    op="load_balance_loss",
)

router_z = _operators.Pass(
    "router_z",
    "(Tensor logits, Tensor? mask, Tensor? total, int ranks) -> Tensor loss",
    "(Tensor dloss, Tensor logits, Tensor? mask, Tensor? total, int ranks) -> Tensor dlogits",
    fake=_scalar,
    reference=lambda a: reference.router_z(*a),
    op="router_z_loss",
)
