"""What layer mixing is measured against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def published_layer_vote(
    logits: Tensor, *, mode: str = "mode", mask: Tensor | None = None
) -> Tensor:
    """argmax per token and the mode over all of them, or the argmax of a mean."""
    if mask is not None:
        raise NotImplementedError("the published code counts padding")
    if mode == "mode":
        return torch.mode(torch.argmax(logits, dim=-1).flatten()).values
    scores = F.softmax(logits, dim=-1) if mode == "mean_softmax" else torch.sigmoid(logits)
    return torch.argmax(scores.flatten(0, -2).mean(0))


def published_layer_linear(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    *,
    biases: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    shared: bool = False,
    **_: Any,
) -> Tensor:
    """One branch after the other, each layer looked up by the host."""
    outputs = []
    for g in range(index.shape[0]):
        layer = int(index[g].item())
        rows = x if shared else x[g]
        y = F.linear(rows, weights[layer], None if biases is None else biases[layer])
        if a is not None and b is not None:
            y = y + scaling * F.linear(F.linear(rows, a[layer]), b[layer])
        outputs.append(y)
    return torch.stack(outputs)


def library_layer_linear(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    *,
    biases: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    shared: bool = False,
    **_: Any,
) -> Tensor:
    """Batched products with gathered weights."""
    rows = x.expand(index.shape[0], *x.shape) if shared else x
    y = torch.bmm(rows, weights[index].mT)
    if biases is not None:
        y = y + biases[index][:, None]
    if a is not None and b is not None:
        y = y + scaling * torch.bmm(torch.bmm(rows, a[index].mT), b[index].mT)
    return y


def published_layer_mix(
    outputs: Tensor,
    coeff: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """The residual, the products and their sum one after the other, then the norm."""
    c = torch.softmax(logits, 0) if coeff is None and logits is not None else coeff
    assert c is not None
    c = c.to(outputs.dtype)
    blocks = outputs if residual is None else outputs + residual
    y = c[0] * blocks[0]
    for g in range(1, blocks.shape[0]):
        y = y + c[g] * blocks[g]
    if eps is None:
        return y
    return y, F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
