"""Functions with a gradient of their own, as autograd and functorch ask for them.

A ctx-style `autograd.Function` costs half of one with `setup_context`, which is therefore taken
only while functorch transforms (`torch.func`) are active.

There is one derivative, backwards. Forward mode and a second derivative raise: autograd itself
would take the tangent, and what a kernel computed without a graph, for a constant, and give 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

Values = tuple[Any, ...]


class Differentiable:
    """A function with a gradient of its own, as autograd and functorch ask for it.

    `call` computes (results, saved tensors, constants) of arguments in which tensors of lists stand
    one by one; `gradients` gives one gradient or None for each argument. `op` is what its callers
    know it as, for error messages; `fixed` are the places of results without a gradient.
    """

    def __init__(self, op: str, fixed: Sequence[int] = ()) -> None:
        self.op, self.fixed = op, fixed
        name = type(self).__name__.strip("_")
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

    def refuse_tangents(self, arguments: Iterable[Any]) -> None:
        """Raises where forward-mode differentiation is on and one of the arguments takes part."""
        if forward_ad._current_level < 0:
            return
        for argument in arguments:
            if isinstance(argument, (list, tuple)):
                self.refuse_tangents(argument)
            elif isinstance(argument, Tensor) and _has_tangent(argument):
                _refuse(self.op, "forward-mode derivative")

    def apply(self, *arguments: Any) -> Any:
        """The results, by the Function that is fit for what is active; one result by itself."""
        if torch.compiler.is_compiling():
            results = self.eager.apply(*arguments)
        elif torch._C._are_functorch_transforms_active():
            record = _Record()
            found = self.transformed.apply(record, *arguments)
            results = found[1 : 1 + record.num_results]
        else:
            results = self.eager.apply(*arguments)[1:]
        return results if len(results) > 1 else results[0]


class Once(Differentiable):
    """Hands on the arguments of what PyTorch computes, such as attention, which it derives once."""

    def __call__(self, *arguments: Tensor) -> Values:
        """The arguments; what an op of our own refuses is refused through them."""
        self.refuse_tangents(arguments)
        wants = torch.is_grad_enabled() and any(a.requires_grad for a in arguments)
        return self.apply(*arguments) if wants else arguments

    def call(self, *arguments: Any) -> tuple[Values, Sequence[Tensor | None], Values]:
        return tuple(a.view_as(a) for a in arguments), (), ()

    def gradients(
        self, upstream: Values, saved: Values, constants: Values, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return upstream


class _Record:
    """What one call by `_transformed` tells its `setup_context`."""

    constants: Values
    saved: list[int | None]  # where each saved tensor stands among arguments and results
    num_results: int


def _eager(op: Differentiable, name: str) -> type[Function]:
    def forward(ctx: Any, *arguments: Any) -> Any:
        results, saved, ctx.constants = op.call(*arguments)
        edge = _edge()
        ctx.num_edges, ctx.num_results = len(edge), len(results)
        ctx.save_for_backward(*edge, *saved)
        ctx.set_materialize_grads(False)
        if op.fixed:
            ctx.mark_non_differentiable(*(results[i] for i in op.fixed))
        return *edge, *results

    members = {"forward": staticmethod(forward), "backward": _backward(op)}
    return type(name, (Function,), members)


def _transformed(op: Differentiable, name: str) -> type[Function]:
    """Hands out what is saved, too, since `setup_context` sees arguments and results alone."""

    def forward(record: _Record, *arguments: Any) -> Values:
        results, saved, record.constants = op.call(*arguments)
        known = (*_edge(), *results)
        extra = [s for s in saved if s is not None and not _is_among(s, (*arguments, *results))]
        everything = (record, *arguments, *known, *extra)
        record.saved = [None if s is None else _index(everything, s) for s in (known[0], *saved)]
        record.num_results = len(results)
        return *known, *extra

    def setup_context(ctx: Any, inputs: Values, output: Values) -> None:
        record = inputs[0]
        everything = (*inputs, *output)
        ctx.save_for_backward(*(None if i is None else everything[i] for i in record.saved))
        ctx.constants, ctx.num_results, ctx.num_edges = record.constants, record.num_results, 1
        ctx.set_materialize_grads(False)
        extra = output[1 + record.num_results :]
        ctx.mark_non_differentiable(*(output[1 + i] for i in op.fixed), *extra)

    def jvp(*_: Any) -> NoReturn:
        _refuse(op.op, "forward-mode derivative")

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": _backward(op, first=1),
        "jvp": staticmethod(jvp),
        "generate_vmap_rule": True,
    }
    return type(name, (Function,), members)


def _edge() -> tuple[Tensor, ...]:
    """An empty result, through which a second derivative finds the way to the arguments.

    Compiled graphs go without: PyTorch itself refuses their second derivative. It is kept as a
    result, so hooks of saved tensors that hold what they get keep a graph that never runs backward,
    as with every `autograd.Function` that keeps a result.
    """
    return () if torch.compiler.is_compiling() else (torch.empty(0),)


def _backward(op: Differentiable, first: int = 0) -> Any:
    """The backward pass, whose `first` arguments are nobody's."""

    def backward(ctx: Any, *upstream: Tensor | None) -> Values:
        start = ctx.num_edges
        saved = ctx.saved_tensors
        given, needs = upstream[start : start + ctx.num_results], ctx.needs_input_grad[first:]
        with torch.no_grad():
            found = op.gradients(given, saved[start:], ctx.constants, needs)
        if start and torch.is_grad_enabled():  # under create_graph=True
            found = _Once.apply(op.op, len(found), saved[0], *given, *found)
        return (None,) * first + tuple(found)

    return staticmethod(backward)


class _Once(Function):
    """Hands gradients on, and raises where they are differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *values: Tensor | None) -> Values:
        del op
        return tuple(None if v is None else v.view_as(v) for v in values[len(values) - count :])

    @staticmethod
    def setup_context(ctx: Any, inputs: Values, output: Values) -> None:
        del output
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse(ctx.op, "second derivative")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _refuse(ctx.op, "second derivative")


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _refuse(op: str, what: str) -> NoReturn:
    raise NotImplementedError(f'{op}: no {what}; impl="reference" has it')


def _is_among(wanted: Any, values: Sequence[Any]) -> bool:
    return any(value is wanted for value in values)


def _index(values: Sequence[Any], wanted: Any) -> int:
    return next(i for i, value in enumerate(values) if value is wanted)
