"""TIES merging (arXiv 2306.01708) as mergekit has it, stated element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE
from merging import draw, same
from torch import Tensor

import molex_kernels as mk

OUT, D, E = 6, 5, 4
EVEN = [0.25] * E
# Weights, options, and what is done to the experts before.
CASES: dict[str, tuple[list[float], dict[str, Any], str]] = {
    "equal weights": (EVEN, {}, ""),
    "half a step": (EVEN, {"alpha": 0.5}, ""),
    "rows equal to the base": (EVEN, {}, "rows"),
    "unequal weights": ([0.7, 0.2, 0.05, 0.05], {}, ""),
    "a negative weight": ([0.7, -0.4, 0.2, 0.1], {"normalize": True}, ""),
    "normalized": ([0.7, 0.2, 0.05, 0.05], {"normalize": True}, "rows"),
    "sums of exactly 0": ([0.5, 0.5, 0.0, 0.0], {"normalize": True}, "cancel"),
    "trimmed": ([0.4, 0.3, 0.2, 0.1], {"density": 0.37, "normalize": True}, ""),
}


def published(
    base: Tensor,
    experts: Tensor,
    weights: list[float],
    *,
    alpha: float = 1.0,
    normalize: bool = False,
    density: float = 1.0,
) -> Tensor:
    """Trim each task vector, elect a sign, add up those that have it."""
    taus = []
    for expert in experts:
        tau = (expert - base).flatten().tolist()
        count = int(density * len(tau))
        largest = sorted(range(len(tau)), key=lambda i: (-abs(tau[i]), i))[:count]
        taus.append([t if i in largest else 0.0 for i, t in enumerate(tau)])
    merged = []
    for start, column in zip(base.flatten().tolist(), zip(*taus, strict=True), strict=True):
        weighted = [w * t for w, t in zip(weights, column, strict=True)]
        sign = 1 if sum(weighted) >= 0 else -1
        agree = [e for e, t in enumerate(weighted) if t * sign > 0]
        divisor = sum(weights[e] for e in agree) if normalize else 1
        merged.append(start + alpha * sum(weighted[e] for e in agree) / (divisor or 1))
    return torch.tensor(merged, dtype=base.dtype, device=base.device).view_as(base)


def _drawn(generator: torch.Generator, change: str) -> tuple[Tensor, Tensor]:
    base = draw(generator, OUT, D)
    tau = draw(generator, E, OUT, D)
    if change == "cancel":
        tau = tau.mul(16).round() / 16  # exact in the sum with a rounded base
        base = base.mul(16).round() / 16
        tau[1] = -tau[0]
    experts = base + tau
    if change == "rows":
        experts[:, 2] = base[2]
        experts[1:, 3] = base[3]
    return base, experts


@pytest.mark.parametrize("name", CASES)
def test_merging_is_the_published(name: str, generator):
    weights, options, change = CASES[name]
    base, experts = _drawn(generator, change)
    gates = torch.tensor([weights, EVEN], dtype=base.dtype, device=DEVICE)
    got = mk.camex_merge(base, experts, gates, mask="ties", elect="weighted", **options)
    assert same(got[0], published(base, experts, weights, **options))
    assert same(got[1], published(base, experts, EVEN, **options))


def test_a_sum_of_0_elects_the_positive_sign(generator):
    base, experts = _drawn(generator, "cancel")
    gates = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=base.dtype, device=DEVICE)
    got = mk.camex_merge(base, experts, gates, mask="ties", elect="weighted", normalize=True)
    assert same(got[0], base + (experts[0] - base).abs())
    # The published election of CAMEx is by all experts, whatever their gates.
    tau = experts - base
    kept = torch.where(tau.sign() == tau.sum(0).sign(), tau, 0)
    want = base + 0.5 * kept[:2].sum(0)
    assert same(mk.camex_merge(base, experts, gates, mask="ties")[0], want)


def test_options_that_change_nothing_are_the_default(generator):
    """The composition and the kernels' path agree where they mean the same."""
    base, experts = _drawn(generator, "rows")
    gates = draw(generator, 3, E).softmax(1)
    for mask in (None, "ties"):
        default = mk.camex_merge(base, experts, gates, mask=mask, alpha=0.7)
        composed = mk.camex_merge(base, experts, gates, mask=mask, alpha=0.7, density=1 - 1e-9)
        # All but the smallest element of each: put back what the trim has taken.
        lost = experts.sub(base).abs().flatten(1).argmin(1)
        whole = torch.ones(E, OUT * D, dtype=torch.bool, device=DEVICE)
        whole[torch.arange(E), lost] = False
        clear = whole.all(0).view(OUT, D)
        assert clear.sum() > OUT * D // 2
        assert same(composed[:, clear], default[:, clear])
    even = torch.full_like(gates, 1 / E)
    normalized = mk.camex_merge(base, experts, 3 * even, normalize=True)
    assert same(normalized, mk.camex_merge(base, experts, even))


def test_weights_that_cancel_divide_nothing(generator):
    base, experts = _drawn(generator, "")
    gates = torch.tensor([[1.0, -1.0, 0.5, -0.5]], dtype=base.dtype, device=DEVICE)
    got = mk.camex_merge(base, experts, gates, normalize=True)
    assert same(got, mk.camex_merge(base, experts, gates))


@pytest.mark.parametrize("name", ["a negative weight", "trimmed"])
def test_gradients_are_of_what_is_kept(name: str, generator):
    weights, options, change = CASES[name]
    base, experts = _drawn(generator, change)
    curvature = mk.KroneckerCurvature.identity(E, OUT, D, 2, dtype=torch.float64, device=DEVICE)
    leaves = [
        t.clone().requires_grad_()
        for t in (base, experts, torch.tensor([weights], device=DEVICE).double(), *curvature)
    ]

    def merged(base: Tensor, experts: Tensor, gates: Tensor, *factors: Tensor) -> Tensor:
        return mk.camex_merge(
            base,
            experts,
            gates,
            curvature=mk.KroneckerCurvature(*factors),
            mask="ties",
            elect="weighted",
            **options,
        )

    assert torch.autograd.gradcheck(merged, leaves, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_every_dtype(dtype: torch.dtype, generator):
    base, experts = (t.to(dtype) for t in _drawn(generator, ""))
    weights, options, _ = CASES["trimmed"]
    gates = torch.tensor([weights], device=DEVICE)
    got = mk.camex_merge(base, experts, gates, mask="ties", elect="weighted", **options)
    assert got.dtype == dtype
    want = published(base.double(), experts.double(), weights, **options)
    torch.testing.assert_close(got[0].double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps)
