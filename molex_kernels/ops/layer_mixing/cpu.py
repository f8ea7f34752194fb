"""The linear layers of layer mixing on a CPU: ATen's products on the chosen layers alone.

On a CPU reading the index waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molex_kernels._backends import cpu_product_dtype
from molex_kernels.ops.layer_mixing import types

Tensors = tuple[Tensor, ...]


# Autocast, which is still on inside of an operator, would round fp32 operands to 16 bits again.
@torch.autocast("cpu", enabled=False)
def layer_linear_forward(given: Any) -> Tensor:
    layers = _layers(given.index, given.weights)
    x = given.x.to(cpu_product_dtype(given.x.dtype))
    x = types.branches(x, given.index, given.shared)
    out = x.new_empty(*x.shape[:2], given.weights[0].shape[-2])
    for g, layer in enumerate(layers):
        weight = _one(given.weights, layer, 3).to(x.dtype)
        torch.mm(x[g], weight.mT, out=out[g])
        if given.biases:
            out[g] += _one(given.biases, layer, 2).to(x.dtype)
        if given.a:
            down = x[g] @ _one(given.a, layer, 3).to(x.dtype).mT
            out[g].addmm_(down, _one(given.b, layer, 3).to(x.dtype).mT, alpha=given.scaling)
    return out.to(given.x.dtype)


@torch.autocast("cpu", enabled=False)
def layer_linear_backward(given: Any) -> Tensors:
    """Gradients of x, weights, biases, a and b, stacked; those not needed are empty."""
    needs_x, needs_weight, needs_bias, needs_a, needs_b = given.needs
    dtype = cpu_product_dtype(given.x.dtype)
    x, dy = given.x.to(dtype), given.dy.to(dtype)
    size = x.shape if needs_x else (0,)
    x = types.branches(x, given.index, given.shared)
    dx = torch.zeros(size, dtype=torch.float32 if given.shared else given.x.dtype)
    dweight = _zeros(given.weights, 3, x, needs_weight)
    dbias = _zeros(given.biases, 2, x, needs_bias)
    da = _zeros(given.a, 3, x, needs_a)
    db = _zeros(given.b, 3, x, needs_b)
    for g, layer in enumerate(_layers(given.index, given.weights)):
        if needs_x:
            part = dy[g] @ _one(given.weights, layer, 3).to(x.dtype)
        if needs_weight:
            dweight[layer] += dy[g].mT.float() @ x[g].float()
        if needs_bias:
            dbias[layer] += dy[g].sum(0, dtype=torch.float32)
        if given.a and (needs_x or needs_a):
            up = dy[g] @ _one(given.b, layer, 3).to(x.dtype)
            if needs_x:
                part.addmm_(up, _one(given.a, layer, 3).to(x.dtype), alpha=given.scaling)
            if needs_a:
                da[layer] += given.scaling * (up.mT.float() @ x[g].float())
        if needs_b:
            down = x[g] @ _one(given.a, layer, 3).to(x.dtype).mT
            db[layer] += given.scaling * (dy[g].mT.float() @ down.float())
        if needs_x:
            if given.shared:
                dx += part
            else:
                dx[g] = part
    return (
        dx.to(given.x.dtype),
        *(
            gradient.to(owner[0].dtype if owner else given.x.dtype)
            for gradient, owner in zip(
                (dweight, dbias, da, db),
                (given.weights, given.biases, given.a, given.b),
                strict=True,
            )
        ),
    )


def _layers(index: Tensor, weights: Sequence[Tensor]) -> list[int]:
    layers: list[int] = index.tolist()
    types.check_layers(layers, types.num_layers(weights, 3))
    return layers


def _one(tensors: Sequence[Tensor], layer: int, dims: int) -> Tensor:
    """The tensor of one layer, a view."""
    return tensors[0][layer] if tensors[0].dim() == dims else tensors[layer]


def _zeros(tensors: Sequence[Tensor], dims: int, x: Tensor, needed: bool) -> Tensor:
    size = types.gradient_size(tensors, dims) if needed else (0,)
    return torch.zeros(size, dtype=torch.float32)
