"""Operators of merging and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from molex_kernels import _operators

Tensors = tuple[Tensor, ...]
Factors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _deltas_forward_fake(base: Tensor, experts: Tensor, *_: Any) -> Tensor:
    return experts.new_empty(experts.shape)


def _deltas_forward_triton(*arguments: Any) -> Tensor:
    from molex_kernels.ops.merging.kernels import launch

    return launch.deltas_forward(*arguments)


def _deltas_backward_fake(
    ddeltas: Tensor,
    base: Tensor,
    experts: Tensor,
    out1: Tensor | None,
    out2: Tensor | None,
    in1: Tensor | None,
    in2: Tensor | None,
    ties: bool,
    needs: Sequence[bool],
) -> Tensors:
    owners = (base, experts, out1, out2, in1, in2)
    return tuple(
        base.new_empty(owner.shape if need and owner is not None else (0,))
        for owner, need in zip(owners, needs, strict=True)
    )


def _deltas_backward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.merging.kernels import launch

    return launch.deltas_backward(*arguments)


def _linear_forward_fake(
    x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], base.shape[0])


def _linear_forward_triton(*arguments: Any) -> Tensor:
    from molex_kernels.ops.merging.kernels import launch

    return launch.linear_forward(*arguments)


def _linear_backward_fake(
    dy: Tensor, x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, needs: Sequence[bool]
) -> Tensors:
    shapes = (x.shape, base.shape, deltas.shape, gates.shape, (x.shape[0], base.shape[0]))
    owners = (x, base, deltas, gates, gates)
    return tuple(
        owner.new_empty(shape if need else (0,))
        for owner, shape, need in zip(owners, shapes, needs, strict=True)
    )


def _linear_backward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.merging.kernels import launch

    return launch.linear_backward(*arguments)


_DELTAS_FORWARD = (
    "(Tensor base, Tensor experts, Tensor? out1, Tensor? out2, Tensor? in1, Tensor? in2, "
    "bool ties) -> Tensor"
)
_DELTAS_BACKWARD = (
    "(Tensor ddeltas, Tensor base, Tensor experts, Tensor? out1, Tensor? out2, Tensor? in1, "
    "Tensor? in2, bool ties, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LINEAR_FORWARD = "(Tensor x, Tensor base, Tensor deltas, Tensor gates, Tensor? bias) -> Tensor"
_LINEAR_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor base, Tensor deltas, Tensor gates, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_deltas_forward = {
    "triton": _operators.define(
        "camex_deltas_fwd_triton",
        _DELTAS_FORWARD,
        fake=_deltas_forward_fake,
        run=_deltas_forward_triton,
    ),
    "cpu": _operators.define("camex_deltas_fwd_cpu", _DELTAS_FORWARD, fake=_deltas_forward_fake),
}
_deltas_backward = {
    "triton": _operators.define(
        "camex_deltas_bwd_triton",
        _DELTAS_BACKWARD,
        fake=_deltas_backward_fake,
        run=_deltas_backward_triton,
    ),
    "cpu": _operators.define(
        "camex_deltas_bwd_cpu",
        _DELTAS_BACKWARD,
        fake=_deltas_backward_fake,
    ),
}
_linear_forward = {
    "triton": _operators.define(
        "camex_linear_fwd_triton",
        _LINEAR_FORWARD,
        fake=_linear_forward_fake,
        run=_linear_forward_triton,
    ),
    "cpu": _operators.define("camex_linear_fwd_cpu", _LINEAR_FORWARD, fake=_linear_forward_fake),
}
_linear_backward = {
    "triton": _operators.define(
        "camex_linear_bwd_triton",
        _LINEAR_BACKWARD,
        fake=_linear_backward_fake,
        run=_linear_backward_triton,
    ),
    "cpu": _operators.define(
        "camex_linear_bwd_cpu",
        _LINEAR_BACKWARD,
        fake=_linear_backward_fake,
    ),
}


class _Deltas(Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        experts: Tensor,
        out1: Tensor | None,
        out2: Tensor | None,
        in1: Tensor | None,
        in2: Tensor | None,
        ties: bool,
        impl: str,
    ) -> Tensor:
        tensors = (base, experts, out1, out2, in1, in2)
        ctx.save_for_backward(*tensors)
        ctx.ties, ctx.impl = ties, impl
        return _deltas_forward[impl](*tensors, ties)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddeltas: Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:6])
        gradients = _deltas_backward[ctx.impl](ddeltas, *ctx.saved_tensors, ctx.ties, needs)
        return *_needed(gradients, needs), None, None


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        deltas: Tensor,
        gates: Tensor,
        bias: Tensor | None,
        impl: str,
    ) -> Tensor:
        ctx.save_for_backward(x, base, deltas, gates)
        ctx.impl = impl
        return _linear_forward[impl](x, base, deltas, gates, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:5])
        gradients = _linear_backward[ctx.impl](dy, *ctx.saved_tensors, needs)
        return *_needed(gradients, needs), None


def _needed(gradients: Tensors, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def deltas(base: Tensor, experts: Tensor, factors: Factors, ties: bool, impl: str) -> Tensor:
    """Calls the operator of `impl`, through autograd where a gradient is wanted."""
    if _operators.wants_grad(base, experts, *factors):
        return _Deltas.apply(base, experts, *factors, ties, impl)
    return _deltas_forward[impl](base, experts, *factors, ties)


def linear(
    x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor | None, impl: str
) -> Tensor:
    """Calls the operator of `impl`, through autograd where a gradient is wanted."""
    if _operators.wants_grad(x, base, deltas, gates, bias):
        return _Linear.apply(x, base, deltas, gates, bias, impl)
    return _linear_forward[impl](x, base, deltas, gates, bias)
