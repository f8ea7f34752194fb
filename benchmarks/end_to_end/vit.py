"""A small vision transformer whose attention is varied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.end_to_end.digits import CLASSES, SIZE
from benchmarks.end_to_end.study import Method
from benchmarks.presets import ImagesPlan
from molex_kernels import RPCAttention

RATES = (2e-3, 5e-3, 1e-3)
LAMS = (4, 2, 1)  # 4 in the published runs


@dataclass(frozen=True)
class Attention:
    """One model's attention: iterations of its first layer and of the others; 0 is plain.

    Without `is_symmetric` there are queries of their own, as in any transformer.
    """

    is_symmetric: bool = True
    first: int = 0
    others: int = 0
    lam: float = 4.0


METHODS: dict[str, Method[Attention]] = {
    "softmax": Method("softmax", lambda _: Attention(is_symmetric=False), "learning rate", RATES),
    "symmetric": Method("symmetric", lambda _: Attention()),
    "rpc_first": Method(
        "RPC, 4 iterations in the first layer", lambda v: Attention(first=4, lam=v), "lambda", LAMS
    ),
    "rpc_all": Method(
        "RPC, 2 iterations in every layer",
        lambda v: Attention(first=2, others=2, lam=v),
        "lambda",
        LAMS,
    ),
}


class ViT(nn.Module):
    """Patches of 2 x 2 pixels, a class token, pre-LN blocks."""

    def __init__(self, plan: ImagesPlan, attention: Attention) -> None:
        super().__init__()
        tokens = (SIZE // plan.patch) ** 2
        self.patch = plan.patch
        self.embed = nn.Linear(plan.patch**2, plan.dim)
        self.start = nn.Parameter(torch.zeros(1, 1, plan.dim))
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens + 1, plan.dim))
        self.blocks = nn.ModuleList(
            Block(plan, attention, attention.others if layer else attention.first)
            for layer in range(plan.layers)
        )
        self.norm = nn.LayerNorm(plan.dim)
        self.head = nn.Linear(plan.dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 8, 8] -> logits [B, 10]."""
        patches = F.unfold(images[:, None], self.patch, stride=self.patch).mT
        x = self.embed(patches)
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, plan: ImagesPlan, attention: Attention, num_iters: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(plan.dim)
        self.attention = RPCAttention(
            plan.dim,
            plan.heads,
            num_iters=max(num_iters, 1),
            lam=attention.lam,
            robust=num_iters > 0,
            projection="kv" if attention.is_symmetric else "qkv",
            qkv_bias=True,
        )
        self.norm2 = nn.LayerNorm(plan.dim)
        self.mlp = nn.Sequential(
            nn.Linear(plan.dim, 2 * plan.dim), nn.GELU(), nn.Linear(2 * plan.dim, plan.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))
