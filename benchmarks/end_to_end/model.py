"""A small causal transformer over characters whose feed-forward layers are mixtures of experts.

Wiring. Every block is pre-LN and has a mixture. An adaptive-clustering router needs the previous
mixture's routing (a token's cluster is its first previous expert), so the first block has a plain
top-k router in every model. With momentum, the mixture's output is taken from the residual stream
as a step whose state goes from block to block. Everything outside the mixtures starts the same in
all models, and so do all routed experts; merged ones start as their layer does. The loss is the
mean cross-entropy plus a small balance loss per mixture.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.end_to_end.mixtures import Merged, Passed, Routed, mixture
from benchmarks.end_to_end.variants import Variant
from benchmarks.presets import TextPlan

VOCABULARY = 128
BALANCE = 0.01


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: pairs of features of x [B, H, N, d] turn with the position."""
    cos, sin = _turns(x.shape[2], x.shape[3] // 2, x.device, x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@functools.cache
def _turns(n: int, half: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    steps = torch.arange(half, device=device, dtype=torch.float32)
    angles = torch.arange(n, device=device)[:, None] * 1000.0 ** (-steps / half)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Block(nn.Module):
    """Pre-LN: causal attention, then a mixture."""

    def __init__(self, plan: TextPlan, variant: Variant, index: int) -> None:
        super().__init__()
        self.heads = plan.heads
        self.norm = nn.LayerNorm(plan.dim)
        self.qkv = nn.Linear(plan.dim, 3 * plan.dim, bias=False)
        self.out = nn.Linear(plan.dim, plan.dim, bias=False)
        with torch.random.fork_rng():  # whatever a mixture draws, what follows stays the same
            self.mixture = mixture(plan, variant, index)

    def forward(self, x: Tensor, passed: Passed) -> tuple[Tensor, Passed, Tensor]:
        """x [B, N, D] -> ([B, N, D], what goes to the next mixture, balance loss)."""
        b, n, d = x.shape
        qkv = self.qkv(self.norm(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, d))
        return self.mixture(x, passed)


class ByteTransformer(nn.Module):
    """Next-character prediction with rotary positions and tied embeddings."""

    def __init__(self, plan: TextPlan, variant: Variant) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, plan.dim)
        self.blocks = nn.ModuleList(Block(plan, variant, i) for i in range(plan.layers))
        self.norm = nn.LayerNorm(plan.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """windows [B, N + 1] int64 -> (nats of each prediction [B, N], balance loss [])."""
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.embedding(inputs)
        passed, balance = Passed(), x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x, passed, loss = block(x, passed)
            balance = balance + loss
        logits = F.linear(self.norm(x), self.embedding.weight)
        nats = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        return nats, balance

    def use(self, name: str | None) -> None:
        """Runs all mixtures by this implementation, or by `published`; None: by the default."""
        for module in self.modules():
            if isinstance(module, Routed | Merged):
                module.use(name)


def build(plan: TextPlan, variant: Variant, seed: int, device: torch.device) -> ByteTransformer:
    """A model whose parameters outside the mixtures depend on the seed alone."""
    torch.manual_seed(seed)
    return ByteTransformer(plan, variant).to(device)
