"""A small byte-level causal transformer whose feed-forward layers are sparse mixtures of experts.

Wiring. Every block has a mixture. An adaptive-clustering router needs the previous mixture's
routing (a token's cluster is its first previous expert), so the first block has a plain top-k
router in both models, and blocks 1, 2, ... have an `ACRouter` in one model and a `TopKRouter` in
the other. The models have the same parameters, drawn from the same seed. The loss is the mean
cross-entropy plus a small load-balance loss per mixture.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.presets import TextPlan
from molex_kernels._opinfo import OpInfo
from molex_kernels.ops import load_ops
from molex_kernels.ops.dispatch.module import MoEMLP
from molex_kernels.ops.routing.losses import load_balance_loss
from molex_kernels.ops.routing.module import ACRouter, TopKRouter
from molex_kernels.ops.routing.plan import Routing

VOCABULARY = 256
BALANCE = 0.01
ACTIVATION = "gelu"
ROUTERS = ("topk", "ac")


@functools.cache
def _infos() -> dict[str, OpInfo]:
    return load_ops()


class Mixture(nn.Module):
    """A router and its experts. `adaptive` asks for the previous mixture's routing."""

    def __init__(self, plan: TextPlan, *, adaptive: bool) -> None:
        super().__init__()
        router = ACRouter if adaptive else TopKRouter
        self.router: ACRouter | TopKRouter = router(plan.dim, plan.experts, plan.top_k)
        self.experts = MoEMLP(plan.dim, plan.hidden, plan.experts, activation=ACTIVATION)
        self.published = False

    @property
    def adaptive(self) -> bool:
        """Which router it has."""
        return isinstance(self.router, ACRouter)

    def use(self, name: str | None) -> None:
        """`published`, or an implementation (None: the default of each op)."""
        infos = _infos()
        route = "ac_route" if self.adaptive else "topk_route"
        self.published = name == "published"
        for module, op in ((self.router, route), (self.experts, "moe_mlp")):
            module.impl = name if name in infos[op].implementations else None

    def forward(self, x: Tensor, previous: Routing | None) -> tuple[Tensor, Routing]:
        """x [T, D] -> ([T, D], routing)."""
        if self.published:
            return self._published(x, previous)
        routing = self.router(x, previous) if self.adaptive else self.router(x)
        return self.experts(x, routing), routing

    def _published(self, x: Tensor, previous: Routing | None) -> tuple[Tensor, Routing]:
        """The same by the baselines; FastMoE's plain router is the `library` one."""
        infos = _infos()
        gate: dict[str, Any] = {"gate_weight": self.router.weight, "top_k": self.router.top_k}
        if self.adaptive and previous is not None:
            route = infos["ac_route"].baselines["published"]
            routing = route(x, prev_index=previous.expert_index, **gate)
        else:
            routing = infos["topk_route"].baselines["library"](x, **gate)
        experts = self.experts
        y = infos["moe_mlp"].baselines["published"](
            x,
            routing.expert_index,
            routing.expert_weight,
            experts.w_up,
            experts.w_down,
            b_up=experts.b_up,
            b_down=experts.b_down,
            activation=ACTIVATION,
        )
        return y, routing


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

    def __init__(self, plan: TextPlan, *, adaptive: bool) -> None:
        super().__init__()
        self.heads = plan.heads
        self.norm_attention = nn.LayerNorm(plan.dim)
        self.qkv = nn.Linear(plan.dim, 3 * plan.dim, bias=False)
        self.out = nn.Linear(plan.dim, plan.dim, bias=False)
        self.norm_mixture = nn.LayerNorm(plan.dim)
        self.mixture = Mixture(plan, adaptive=adaptive)

    def forward(self, x: Tensor, previous: Routing | None) -> tuple[Tensor, Routing]:
        """x [B, N, D] -> ([B, N, D], routing)."""
        b, n, d = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, d))
        y, routing = self.mixture(self.norm_mixture(x).view(b * n, d), previous)
        return x + y.view(b, n, d), routing


class ByteTransformer(nn.Module):
    """Next-byte prediction with rotary positions and tied embeddings."""

    def __init__(self, plan: TextPlan, router: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, plan.dim)
        self.blocks = nn.ModuleList(
            Block(plan, adaptive=router == "ac" and index > 0) for index in range(plan.layers)
        )
        self.norm = nn.LayerNorm(plan.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """windows [B, N + 1] int64 -> (nats per byte by window [B], balance loss [])."""
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.embedding(inputs)
        routing, balance = None, x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x, routing = block(x, routing)
            balance = balance + load_balance_loss(routing)
        logits = F.linear(self.norm(x), self.embedding.weight)
        nats = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        return nats.mean(1), balance

    def use(self, name: str | None) -> None:
        """Runs all mixtures by this implementation, or by `published`; None: by the default."""
        for module in self.modules():
            if isinstance(module, Mixture):
                module.use(name)


def build(plan: TextPlan, router: str, seed: int, device: torch.device) -> ByteTransformer:
    """A model whose parameters depend on the seed alone, not on the router."""
    torch.manual_seed(seed)
    return ByteTransformer(plan, router).to(device)
