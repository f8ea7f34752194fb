"""The contract on an op that is not this package's: what is right passes, every fault is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molex_kernels import testing
from molex_kernels.testing import Case, Draw, OpInfo


class _Wrong(torch.autograd.Function):
    """The gradient is off."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 2


def _breaks(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x * 3


def _in_place(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.add_(1)
    return (x - 1) * 3


IMPLEMENTATIONS = {
    "reference": lambda x: x * 3,
    "right": lambda x: x + x + x,
    "loose": lambda x: x * 3.01,
    "wrong_gradient": _Wrong.apply,
    "in_place": _in_place,
    "random": lambda x: x * 3 + torch.rand(()),
    "contiguous": lambda x: torch.as_strided(x, x.shape, (x.shape[1], 1)) * 3,
    "breaks": _breaks,
}


def _triple(x: Tensor, *, impl: str) -> Tensor:
    return IMPLEMENTATIONS[impl](x)


CASE = Case({"T": 17, "D": 8})
INFO = OpInfo(
    name="triple",
    function=_triple,
    make=lambda case, dtype, device, generator: {
        "x": Draw(dtype, device, generator).normal(*case.sizes.values())
    },
    results=lambda y: {"y": y},
    differentiable=("x",),
    tests=(CASE,),
    implementations=tuple(IMPLEMENTATIONS),
)


@pytest.mark.parametrize(
    "check",
    [testing.check_budget, testing.check_strided, testing.check_misaligned, testing.check_traces],
)
@pytest.mark.parametrize("impl", ["reference", "right"])
def test_what_is_right_passes(check, impl: str):
    check(INFO, CASE, torch.float32, impl, seed=3)


@pytest.mark.parametrize(
    ("check", "impl", "message"),
    [
        (testing.check_budget, "loose", "y: error .*reference's own"),
        (testing.check_budget, "wrong_gradient", "gradient of x: error"),
        (testing.check_budget, "in_place", "x was modified"),
        (testing.check_budget, "random", "y differs when repeated"),
        (testing.check_strided, "contiguous", "y: not finite"),
        (testing.check_opcheck, "right", "no operator was called"),
    ],
)
def test_what_is_wrong_is_named(check, impl: str, message: str):
    with pytest.raises(AssertionError, match=message):
        check(INFO, CASE, torch.float32, impl)


def test_a_graph_break_is_an_error():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        testing.check_traces(INFO, CASE, torch.float32, "breaks")


def test_the_references_gradients_are_held_against_differences():
    testing.check_reference_gradients(INFO, CASE)
