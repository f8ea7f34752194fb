"""Operators of layer mixing and their gradients.

Weights, biases and adapters are lists: one stacked tensor, or one tensor per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molex_kernels import _operators
from molex_kernels.ops.layer_mixing import reference, types

_TRITON = "molex_kernels.ops.layer_mixing.kernels.launch"
_LAYERS = (
    "Tensor x, Tensor index, Tensor[] weights, Tensor[] biases, Tensor[] a, Tensor[] b, "
    "float scaling, bool shared"
)
_MIXED = "Tensor outputs, Tensor coeff, Tensor? residual, Tensor? weight"
_DIMS = (3, 2, 3, 3)  # of weights, biases, a and b where they are stacked


def _linear_fake(given: Any) -> tuple[Tensor, ...]:
    groups = given[3:7]
    sizes = [types.gradient_size(group, dims) for group, dims in zip(groups, _DIMS, strict=True)]
    dtypes = [group[0].dtype if group else given.x.dtype for group in groups]
    return tuple(
        given.x.new_empty(size if need else (0,), dtype=dtype)
        for size, dtype, need in zip(
            (given.x.shape, *sizes), (given.x.dtype, *dtypes), given.needs, strict=True
        )
    )


class _Mix(_operators.Pass):
    """The gradient of the residual is that of the outputs; those of the norm come in one tensor."""

    def differentiable(self) -> Sequence[str]:
        return ["outputs", "coeff", "residual", "weight", "bias"]

    def differentiate(
        self, upstream: Any, saved: Any, options: Any, wants: Any, impl: str
    ) -> Sequence[Tensor | None] | None:
        outputs, coeff, residual, weight, bias = wants
        normed = upstream[1] is not None
        needs = [outputs or residual, coeff, (weight or bias) and normed]
        found = super().differentiate(upstream, saved, options, needs, impl)
        if found is None:
            return None
        doutputs, dcoeff, dnorm = found
        dweight, dbias = (None, None) if dnorm is None or not needs[2] else dnorm.unbind(0)
        return doutputs, dcoeff, doutputs, dweight, dbias


vote = _operators.Pass(
    "layer_vote",
    "(Tensor logits, Tensor? mask, str mode) -> Tensor",
    fake=lambda a: a.logits.new_empty((), dtype=torch.int64),
    triton=_TRITON,
    reference=lambda a: reference.vote(*a),
)

linear = _operators.Pass(
    "layer_linear",
    f"({_LAYERS}) -> Tensor",
    f"(Tensor dy, {_LAYERS}, bool[] needs)"
    " -> (Tensor dx, Tensor dweights, Tensor dbiases, Tensor da, Tensor db)",
    fake=lambda a: a.x.new_empty(a.index.shape[0], a.x.shape[-2], a.weights[0].shape[-2]),
    fake_backward=_linear_fake,
    triton=_TRITON,
    cpu="molex_kernels.ops.layer_mixing.cpu",
    native=(),
    reference=lambda a: reference.linear(types.branches(a.x, a.index, a.shared), *a[1:7]),
)

# y, and LayerNorm(y), which is empty without eps. weight and bias are fp32.
mix = _Mix(
    "layer_mix",
    f"({_MIXED}, Tensor? bias, float? eps) -> (Tensor y, Tensor normed)",
    f"(Tensor? dy, Tensor? dnormed, {_MIXED}, float? eps, bool[] needs)"
    " -> (Tensor doutputs, Tensor dcoeff, Tensor dnorm)",
    fake=lambda a: (
        a.outputs.new_empty(a.outputs.shape[1:]),
        a.outputs.new_empty((0,) if a.eps is None else a.outputs.shape[1:]),
    ),
    like={
        "coeff": lambda a: a.coeff.new_empty(a.coeff.shape, dtype=torch.float32),
        "norm": lambda a: a.coeff.new_empty(2, a.outputs.shape[2], dtype=torch.float32),
    },
    triton=_TRITON,
    reference=lambda a: reference.mix(
        a.outputs, a.coeff, a.residual, None if a.eps is None else (a.weight, a.bias, a.eps)
    ),
)
