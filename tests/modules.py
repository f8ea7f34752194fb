"""Every module of the package, small, with an input: what the tests of all modules sweep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import molex_kernels as mk

D, E, K = 8, 4, 2


def _stack(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.GPT2Config(
        n_embd=D, n_layer=3, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2Model(config)
    stack = mk.LayerExpertStack.from_transformers(model, freeze=False, **options)
    if "cosine_dim" not in options:
        # A layer that chose itself would not feel what it is mixed by.
        with torch.no_grad():
            stack.gates[0].bias[0] += 3
    return copy.deepcopy(stack)  # its weights are no views of the model's parameters


def _learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.6))


# By name: what makes the module, and the inputs behind x [2, 6, D].
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "MoEMLP": (lambda: mk.MoEMLP(D, 6, E, activation="swiglu"), ("routing",)),
    "MoEMLP-shared": (
        lambda: mk.MoEMLP(D, 6, E, activation="swiglu", shared_width=5, shared_gate=True),
        ("routing",),
    ),
    "MomentumMoE": (lambda: mk.MomentumMoE(D, 6, E, K, mk.HeavyBall(0.7), dropout=0.25), ("m",)),
    "MomentumMoE-pre_ln-learned": (
        lambda: mk.MomentumMoE(
            D, 6, E, K, mk.Nesterov(_learned(1), _learned(1)), wiring="pre_ln", bias=False
        ),
        ("m",),
    ),
    "MomentumMoE-shared": (
        lambda: mk.MomentumMoE(D, 6, E, K, mk.HeavyBall(0.7), shared_width=5, sign=-1),
        ("m",),
    ),
    "SoftMoE": (lambda: mk.SoftMoE(D, 6, E, 2, top_k=3, mix=True), ("routing",)),
    "CAMExLinear": (lambda: mk.CAMExLinear(D, 6, E, mask=None, bias=True, segment=2), ()),
    "CAMExMLP": (lambda: mk.CAMExMLP(D, 6, E, mask=None), ()),
    "RPCAttention": (lambda: mk.RPCAttention(D, 2, num_iters=2, lam=0.3, projection="qkv"), ()),
    "ScaledAttention": (lambda: mk.ScaledAttention(D, 2), ()),
    "TopKRouter": (lambda: mk.TopKRouter(D, E, K, bias=True), ()),
    "TopKRouter-balanced": (lambda: mk.TopKRouter(D, E, K, expert_bias=True), ()),
    "ACRouter": (lambda: mk.ACRouter(D, E, K, bias=True), ("routing",)),
    "ACRouter-cosine": (lambda: mk.ACRouter(D, E, K, cosine=True), ("routing",)),
    "CosineRouter": (lambda: mk.CosineRouter(D, E, K, reduced=3), ()),
    "CosineRouter-tutel": (
        lambda: mk.CosineRouter(
            D,
            E,
            K,
            reduced=3,
            reduction_bias=True,
            normalize=True,
            temperature=True,
            score="softmax",
        ),
        (),
    ),
    "CosineRouter-unreduced": (lambda: mk.CosineRouter(D, E, K, reduced=None), ()),
    "LayerExpertStack": (lambda: _stack(lora_rank=2, learn_mixing=True), ()),
    "LayerExpertStack-cosine": (lambda: _stack(cosine_dim=4), ()),
}


def make(name: str, seed: int) -> nn.Module:
    """The module with all its parameters drawn from the seed, in evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = MODULES[name][0]().to(DEVICE).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.2 * noise).to(DEVICE))
    return module


def inputs(name: str, seed: int, sizes: tuple[int, int] = (2, 6)) -> tuple[Any, ...]:
    """What the module is called with, for so many sequences of so many tokens."""
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = sizes[0] * sizes[1]
    x = torch.randn(*sizes, D, generator=generator).to(DEVICE)
    more: list[Any] = []
    for kind in MODULES[name][1]:
        if kind == "m":
            more.append((torch.randn(*sizes, D, generator=generator).to(DEVICE),))
        else:
            index = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K].to(DEVICE)
            weight = torch.rand(tokens, K, generator=generator).to(DEVICE)
            logits = torch.zeros(tokens, E, device=DEVICE)
            more.append(mk.Routing(index, weight, logits))
    return (x, *more)


def changed(value: Tensor) -> Tensor:
    """Other values, and no multiple of the old ones."""
    return value + 0.3 * torch.cos(3 * value)


def floats(out: Any) -> list[Tensor]:
    """The floating tensors in an output."""
    leaves = pytree.tree_leaves(out)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def agree(got: Any, want: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    pairs = zip(floats(got), floats(want), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def children(name: str) -> Iterator[str]:
    """The paths of the modules inside that have parameters or computation; lists have neither."""
    for path, child in make(name, 0).named_modules():
        if path and not isinstance(child, nn.ModuleList):
            yield path
