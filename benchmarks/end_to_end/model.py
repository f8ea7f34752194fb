"""A small byte-level causal transformer whose feed-forward layers are sparse mixtures of experts.

Wiring. Every block is pre-LN and has a mixture. An adaptive-clustering router needs the previous
mixture's routing (a token's cluster is its first previous expert), so the first block has a plain
top-k router in every model. With momentum, the mixture's output is taken from the residual stream
as a step whose state goes from block to block. All models have the same parameters, drawn from the
same seed. The loss is the mean cross-entropy plus a small load-balance loss per mixture.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.end_to_end.variants import Variant
from benchmarks.presets import TextPlan
from molex_kernels._opinfo import OpInfo
from molex_kernels.ops import load_ops
from molex_kernels.ops.dispatch import baselines as dispatch_baselines
from molex_kernels.ops.dispatch.module import MoEMLP
from molex_kernels.ops.momentum.api import moe_mlp_momentum
from molex_kernels.ops.momentum.baselines import published_moe_mlp_momentum
from molex_kernels.ops.momentum.rules import Adam, HeavyBall, Rule
from molex_kernels.ops.momentum.state import State
from molex_kernels.ops.routing import baselines as routing_baselines
from molex_kernels.ops.routing.losses import load_balance_loss
from molex_kernels.ops.routing.module import ACRouter, TopKRouter
from molex_kernels.ops.routing.plan import Routing

VOCABULARY = 256
BALANCE = 0.01
ACTIVATION = "gelu"


@functools.cache
def _infos() -> dict[str, OpInfo]:
    return load_ops()


class Mixture(nn.Module):
    """Norm, router, experts and, with a rule, momentum. `index` counts the mixtures from 0."""

    def __init__(self, plan: TextPlan, variant: Variant, index: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(plan.dim)
        router = ACRouter if variant.adaptive and index > 0 else TopKRouter
        self.router: ACRouter | TopKRouter = router(plan.dim, plan.experts, plan.top_k)
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

    def forward(
        self, x: Tensor, previous: Routing | None, state: State | None
    ) -> tuple[Tensor, Routing, State | None]:
        """x [T, D] -> (x with the mixture's step, routing, state)."""
        if isinstance(self.before, Adam) and isinstance(self.rule, HeavyBall):
            state = self.before.heavy_ball_state(state)
        inner = self.norm(x if self.rule is None else self.rule.lookahead(x, state))
        routing = self._route(inner, previous)
        if self.rule is None:
            f = self._experts(inner, routing)
            return x + f, routing, None
        x, state = self._momentum(x, inner, routing, state)
        return x, routing, state

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


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: pairs of features of x [B, H, N, d] turn with the position."""
    n, half = x.shape[2], x.shape[3] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32)
    angles = torch.arange(n, device=x.device)[:, None] * 1000.0 ** (-steps / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Pre-LN: causal attention, then a mixture."""

    def __init__(self, plan: TextPlan, variant: Variant, index: int) -> None:
        super().__init__()
        self.heads = plan.heads
        self.norm = nn.LayerNorm(plan.dim)
        self.qkv = nn.Linear(plan.dim, 3 * plan.dim, bias=False)
        self.out = nn.Linear(plan.dim, plan.dim, bias=False)
        self.mixture = Mixture(plan, variant, index)

    def forward(
        self, x: Tensor, previous: Routing | None, state: State | None
    ) -> tuple[Tensor, Routing, State | None]:
        """x [B, N, D] -> ([B, N, D], routing, state)."""
        b, n, d = x.shape
        qkv = self.qkv(self.norm(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, d))
        x, routing, state = self.mixture(x.view(b * n, d), previous, state)
        return x.view(b, n, d), routing, state


class ByteTransformer(nn.Module):
    """Next-byte prediction with rotary positions and tied embeddings."""

    def __init__(self, plan: TextPlan, variant: Variant) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, plan.dim)
        self.blocks = nn.ModuleList(Block(plan, variant, i) for i in range(plan.layers))
        self.norm = nn.LayerNorm(plan.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """windows [B, N + 1] int64 -> (nats of each predicted byte [B, N], balance loss [])."""
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.embedding(inputs)
        routing, state, balance = None, None, x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x, routing, state = block(x, routing, state)
            balance = balance + load_balance_loss(routing)
        logits = F.linear(self.norm(x), self.embedding.weight)
        nats = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        return nats, balance

    def use(self, name: str | None) -> None:
        """Runs all mixtures by this implementation, or by `published`; None: by the default."""
        for module in self.modules():
            if isinstance(module, Mixture):
                module.use(name)


def build(plan: TextPlan, variant: Variant, seed: int, device: torch.device) -> ByteTransformer:
    """A model whose parameters depend on the seed alone, not on the variant."""
    torch.manual_seed(seed)
    return ByteTransformer(plan, variant).to(device)
