"""Operators of layer mixing and their gradients.

Weights, biases and adapters are lists: one stacked tensor, or one tensor per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from molex_kernels import _operators
from molex_kernels.ops.layer_mixing import cpu, types

Tensors = tuple[Tensor, ...]
Groups = tuple[Tensors, Tensors, Tensors, Tensors]  # weights, biases, LoRA's a and b
DIMS = (3, 2, 3, 3)  # of each group where it is stacked


def _vote_fake(logits: Tensor, mask: Tensor | None, mode: str) -> Tensor:
    return logits.new_empty((), dtype=torch.int64)


def _vote_triton(*arguments: Any) -> Tensor:
    from molex_kernels.ops.layer_mixing.kernels import launch

    return launch.vote(*arguments)


def _linear_forward_fake(x: Tensor, index: Tensor, weights: Sequence[Tensor], *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weights[0].shape[-2])


def _linear_forward_triton(*arguments: Any) -> Tensor:
    from molex_kernels.ops.layer_mixing.kernels import launch

    return launch.linear_forward(*arguments)


def _linear_backward_fake(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: float,
    shared: bool,
    needs: Sequence[bool],
) -> Tensors:
    size = (x.shape[1:] if shared else x.shape) if needs[0] else (0,)
    groups = (weights, biases, a, b)
    return (
        x.new_empty(size),
        *(
            x.new_empty(
                types.gradient_size(group, dims) if need else (0,),
                dtype=group[0].dtype if group else x.dtype,
            )
            for group, dims, need in zip(groups, DIMS, needs[1:], strict=True)
        ),
    )


def _linear_backward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.layer_mixing.kernels import launch

    return launch.linear_backward(*arguments)


def _mix_forward_fake(
    outputs: Tensor,
    coeff: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    shape = outputs.shape[1:]
    return outputs.new_empty(shape), outputs.new_empty((0,) if eps is None else shape)


def _mix_forward_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from molex_kernels.ops.layer_mixing.kernels import launch

    return launch.mix_forward(*arguments)


def _mix_backward_fake(
    dy: Tensor | None,
    dnormed: Tensor | None,
    outputs: Tensor,
    coeff: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float | None,
    needs: Sequence[bool],
) -> Tensors:
    sizes = (outputs.shape, coeff.shape, (2, outputs.shape[2]))
    dtypes = (outputs.dtype, torch.float32, torch.float32)
    return tuple(
        outputs.new_empty(size if need else (0,), dtype=dtype)
        for size, dtype, need in zip(sizes, dtypes, needs, strict=True)
    )


def _mix_backward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.layer_mixing.kernels import launch

    return launch.mix_backward(*arguments)


def _define(name: str, schema: str, fake: Any, triton: Any, native: Any = None) -> dict[str, Any]:
    return {
        impl: _operators.define(f"{name}_{impl}", schema, fake=fake, run=run)
        for impl, run in (("triton", triton), ("cpu", native))
    }


_GROUPS = "Tensor[] weights, Tensor[] biases, Tensor[] a, Tensor[] b, float scaling"
_NORM = "Tensor outputs, Tensor coeff, Tensor? residual, Tensor? weight"

vote = _define(
    "layer_vote",
    "(Tensor logits, Tensor? mask, str mode) -> Tensor",
    _vote_fake,
    _vote_triton,
)
_linear_forward = _define(
    "layer_linear_fwd",
    f"(Tensor x, Tensor index, {_GROUPS}) -> Tensor",
    _linear_forward_fake,
    _linear_forward_triton,
    cpu.linear_forward,
)
_linear_backward = _define(
    "layer_linear_bwd",
    f"(Tensor dy, Tensor x, Tensor index, {_GROUPS}, bool shared, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_backward_fake,
    _linear_backward_triton,
    cpu.linear_backward,
)
_mix_forward = _define(
    "layer_mix_fwd",
    f"({_NORM}, Tensor? bias, float? eps) -> (Tensor, Tensor)",
    _mix_forward_fake,
    _mix_forward_triton,
)
_mix_backward = _define(
    "layer_mix_bwd",
    f"(Tensor? dy, Tensor? dnormed, {_NORM}, float? eps, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _mix_backward_fake,
    _mix_backward_triton,
)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        scaling: float,
        shared: bool,
        impl: str,
        counts: tuple[int, int, int, int],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, index, *tensors)
        ctx.scaling, ctx.shared, ctx.impl, ctx.counts = scaling, shared, impl, counts
        groups = _split(tensors, counts)
        return _linear_forward[impl](_branches(x, index, shared), index, *groups, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, index, *tensors = ctx.saved_tensors
        groups = _split(tensors, ctx.counts)
        wanted = _split(ctx.needs_input_grad[6:], ctx.counts)
        needs = [ctx.needs_input_grad[0], *map(any, wanted)]
        dx, *found = _linear_backward[ctx.impl](
            dy,
            _branches(x, index, ctx.shared),
            index,
            *groups,
            ctx.scaling,
            ctx.shared,
            needs,
        )
        gradients: list[Tensor | None] = []
        for gradient, group, dims, need in zip(found, groups, DIMS, needs[1:], strict=True):
            if not need:
                gradients += [None] * len(group)
            elif group[0].dim() == dims:
                gradients.append(gradient)
            else:
                gradients += gradient.unbind(0)
        return dx if needs[0] else None, None, None, None, None, None, *gradients


class _Mix(Function):
    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        coeff: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(outputs, coeff, residual, weight)
        ctx.eps, ctx.impl = eps, impl
        ctx.set_materialize_grads(False)
        y, normed = _mix_forward[impl](outputs, coeff, residual, weight, bias, eps)
        if eps is None:
            ctx.mark_non_differentiable(normed)
        return y, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dnormed: Tensor | None) -> tuple[Any, ...]:
        outputs, coeff, residual, weight = ctx.saved_tensors
        if ctx.eps is None:
            dnormed = None
        if dy is None and dnormed is None:
            return (None,) * 7
        wants = ctx.needs_input_grad
        needs = [wants[0] or wants[2], wants[1], (wants[3] or wants[4]) and dnormed is not None]
        doutputs, dcoeff, dnorm = _mix_backward[ctx.impl](
            dy, dnormed, outputs, coeff, residual, weight, ctx.eps, needs
        )
        return (
            doutputs if wants[0] else None,
            dcoeff if wants[1] else None,
            doutputs if wants[2] else None,
            dnorm[0] if wants[3] and needs[2] else None,
            dnorm[1] if wants[4] and needs[2] else None,
            None,
            None,
        )


def _split(flat: Sequence[Any], counts: Sequence[int]) -> tuple[Any, ...]:
    groups, first = [], 0
    for count in counts:
        groups.append(tuple(flat[first : first + count]))
        first += count
    return tuple(groups)


def _branches(x: Tensor, index: Tensor, shared: bool) -> Tensor:
    return x.expand(index.shape[0], -1, -1) if shared else x


def linear(
    x: Tensor, index: Tensor, groups: Groups, scaling: float, shared: bool, impl: str
) -> Tensor:
    """Calls the operator of `impl`, through autograd where a gradient is wanted.

    x is [G, T, D], or [T, D] where shared.
    """
    tensors = [t for group in groups for t in group]
    if _operators.wants_grad(x, *tensors):
        counts = tuple(map(len, groups))
        return _Linear.apply(x, index, scaling, shared, impl, counts, *tensors)
    return _linear_forward[impl](_branches(x, index, shared), index, *groups, scaling)


def mix(
    outputs: Tensor,
    coeff: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(y, LayerNorm(y), empty without eps); weight and bias are fp32. outputs [G, T, D]."""
    if _operators.wants_grad(outputs, coeff, residual, weight, bias):
        return _Mix.apply(outputs, coeff, residual, weight, bias, eps, impl)
    return _mix_forward[impl](outputs, coeff, residual, weight, bias, eps)
