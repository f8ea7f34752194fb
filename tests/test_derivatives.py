"""Derivatives as torch.func and autograd ask for them: right for every op, or refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, is_slow, runs_here
from torch import Tensor
from torch.autograd import forward_ad

from molex_kernels.testing import load_ops
from molex_kernels.testing.opinfo import OpInfo

OPS = {name: info for name, info in load_ops().items() if info.differentiable}
# What is refused is refused around the kernels: interpreted, one op of each kind is enough.
KINDS = ("topk_route", "layer_mix", "momentum_update")
COMPUTED = [
    (name, impl)
    for name, info in OPS.items()
    for impl in info.implementations
    if impl != "reference" and runs_here(impl) and (name in KINDS or not is_slow(impl))
]


class Problem:
    """The smallest case of an op, as a scalar function of what is differentiable."""

    def __init__(
        self,
        info: OpInfo,
        impl: str,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        cases = [c for c in info.tests if all(c.sizes.values()) and "dropout_p" not in c.options]
        case = min(cases, key=lambda case: math.prod(case.sizes.values()))
        self.info, self.impl = info, impl
        self.inputs = info.make(case, dtype, DEVICE, generator)
        self.names = [n for n in info.differentiable if isinstance(self.inputs.get(n), Tensor)]
        self.values = [self.inputs[name].detach() for name in self.names]
        others = info.make(case, dtype, DEVICE, generator)
        self.batch = [
            torch.stack([value, others[name].detach()])
            for name, value in zip(self.names, self.values, strict=True)
        ]

    def __call__(self, *values: Tensor) -> Tensor:
        given = {**self.inputs, **dict(zip(self.names, values, strict=True))}
        found = self.info.results(self.info.function(**given, impl=self.impl))
        return sum(r.square().sum() for r in found.values() if r.is_floating_point())  # type: ignore

    def of(self, place: int) -> Callable[[Tensor], Tensor]:
        """The function of one of them alone."""
        return lambda value: self(*self.values[:place], value, *self.values[place + 1 :])

    def gradients(self, values: list[Tensor]) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in values]
        return [*torch.autograd.grad(self(*leaves), leaves, materialize_grads=True)]

    @property
    def argnums(self) -> tuple[int, ...]:
        return tuple(range(len(self.names)))


def _assert_close(got: Tensor | list[Tensor], want: Tensor | list[Tensor]) -> None:
    """Equal to rounding, which is that of the largest elements: sums come in another order."""
    pairs = zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-12


@pytest.mark.parametrize(("name", "impl"), COMPUTED)
def test_the_transforms_agree_with_autograd(generator, name: str, impl: str):
    f = Problem(OPS[name], impl, generator)
    want = f.gradients(f.values)
    _assert_close([*torch.func.grad(f, f.argnums)(*f.values)], want)
    loss, pullback = torch.func.vjp(f, *f.values)
    _assert_close([*pullback(torch.ones_like(loss))], want)
    samples = [[stack[i] for stack in f.batch] for i in range(2)]
    losses = torch.stack([f(*sample) for sample in samples])
    _assert_close(torch.func.vmap(f)(*f.batch), losses)
    want = [torch.stack(pair) for pair in zip(*map(f.gradients, samples), strict=True)]
    _assert_close([*torch.func.vmap(torch.func.grad(f, f.argnums))(*f.batch)], want)


def _dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def _penalty(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad is not None
    return x.grad


FURTHER: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
    "forward_ad": _dual,
    "forward_ad, with gradient": lambda f, x: _dual(f, x.clone().requires_grad_()),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1],
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "grad of grad": lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x),
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x))[1],
    "vhp": lambda f, x: torch.autograd.functional.vhp(f, x, torch.ones_like(x))[1],
    "functional.hessian": torch.autograd.functional.hessian,
    "gradient penalty": _penalty,
    "gradient penalty of a root": lambda f, x: _penalty(lambda x: f(x).sqrt(), x),
}


@pytest.mark.parametrize("derivative", FURTHER)
@pytest.mark.parametrize(("name", "impl"), COMPUTED)
def test_further_derivatives_are_right_or_refused(generator, name: str, impl: str, derivative: str):
    """Never 0: autograd alone would take a tangent, and a kernel's result, for constants."""
    f = Problem(OPS[name], impl, generator)
    refused = 0
    for place, value in enumerate(f.values):
        try:
            got = FURTHER[derivative](f.of(place), value)
        except NotImplementedError as error:
            assert re.search(rf'{name}.*impl="reference"', str(error))  # noqa: PT017
            refused += 1
        else:
            reference = Problem(OPS[name], "reference", generator)
            reference.inputs, reference.values = f.inputs, f.values
            want = FURTHER[derivative](reference.of(place), value)
            assert (got - want).norm() <= 1e-3 * want.norm()
    assert refused


@pytest.mark.parametrize(("name", "impl"), COMPUTED)
def test_a_graph_of_the_gradient_is_no_other_gradient(generator, name: str, impl: str):
    f = Problem(OPS[name], impl, generator)
    leaves = [value.clone().requires_grad_() for value in f.values]
    loss = f(*leaves)
    once = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    _assert_close([*once], f.gradients(f.values))


@pytest.mark.parametrize("name", OPS)
def test_the_reference_has_them(generator, name: str):
    """u (J v) is (u J) v, and the product with the Hessian the same both ways."""
    f = Problem(OPS[name], "reference", generator, torch.float64)
    for place, value in enumerate(f.values):
        g = f.of(place)
        v = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        _, slope = torch.func.jvp(g, (value,), (v,))
        _assert_close(slope, (torch.func.grad(g)(value) * v).sum())
        _, want = torch.func.jvp(torch.func.grad(g), (value,), (v,))
        leaf = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(g(leaf), leaf, create_graph=True)
        (hvp,) = torch.autograd.grad((gradient * v).sum(), leaf, materialize_grads=True)
        _assert_close(hvp, want)
