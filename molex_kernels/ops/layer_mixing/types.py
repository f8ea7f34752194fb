"""What the layers of layer mixing pass to one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MODES = ("mode", "mean_softmax", "mean_sigmoid")


class LoRA(NamedTuple):
    """Low-rank adapters of all layers: layer l adds scaling (x a_l^T) b_l^T.

    Attributes:
        a: [L, r, D], or L tensors [r, D].
        b: [L, N, r], or L tensors [N, r].
        scaling: alpha / r.
    """

    a: Tensor | Sequence[Tensor]
    b: Tensor | Sequence[Tensor]
    scaling: float = 1.0


def num_layers(tensors: Sequence[Tensor], dims: int) -> int:
    """L of one stacked tensor with `dims` dimensions, or of a sequence of L tensors."""
    return tensors[0].shape[0] if tensors[0].dim() == dims else len(tensors)


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raises an error for a layer that is not there, of an index that the host has read."""
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"index: expected layers in [0, {num_layers}), got {layer}")


def gradient_size(tensors: Sequence[Tensor], dims: int) -> tuple[int, ...]:
    """The stacked shape of these tensors' gradient; (0,) where there are none."""
    if not tensors:
        return (0,)
    if tensors[0].dim() == dims:
        return tuple(tensors[0].shape)
    return (len(tensors), *tensors[0].shape)


def branches(x: Tensor, index: Tensor, shared: bool) -> Tensor:
    """[G, T, D] of x [T, D] that the branches share, or of x as it is."""
    return x.expand(index.shape[0], -1, -1) if shared else x
