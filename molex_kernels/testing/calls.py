"""Runs an op for a test: outputs and gradients, from inputs in different layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from molex_kernels.testing.opinfo import Inputs, OpInfo


@dataclass
class Outcome:
    """What a call gave: results by name, gradients by argument."""

    results: dict[str, Tensor]
    gradients: dict[str, Tensor]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values with every floating tensor in `dtype`, inside tuples too."""
    return {name: _map(value, lambda t: t.to(dtype)) for name, value in inputs.items()}


def strided(inputs: Inputs) -> Inputs:
    """The same values in every second element of a transposed, larger buffer of NaN."""

    def spread(t: Tensor) -> Tensor:
        if t.dim() == 0:
            return t
        wide = t.new_full([2 * n + 1 for n in reversed(t.shape)], math.nan)
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)].permute(*reversed(range(t.dim())))
        view.copy_(t)
        return view

    return {name: _map(value, spread) for name, value in inputs.items()}


def misaligned(inputs: Inputs) -> Inputs:
    """The same values, contiguous and one element off any alignment, behind a NaN."""

    def shift(t: Tensor) -> Tensor:
        room = t.new_full((t.numel() + 1,), math.nan)
        view = room[1:].view(t.shape)
        view.copy_(t)
        return view

    return {name: _map(value, shift) for name, value in inputs.items()}


def run(
    info: OpInfo,
    inputs: Inputs,
    impl: str,
    upstream: dict[str, Tensor] | None,
    function: Callable[..., Any] | None = None,
) -> Outcome:
    """Calls the op; with `upstream` (gradients by result), also its backward pass."""
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in info.differentiable
        if upstream is not None and isinstance(inputs.get(name), Tensor)
    }
    results = info.results((function or info.function)(**{**inputs, **leaves}, impl=impl))
    if upstream is None:
        return Outcome(results, {})
    wanted = [name for name, result in results.items() if result.requires_grad]
    if not wanted:
        return Outcome(results, {})
    gradients = torch.autograd.grad(
        [results[name] for name in wanted],
        list(leaves.values()),
        [upstream[name].to(results[name].dtype) for name in wanted],
        allow_unused=True,
    )
    by_name = zip(leaves, gradients, strict=True)
    detached = {name: result.detach() for name, result in results.items()}
    return Outcome(detached, {name: g for name, g in by_name if g is not None})


def upstream_for(
    results: dict[str, Tensor], generator: torch.Generator, *, expanded: bool = False
) -> dict[str, Tensor]:
    """Gradients for the floating results: the result plus noise; `expanded`: one row for all.

    A gradient along the result keeps inner products with it, such as the gradient of a weight, away
    from zero, where the error budget of a handful of numbers would be a matter of luck.
    """
    gradients = {}
    for name, result in results.items():
        if not result.is_floating_point():
            continue
        row = result.detach()[:1] if expanded and result.dim() else result.detach()
        noise = torch.randn(row.shape, generator=generator).to(row)
        gradients[name] = (row + noise).expand(result.shape)
    return gradients


@contextmanager
def recorded(
    namespace: str = "molex",
) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Collects every operator of the namespace that is called inside, with its arguments."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == namespace:
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield calls


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple):
        mapped = [_map(v, change) for v in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)
    return value
