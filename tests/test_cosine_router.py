"""The cosine gates beside plain transcriptions of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import molex_kernels as mk

T, D, E, K = 17, 7, 5, 2
TUTEL: dict[str, Any] = {"normalize": True, "temperature": True, "score": "softmax"}


def _router(seed: int, reduced: int | None, **options: Any) -> mk.CosineRouter:
    torch.manual_seed(seed)
    router = mk.CosineRouter(
        D, E, K, reduced=reduced, **options, device=DEVICE, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return router


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=generator).to(DEVICE)


def _xmoe(x: Tensor, router: mk.CosineRouter) -> Tensor:
    """The language models': the rows alone have length 1."""
    reduced = x if router.reduction is None else x @ router.reduction.T
    return reduced @ (router.weight / router.weight.norm(dim=1, keepdim=True)).T


def _tutel(x: Tensor, router: mk.CosineRouter) -> Tensor:
    """The Swin's: cosines, times a temperature."""
    v = x @ router.reduction.T
    if router.reduction_bias is not None:
        v = v + router.reduction_bias
    cosines = torch.cosine_similarity(v[:, None], router.weight[None], dim=2, eps=1e-12)
    return cosines * router.temperature.clamp(max=4.605170185988092).exp()


@pytest.mark.parametrize(
    ("reduced", "options"),
    [
        (3, {}),
        (None, {}),
        (3, {"reduction_bias": True, **TUTEL}),
        (4, TUTEL),
    ],
    ids=["xmoe", "stable", "tutel", "tutel-no-bias"],
)
def test_the_published_gates(
    reduced: int | None, options: dict[str, Any], seed: int, generator: torch.Generator
):
    router = _router(seed, reduced, **options)
    x = _tokens(generator).requires_grad_()
    logits = (_tutel if "temperature" in options else _xmoe)(x, router)
    top = logits.topk(K)
    weight = logits.softmax(1).gather(1, top.indices)
    if not options:
        weight = top.values.softmax(1)
    routing = router(x)
    assert torch.equal(routing.expert_index, top.indices)
    assert torch.allclose(routing.expert_weight, weight, rtol=1e-10)
    assert torch.allclose(routing.logits, logits, rtol=1e-10)
    grad = torch.rand(T, K, dtype=torch.float64, generator=generator).to(DEVICE)
    leaves = [x, *router.parameters()]
    got = torch.autograd.grad(routing.expert_weight, leaves, grad)
    want = torch.autograd.grad(weight, leaves, grad)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-11)


def test_the_temperature_is_clamped(seed: int, generator: torch.Generator):
    router = _router(seed, 3, **TUTEL)
    x = _tokens(generator)
    with torch.no_grad():
        router.temperature.fill_(6.0)
    assert torch.allclose(router(x).logits, _tutel(x, router), rtol=1e-10)
    assert router(x).logits.abs().max() <= 100 + 1e-9
    router.reset_parameters()
    assert torch.allclose(router.temperature.exp(), router.temperature.new_tensor(2.0))


def test_autocast_changes_no_logit(seed: int, generator: torch.Generator):
    router = _router(seed, 3, reduction_bias=True, **TUTEL).float()
    x = _tokens(generator).float()
    want = router(x).logits
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(router(x).logits, want)
    narrow = router.bfloat16()(x.bfloat16())
    assert narrow.logits.dtype == torch.float32


def test_published_names(seed: int):
    router, other = (_router(s, 3, reduction_bias=True, **TUTEL) for s in (seed, seed + 1))
    names = {
        "weight": "sim_matrix",
        "reduction": "cosine_projector.weight",
        "reduction_bias": "cosine_projector.bias",
        "temperature": "temperature",
    }
    state = {
        f"layers.2.blocks.1.mlp.gates.0.{name}": getattr(router, own).detach()
        for own, name in names.items()
    }
    other.load_published(state)
    assert all(
        torch.equal(a, b) for a, b in zip(router.parameters(), other.parameters(), strict=True)
    )
    for name in names.values():
        lacking = {key: value for key, value in state.items() if not key.endswith(name)}
        with pytest.raises(ValueError, match=name):
            other.load_published(lacking)
    with pytest.raises(ValueError, match=r"no place for '.*cosine_projector.bias'"):
        _router(seed, 3, **TUTEL).load_published(state)


def test_bad_options():
    with pytest.raises(ValueError, match="reduction_bias: expected False with reduced=None"):
        mk.CosineRouter(D, E, K, reduced=None, reduction_bias=True)
    with pytest.raises(ValueError, match="score: expected one of"):
        mk.CosineRouter(D, E, K, score="cosine")
    with pytest.raises(TypeError, match="normalize: expected a bool"):
        mk.CosineRouter(D, E, K, reduced=None, normalize=1)
