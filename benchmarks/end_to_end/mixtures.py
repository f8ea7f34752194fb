"""The feed-forward half of a block, varied: experts that are routed to, or merged."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.end_to_end.variants import Variant
from benchmarks.presets import TextPlan
from molex_kernels.ops.dispatch.module import MoEMLP
from molex_kernels.ops.merging.gates import cv_squared_loss, segment_gates
from molex_kernels.ops.merging.module import CAMExLinear, CAMExMLP
from molex_kernels.ops.momentum.api import moe_mlp_momentum
from molex_kernels.ops.momentum.state import State
from molex_kernels.ops.momentum.types import Adam, HeavyBall, Rule
from molex_kernels.ops.routing.losses import load_balance_loss
from molex_kernels.ops.routing.module import ACRouter, TopKRouter
from molex_kernels.ops.routing.types import Routing
from molex_kernels.testing import load_ops
from molex_kernels.testing.baselines import dispatch as dispatch_baselines
from molex_kernels.testing.baselines import routing as routing_baselines
from molex_kernels.testing.baselines.merging import published_camex_linear
from molex_kernels.testing.baselines.momentum import published_moe_mlp_momentum
from molex_kernels.testing.opinfo import OpInfo

ACTIVATION = "gelu"


class Passed(NamedTuple):
    """What one mixture hands to the next."""

    routing: Routing | None = None
    state: State | None = None


@functools.cache
def _infos() -> dict[str, OpInfo]:
    return load_ops()


class Routed(nn.Module):
    """Norm, router, experts and, with a rule, momentum. `index` counts the mixtures from 0."""

    def __init__(self, plan: TextPlan, variant: Variant, index: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(plan.dim)
        sizes = plan.dim, plan.experts, plan.top_k
        self.router: ACRouter | TopKRouter = TopKRouter(*sizes)
        if variant.clip is not None and index > 0:
            self.router = ACRouter(*sizes, clip=variant.clip)
        self.experts = MoEMLP(plan.dim, plan.hidden, plan.experts, activation=ACTIVATION)
        self.rule: Rule | None = None
        self.before: Rule | None = None
        if variant.rules is not None:
            self.rule = variant.rules[min(index, 1)]
            self.before = variant.rules[min(index - 1, 1)] if index else None
        self.impl: str | None = None
        self.published = False

    def use(self, name: str | None) -> None:
        """`published`, or an implementation (None: the default of each op)."""
        infos = _infos()
        route = "ac_route" if isinstance(self.router, ACRouter) else "topk_route"
        self.published = name == "published"

        def available(op: str) -> str | None:
            return name if name in infos[op].implementations else None

        self.router.impl = available(route)
        self.experts.impl = available("moe_mlp")
        self.impl = available("moe_mlp_momentum")

    def forward(self, x: Tensor, passed: Passed) -> tuple[Tensor, Passed, Tensor]:
        """x [B, N, D] -> (x with the mixture's step, what goes on, balance loss)."""
        tokens, previous, state = x.flatten(0, 1), *passed
        if isinstance(self.before, Adam) and isinstance(self.rule, HeavyBall):
            state = self.before.heavy_ball_state(state)
        ahead = tokens if self.rule is None else self.rule.lookahead(tokens, state)
        inner = self.norm(ahead)
        routing = self._route(inner, previous)
        if self.rule is None:
            tokens = tokens + self._experts(inner, routing)
        else:
            tokens, state = self._momentum(tokens, inner, routing, state)
        return tokens.view(x.shape), Passed(routing, state), load_balance_loss(routing)

    def _route(self, inner: Tensor, previous: Routing | None) -> Routing:
        if isinstance(self.router, TopKRouter):
            if not self.published:
                return self.router(inner)
            # FastMoE's plain router is the `library` one.
            gate, top_k = self.router.weight, self.router.top_k
            return routing_baselines.library_topk_route(inner, gate, top_k=top_k)
        if not self.published or previous is None:
            return self.router(inner, previous)
        return routing_baselines.published_ac_route(
            inner, self.router.weight, previous.expert_index, top_k=self.router.top_k
        )

    def _operands(self, routing: Routing) -> dict[str, Any]:
        experts = self.experts
        return {
            "expert_index": routing.expert_index,
            "expert_weight": routing.expert_weight,
            "w_up": experts.w_up,
            "w_down": experts.w_down,
            "b_up": experts.b_up,
            "b_down": experts.b_down,
            "activation": ACTIVATION,
        }

    def _experts(self, inner: Tensor, routing: Routing) -> Tensor:
        if self.published:
            return dispatch_baselines.published_moe_mlp(inner, **self._operands(routing))
        return self.experts(inner, routing)

    def _momentum(
        self, x: Tensor, inner: Tensor, routing: Routing, state: State | None
    ) -> tuple[Tensor, State]:
        operands = self._operands(routing) | {"state": state, "rule": self.rule}
        if self.published:
            return published_moe_mlp_momentum(x, expert_input=inner, **operands)
        return moe_mlp_momentum(x, expert_input=inner, impl=self.impl, **operands)


class Merged(nn.Module):
    """Norm and merged experts, a merge for every causal segment.

    The base stands in for one expert, so that the matrices are as many as the routed experts'.
    Biases are left out: the published code has none that run. The first segment's gates are
    uniform, since its own would let it see what it is to predict.
    """

    def __init__(self, plan: TextPlan, rank: int, alpha: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(plan.dim)
        self.experts = CAMExMLP(
            plan.dim,
            plan.hidden,
            plan.experts - 1,
            activation=ACTIVATION,
            rank=rank,
            alpha=alpha,
            segment=plan.segment,
            first="uniform",
            loss_coef=1.0,
        )
        self.published = False

    def use(self, name: str | None) -> None:
        """`published`, or an implementation (None: the default of each op)."""
        self.published = name == "published"
        impl = name if name in _infos()["camex_linear"].implementations else None
        self.experts.up.impl = self.experts.down.impl = impl

    def forward(self, x: Tensor, passed: Passed) -> tuple[Tensor, Passed, Tensor]:
        """x [B, N, D] -> (x with the experts' output, what goes on, balance loss)."""
        inner = self.norm(x)
        if self.published:
            hidden, up = _published_linear(self.experts.up, inner)
            y, down = _published_linear(self.experts.down, F.gelu(hidden))
            return x + y, passed, up + down
        y, loss = self.experts(inner)
        return x + y, passed, loss


def _published_linear(layer: CAMExLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    gates, load = layer.gates(x)
    causal = segment_gates(gates, first=layer.first).flatten(0, 1)
    curvature = layer.curvature()
    y = published_camex_linear(
        x.reshape(causal.shape[0], -1, x.shape[2]),
        layer.base,
        layer.experts,
        causal,
        mask=layer.mask,
        alpha=layer.alpha,
        **({} if curvature is None else curvature._asdict()),
    )
    return y.view(*x.shape[:2], y.shape[2]), cv_squared_loss(gates, load)


def mixture(plan: TextPlan, variant: Variant, index: int) -> Routed | Merged:
    """The mixture of block `index`, counted from 0."""
    if variant.merged is not None:
        return Merged(plan, variant.merged, variant.alpha)
    return Routed(plan, variant, index)
