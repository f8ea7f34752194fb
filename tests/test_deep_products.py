"""A product over a long dimension is as exact in fp32 as PyTorch's own.

Triton multiplies fp32 by one chain of fused multiply-adds; a library's sums are several, and lose
less. The contract's cases are too short to tell.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import molex_kernels as mk

DEPTH = 4096
FACTOR = 2.0  # a chain has 3 and more

Multiply = Callable[..., Tensor]


def _layer_linear(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    index = torch.zeros(1, dtype=torch.int64, device=x.device)
    return mk.layer_linear(x[None], weight[None], index, impl=impl)[0]


def _grouped_gemm(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    ends = torch.tensor([len(x)], dtype=torch.int32, device=x.device)
    return mk.grouped_gemm(x, weight[None], ends, impl=impl)


def _topk_route(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return mk.topk_route(x, weight, top_k=1, impl=impl).logits


PRODUCTS = {f.__name__.lstrip("_"): f for f in (_layer_linear, _grouped_gemm, _topk_route)}


def _error(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    want = x.double() @ weight.double().mT
    return float((multiply(x, weight).cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("impl", ["triton"] if DEVICE.type == "cuda" else ["triton", "cpu"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_deep_product_is_as_exact_as_pytorchs(name: str, impl: str, generator):
    multiply = PRODUCTS[name]
    x, weight = (torch.randn(16, DEPTH, generator=generator) for _ in range(2))
    theirs = _error(lambda x, w: x @ w.mT, x, weight)
    ours = _error(lambda x, w: multiply(x.to(DEVICE), w.to(DEVICE), impl), x, weight)
    assert ours <= FACTOR * theirs


@pytest.mark.parametrize("impl", ["triton"] if DEVICE.type == "cuda" else ["triton", "cpu"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_weights_gradient_over_many_tokens_is_too(name: str, impl: str, generator):
    multiply = PRODUCTS[name]
    x, upstream = (torch.randn(DEPTH, 16, generator=generator) for _ in range(2))
    weight = torch.randn(16, 16, generator=generator)

    def gradient(upstream: Tensor, x: Tensor) -> Tensor:
        leaf = weight.to(DEVICE).requires_grad_()
        y = multiply(x.mT.to(DEVICE), leaf, impl)
        return torch.autograd.grad(y, leaf, upstream.mT.to(DEVICE))[0]

    theirs = _error(lambda g, x: g @ x.mT, upstream.mT, x.mT)
    assert _error(gradient, upstream.mT, x.mT) <= FACTOR * theirs
