"""The linear layers of layer mixing on a CPU: ATen's products on the chosen layers alone.

On a CPU reading the index waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        if given.biases:
            torch.addmm(_one(given.biases, layer, 2).to(x.dtype), x[g], weight.mT, out=out[g])
        else:
            torch.mm(x[g], weight.mT, out=out[g])
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
    dx = _input_gradient(given, x, dy) if needs_x else given.x.new_empty(0)
    dweight = _zeros(given.weights, 3, needs_weight, dtype)
    dbias = _zeros(given.biases, 2, needs_bias)
    da, db = _zeros(given.a, 3, needs_a), _zeros(given.b, 3, needs_b)
    x = types.branches(x, given.index, given.shared)
    for layer, rows, upstream in _products(given, x, dy):
        if needs_weight:
            dweight[layer].addmm_(upstream.mT, rows)
        if needs_bias:
            dbias[layer] += upstream.sum(0, dtype=torch.float32)
        if needs_a:
            up = upstream @ _one(given.b, layer, 3).to(dtype)
            da[layer] += given.scaling * (up.mT @ rows)
        if needs_b:
            down = rows @ _one(given.a, layer, 3).to(dtype).mT
            db[layer] += given.scaling * (upstream.mT @ down)
    return (
        dx,
        *(
            gradient.to(owner[0].dtype if owner else given.x.dtype)
            for gradient, owner in zip(
                (dweight, dbias, da, db),
                (given.weights, given.biases, given.a, given.b),
                strict=True,
            )
        ),
    )


def _input_gradient(given: Any, x: Tensor, dy: Tensor) -> Tensor:
    """Of x [G, T, D], or [T, D] where all branches share it: then a sum in fp32."""
    layers = _layers(given.index, given.weights)
    dx = x.new_empty(x.shape, dtype=torch.float32 if given.shared else None)
    if not layers:
        dx.zero_()  # no branch writes what all of them share
    for g, layer in enumerate(layers):
        weight = _one(given.weights, layer, 3).to(x.dtype)
        into = dx if given.shared else dx[g]
        first = not given.shared or g == 0
        part = into if first and dx.dtype == x.dtype else x.new_empty(into.shape)
        torch.mm(dy[g], weight, out=part)
        if given.a:
            up = dy[g] @ _one(given.b, layer, 3).to(x.dtype)
            part.addmm_(up, _one(given.a, layer, 3).to(x.dtype), alpha=given.scaling)
        if part is not into:
            into.copy_(part) if first else into.add_(part)
    return dx.to(given.x.dtype)


def _products(given: Any, x: Tensor, dy: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Layers with the rows of x and dy whose products are summed for their gradients.

    In 16 bits the branches that chose a layer are one product, so that its sum is rounded once; in
    fp32 one each, since the error of a sum grows with its length.
    """
    branches: dict[int, list[int]] = {}
    for g, layer in enumerate(_layers(given.index, given.weights)):
        branches.setdefault(layer, []).append(g)
    for layer, chosen in branches.items():
        if len(chosen) == 1 or x.dtype == torch.float32:
            yield from ((layer, x[g], dy[g]) for g in chosen)
        else:
            rows, upstream = (torch.cat([values[g] for g in chosen]) for values in (x, dy))
            yield layer, rows, upstream


def _layers(index: Tensor, weights: Sequence[Tensor]) -> list[int]:
    layers: list[int] = index.tolist()
    types.check_layers(layers, types.num_layers(weights, 3))
    return layers


def _one(tensors: Sequence[Tensor], layer: int, dims: int) -> Tensor:
    """The tensor of one layer, a view."""
    return tensors[0][layer] if tensors[0].dim() == dims else tensors[layer]


def _zeros(
    tensors: Sequence[Tensor], dims: int, needed: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.zeros(types.gradient_size(tensors, dims) if needed else (0,), dtype=dtype)
