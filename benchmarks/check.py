"""Checks a row's results against the reference before it is timed.

The rule is the tests' error budget: err(row, fp64) <= 2 * (err(reference in the same dtype, fp64) +
eps * max|fp64|), for outputs and gradients; integer results must be equal. A gradient may have a
thousandth of its elements outside, where a kink of the function lies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from molex_kernels.testing import budget
from molex_kernels.testing.opinfo import Inputs, OpInfo

Tensors = dict[str, Tensor]

KINKS = 1e-3  # share of a gradient's elements that may sit at a kink
BASELINE_SLACK = 10.0  # a baseline has to compute the same thing, not to be as exact as ours


@dataclass(frozen=True)
class Workload:
    """One row's work: a call of the function; given upstream gradients, its backward pass too."""

    info: OpInfo
    function: Callable[..., Any]
    inputs: Inputs
    upstream: Tensors | None = None

    def call(self) -> Any:
        """What is timed."""
        out = self.function(**self.inputs)
        return out if self.upstream is None else self._gradients(self.info.results(out))

    def tensors(self) -> Tensors:
        """Outputs by name and gradients by argument, detached: what is checked."""
        results = self.info.results(self.function(**self.inputs))
        found = {name: result.detach() for name, result in results.items()}
        if self.upstream is not None:
            gradients = zip(self._leaves(), self._gradients(results), strict=True)
            found |= {f"d {name}": g for (name, _), g in gradients if g is not None}
        return found

    def saved_bytes(self) -> int:
        """What the forward pass keeps for the backward pass, beyond the inputs themselves."""
        given = {t.untyped_storage().data_ptr() for t in self.inputs.values() if _is_tensor(t)}
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in given:
                held[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = self.function(**self.inputs)
        del out
        return sum(held.values())

    def on_new_leaves(self) -> Workload:
        """The same work on the same memory, whose leaves no pass has seen."""
        return dataclasses.replace(self, inputs=require_grad(self.info, self.inputs))

    def _leaves(self) -> list[tuple[str, Tensor]]:
        wanted = ((name, self.inputs.get(name)) for name in self.info.differentiable)
        return [(n, t) for n, t in wanted if _is_tensor(t) and t.requires_grad]

    def _gradients(self, results: Tensors) -> tuple[Tensor | None, ...]:
        upstream = self.upstream or {}
        outputs = [n for n, t in results.items() if t.requires_grad and n in upstream]
        return torch.autograd.grad(
            [results[n] for n in outputs],
            [t for _, t in self._leaves()],
            [upstream[n].to(results[n].dtype) for n in outputs],
            allow_unused=True,
        )


@dataclass(frozen=True)
class ProxyWorkload(Workload):
    """A proxy's work: it computes something else, so there is nothing to compare."""

    def call(self) -> Any:
        """What is timed."""
        out = self.function(**self.inputs)
        if self.upstream is None:
            return out
        outputs = out if isinstance(out, tuple) else (out,)
        leaves = [t for _, t in self._leaves()]
        detached = [o.detach() for o in outputs]
        return torch.autograd.grad(outputs, leaves, detached, allow_unused=True)


def require_grad(info: OpInfo, inputs: Inputs) -> Inputs:
    """The same inputs with the differentiable ones as leaves that need a gradient."""
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in info.differentiable
        if _is_tensor(inputs.get(name))
    }
    return {**inputs, **leaves}


def random_upstream(info: OpInfo, inputs: Inputs, generator: torch.Generator) -> Tensors:
    """Random gradients for the results that have one, at unit scale."""
    results = info.results(exact_function(info)(**inputs))
    return {
        name: torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype)
        for name, t in results.items()
        if t.requires_grad
    }


@dataclass(frozen=True)
class Expected:
    """The fp64 results and the reference's own in the dtype under test."""

    fp64: Tensors
    reference: Tensors
    dtype: torch.dtype

    def accuracy(self, actual: Tensors) -> float:
        """The largest error as a multiple of the reference's own in the same dtype.

        An error below half a unit in the last place of the largest element counts as that much.
        """
        worst = 0.0
        for name, want in self.fp64.items():
            if not want.is_floating_point() or name not in actual:
                continue
            rounding = torch.finfo(self.dtype).eps / 2 * budget.largest(want)
            own = max(budget.error(self.reference[name], want), rounding)
            if own:
                worst = max(worst, budget.error(actual[name], want) / own)
        return worst

    def compare(self, actual: Tensors, slack: float = 1.0) -> str | None:
        """What is wrong with these results, or None. `slack` multiplies the budget."""
        for name, want in self.fp64.items():
            got = actual.get(name)
            if got is None:
                return f"{name} is missing"
            if not want.is_floating_point():
                if not got.equal(want):
                    return f"{name} differs"
                continue
            try:
                budget.within_budget(name, got, want, self.reference[name], self.dtype)
            except AssertionError as error:
                if not self._excused(name, got, slack):
                    return str(error)
        return None

    def _excused(self, name: str, got: Tensor, slack: float) -> bool:
        """Whether a result is inside `slack` budgets; of a gradient, all but a few elements.

        relu's slope jumps at 0. Of the millions of hidden values of a large shape a few lie so near
        to it that two orders of summation fall on different sides.
        """
        want, own = self.fp64[name], self.reference[name]
        if got.shape != want.shape or not torch.isfinite(got).equal(torch.isfinite(want)):
            return False
        largest = budget.largest(want)
        allowed = 2 * (budget.error(own, want) + torch.finfo(self.dtype).eps * largest)
        error = (got.double() - want).abs()
        few = KINKS * error.numel() if name.startswith("d ") else 0
        return bool((error > slack * allowed).sum() <= few and error.max() <= largest)


def exact_function(info: OpInfo, *, oracle: bool = True) -> Callable[..., Any]:
    """The reference, or the oracle where the op names one."""
    if oracle and info.oracle:
        return info.baselines[info.oracle]
    return partial(info.function, impl="reference")


def expect(
    info: OpInfo,
    inputs: Inputs,
    upstream: Tensors | None,
    dtype: torch.dtype,
    *,
    oracle: bool = False,
) -> Expected:
    """Runs the reference, or the oracle, in fp64 and in `dtype` on the same values."""
    function = exact_function(info, oracle=oracle)
    own = Workload(info, function, inputs, upstream).tensors()
    exact = Workload(info, function, double(inputs), upstream and double(upstream)).tensors()
    return Expected(exact, own, dtype)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN inside, so that an output that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def poison(work: Workload, results: Tensors) -> None:
    """Overwrites results: NaN, or the largest integer.

    A gradient may be the upstream gradient itself, which is still needed: it stays.
    """
    given = filter(_is_tensor, tree_leaves((work.inputs, work.upstream)))
    held = {t.untyped_storage().data_ptr() for t in given}
    for t in results.values():
        if t.untyped_storage().data_ptr() not in held:
            t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)


def double(values: Any) -> Any:
    """The same values with every floating tensor in fp64."""
    if isinstance(values, Tensor):
        if not values.is_floating_point():
            return values
        return values.detach().double().requires_grad_(values.requires_grad)
    if isinstance(values, dict):
        return {name: double(value) for name, value in values.items()}
    if isinstance(values, tuple):
        mapped = [double(v) for v in values]
        return type(values)(*mapped) if hasattr(values, "_fields") else tuple(mapped)
    return values


def _is_tensor(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)
