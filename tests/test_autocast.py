"""Every module between neighbours under autocast: what comes in has whatever dtype they give."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from conftest import DEVICE
from torch import Tensor, nn

import molex_kernels as mk

HALF = (torch.bfloat16, torch.float16)
WIDTH = 32


class Fp32(nn.Module):
    """A part that computes in fp32 whatever autocast says, as rotary embeddings and norms do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().sin()


class Half(nn.Module):
    """A part that gives the other 16-bit dtype, as a kernel of somebody else may."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return x
        other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
        return x.to(other[torch.get_autocast_dtype(x.device.type)])


BEFORE: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(WIDTH, WIDTH),
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "fp32": Fp32,
    "half": Half,
}


class Routed(nn.Module):
    """A router, and experts on its choice."""

    def __init__(self, router: nn.Module, **options: Any) -> None:
        super().__init__()
        self.router, self.experts = router, mk.MoEMLP(WIDTH, 24, 4, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        routing = self.router(tokens)
        loss = mk.load_balance_loss(routing) + mk.router_z_loss(routing.logits)
        if isinstance(self.router, mk.ACRouter):
            routing = self.router(tokens.sin(), routing)
        return self.experts(tokens, routing).view(x.shape), loss


class Layers(nn.Module):
    """Two layers of momentum, whose state goes from one to the other."""

    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([mk.MomentumMoE(WIDTH, 24, 4, 2, rule) for _ in range(2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.layers[0](x)
        second = self.layers[1](first[0], first[1])
        return second[0], second[0].new_zeros(())


def _stack(make: Callable[..., Any], config: Any, **options: Any) -> nn.Module:
    model = make(config).eval()
    return mk.LayerExpertStack.from_transformers(model, lora_rank=2, **options)


RULES = (mk.HeavyBall(0.7), mk.Adam(), mk.RobustMomentum(4.0, 1.0, 0.8), mk.AdEMAMix(), mk.Mars())
SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH}
OURS: dict[str, Callable[[], nn.Module]] = {
    "TopKRouter": lambda: Routed(mk.TopKRouter(WIDTH, 4, 2, bias=True)),
    "shared expert": lambda: Routed(
        mk.TopKRouter(WIDTH, 4, 2, expert_bias=True), shared_width=8, shared_gate=True
    ),
    "ACRouter": lambda: Routed(mk.ACRouter(WIDTH, 4, 2)),
    "CosineRouter": lambda: Routed(mk.CosineRouter(WIDTH, 4, 2)),
    "ACRouter mixed": lambda: Routed(mk.ACRouter(WIDTH, 4, 2, mix=True, cosine=True)),
    "CAMExLinear": lambda: mk.CAMExLinear(WIDTH, WIDTH, 3, bias=True),
    "CAMExLinear by segments": lambda: mk.CAMExLinear(WIDTH, WIDTH, 3, segment=7, top_k=1),
    "CAMExMLP": lambda: mk.CAMExMLP(WIDTH, 24, 3, bias=True),
    "RPCAttention": lambda: mk.RPCAttention(WIDTH, 2, num_iters=2),
    "RPCAttention qkv": lambda: mk.RPCAttention(WIDTH, 2, num_iters=2, projection="qkv"),
    "ScaledAttention": lambda: mk.ScaledAttention(WIDTH, 2),
    "ScaledAttention matrix": lambda: mk.ScaledAttention(WIDTH, 2, 7, kind="matrix"),
    "LayerExpertStack of GPT-2": lambda: _stack(
        transformers.GPT2Model,
        transformers.GPT2Config(
            vocab_size=50, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2, resid_pdrop=0.0
        ),
    ),
    "LayerExpertStack of BERT": lambda: _stack(
        transformers.BertModel, transformers.BertConfig(**SMALL, intermediate_size=48)
    ),
    **{f"MomentumMoE {type(rule).__name__}": partial(Layers, rule) for rule in RULES},
}


class Block(nn.Module):
    """A neighbour, one of ours, a residual, a neighbour again, and the head of a loss."""

    def __init__(self, before: nn.Module, ours: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.before, self.ours, self.after = before, ours, after
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(self.first(x))
        found = self.ours(h)
        loss = x.new_zeros(())
        if isinstance(found, tuple):
            found, loss = found[:2]
        y = self.after(h + found)
        return self.head(y).float().logsumexp(-1).mean() + 0.01 * loss.float()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("ours", OURS)
def test_between_neighbours(seed: int, ours: str, before: str, dtype: torch.dtype):
    torch.manual_seed(seed)
    block = Block(BEFORE[before](), OURS[ours](), nn.LayerNorm(WIDTH)).to(DEVICE)
    x = torch.randn(2, 7, WIDTH, device=DEVICE)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16, init_scale=64.0)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    with torch.autocast(DEVICE.type, dtype):
        loss = block(x)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert loss.isfinite()
    got = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    plain = block(x)
    plain.backward()
    assert abs(loss - plain) <= 0.05 * (1 + abs(plain))
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == (name not in got), name
        if parameter.grad is not None:
            assert got[name].dtype == parameter.dtype
            assert got[name].isfinite().all(), name


@pytest.mark.parametrize("reduced", [8, None])
def test_a_cosine_router_is_fp32_throughout(reduced: int | None, generator: torch.Generator):
    """Its reduction, too: of a rounded product other experts would be chosen."""
    router = mk.CosineRouter(WIDTH, 6, 2, reduced=reduced, device=DEVICE)
    x = torch.randn(20, WIDTH, generator=generator).to(DEVICE)
    plain = router(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(router(x).logits, plain.logits)
    # Without autocast, its parameters being fp32 as a router's mostly are, or as x is.
    half = x.bfloat16().requires_grad_()
    found = router(half).logits
    torch.testing.assert_close(found, router(half.float()).logits, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.square().sum(), half)
    assert gradient.dtype == torch.bfloat16
    router = router.bfloat16()
    wide = mk.CosineRouter(WIDTH, 6, 2, reduced=reduced, device=DEVICE)
    wide.load_state_dict(router.state_dict())
    want = wide(half.float()).logits
    torch.testing.assert_close(router(half).logits, want, rtol=1e-5, atol=1e-5)
