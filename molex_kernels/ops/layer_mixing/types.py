"""What the layers of layer mixing pass to one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
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


_flags: dict[torch.device, Tensor] = {}


def flag(device: torch.device) -> Tensor:
    """int32 [1] of this device: not 0 once a layer index was out of range.

    One buffer for the life of the process, so that captured graphs may write to it.
    """
    if device not in _flags:
        _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[device]


def take_flags() -> list[torch.device]:
    """The devices whose flag was set; clears all flags. Waits for the devices."""
    raised = [device for device, value in _flags.items() if value.item()]
    for value in _flags.values():
        value.zero_()
    return raised


def num_layers(tensors: Sequence[Tensor], dims: int) -> int:
    """L of one stacked tensor with `dims` dimensions, or of a sequence of L tensors."""
    return tensors[0].shape[0] if tensors[0].dim() == dims else len(tensors)


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
