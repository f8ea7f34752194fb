"""Layer mixing in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels._dtypes import accumulate_dtype
from molex_kernels.ops.layer_mixing import types


def vote(logits: Tensor, mask: Tensor | None, mode: str) -> Tensor:
    """argmax_l of a sum over tokens: of one-hot argmaxes, softmaxes or sigmoids; ties: lower l."""
    logits = logits.to(accumulate_dtype(logits.dtype))
    if mode == "mode":
        layers = torch.arange(logits.shape[1], device=logits.device)
        scores = (logits.argmax(1, keepdim=True) == layers).to(logits.dtype)
    elif mode == "mean_softmax":
        scores = torch.softmax(logits, 1)
    else:
        scores = torch.sigmoid(logits)
    if mask is not None:
        scores = torch.where(mask[:, None], scores, 0)
    return scores.sum(0).argmax(0)


def linear(
    x: Tensor,
    index: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: float,
) -> Tensor:
    """y_g = x_g W_l^T + bias_l + scaling (x_g A_l^T) B_l^T with l = index_g; x [G, T, D]."""
    index = index.clamp(0, types.num_layers(weights, 3) - 1)
    y = torch.matmul(x, _chosen(weights, index, 3).to(x.dtype).mT)
    if biases:
        y = y + _chosen(biases, index, 2).to(x.dtype)[:, None]
    if a:
        down = torch.matmul(x, _chosen(a, index, 3).to(x.dtype).mT)
        y = y + scaling * torch.matmul(down, _chosen(b, index, 3).to(x.dtype).mT)
    return y


def mix(
    outputs: Tensor,
    coeff: Tensor,
    residual: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float] | None,
) -> tuple[Tensor, Tensor | None]:
    """y = sum_g coeff_g (outputs_g + residual_g), and LayerNorm(y) where there is a norm."""
    dtype = accumulate_dtype(outputs.dtype)
    moved = outputs.to(dtype) if residual is None else outputs.to(dtype) + residual.to(dtype)
    y = (coeff.to(dtype)[:, None, None] * moved).sum(0)
    if norm is None:
        return y.to(outputs.dtype), None
    weight, bias, eps = norm
    normed = F.layer_norm(
        y,
        y.shape[-1:],
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        eps,
    )
    return y.to(outputs.dtype), normed.to(outputs.dtype)


def _chosen(tensors: Sequence[Tensor], index: Tensor, dims: int) -> Tensor:
    stack = tensors[0] if tensors[0].dim() == dims else torch.stack(list(tensors))
    return stack.index_select(0, index)
