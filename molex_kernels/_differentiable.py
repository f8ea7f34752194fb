"""Functions with a gradient of their own, as autograd and functorch ask for them.

A ctx-style `autograd.Function` costs half of one with `setup_context`, which is therefore taken
only while functorch transforms (`torch.func`) are active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Values = tuple[Any, ...]


class Differentiable:
    """A function with a gradient of its own, as autograd and functorch ask for it.

    `call` computes (results, saved tensors, constants) of arguments in which tensors of lists stand
    one by one; `gradients` gives one gradient or None for each argument. `fixed` are the places of
    results without a gradient.
    """

    def __init__(self, name: str, fixed: Sequence[int] = ()) -> None:
        self.fixed = fixed
        self.eager = _eager(self, name)
        self.transformed = _transformed(self, name)

    def call(self, *arguments: Any) -> tuple[Values, Sequence[Tensor | None], Values]:
        """Results, tensors to be saved, constants."""
        raise NotImplementedError

    def gradients(
        self, upstream: Values, saved: Values, constants: Values, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """A gradient or None for each argument of `call`."""
        raise NotImplementedError

    def apply(self, *arguments: Any) -> Any:
        """The results, by the Function that is fit for what is active; one result by itself."""
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            record = _Record()
            results = self.transformed.apply(record, *arguments)
            return results[: record.num_results] if record.num_results > 1 else results[0]
        return self.eager.apply(*arguments)


class _Record:
    """What one call by `_transformed` tells its `setup_context`."""

    constants: Values
    saved: list[int | None]  # where each saved tensor stands among arguments and results
    num_results: int


def _eager(op: Differentiable, name: str) -> type[Function]:
    def forward(ctx: Any, *arguments: Any) -> Any:
        results, saved, ctx.constants = op.call(*arguments)
        ctx.save_for_backward(*saved)
        if len(results) == 1:
            return results[0]
        ctx.set_materialize_grads(False)
        if op.fixed:
            ctx.mark_non_differentiable(*(results[i] for i in op.fixed))
        return results

    return type(name, (Function,), {"forward": staticmethod(forward), "backward": _backward(op)})


def _transformed(op: Differentiable, name: str) -> type[Function]:
    """Hands out what is saved, too, since `setup_context` sees arguments and results alone."""

    def forward(record: _Record, *arguments: Any) -> Values:
        results, saved, record.constants = op.call(*arguments)
        known = (*arguments, *results)
        extra = [s for s in saved if s is not None and not any(s is k for k in known)]
        everything = (record, *known, *extra)
        record.saved = [None if s is None else _index(everything, s) for s in saved]
        record.num_results = len(results)
        return *results, *extra

    def setup_context(ctx: Any, inputs: Values, output: Values) -> None:
        record = inputs[0]
        everything = (*inputs, *output)
        ctx.save_for_backward(*(None if i is None else everything[i] for i in record.saved))
        ctx.constants, ctx.num_results = record.constants, record.num_results
        ctx.set_materialize_grads(False)
        fixed = (*(output[i] for i in op.fixed), *output[record.num_results :])
        ctx.mark_non_differentiable(*fixed)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": _backward(op, first=1),
        "generate_vmap_rule": True,
    }
    return type(name, (Function,), members)


def _backward(op: Differentiable, first: int = 0) -> Any:
    def backward(ctx: Any, *upstream: Tensor | None) -> Values:
        given = upstream[: ctx.num_results] if first else upstream
        needs = ctx.needs_input_grad[first:]
        return (None,) * first + tuple(op.gradients(given, ctx.saved_tensors, ctx.constants, needs))

    return staticmethod(once_differentiable(backward))


def _index(values: Sequence[Any], wanted: Any) -> int:
    return next(i for i, value in enumerate(values) if value is wanted)
