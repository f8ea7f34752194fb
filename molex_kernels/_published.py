"""Loads parameters from the names of published checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from molex_kernels import _check


def below(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names start with the prefix."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected tensors by name, got {type(state_dict).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str, got {type(prefix).__name__}")
    return {key: value for key, value in state_dict.items() if key.startswith(prefix)}


@torch.no_grad()
def load(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    names: Mapping[str, str],
    besides: Collection[str] = (),
) -> None:
    """Copies into the module's parameters; `names` maps each that it may have to its published one.

    A published name may stand under any prefix; parameters `besides` are not published. Everything
    is checked before anything is copied: ValueError for a missing name, a name under two prefixes,
    another shape, or a module whose parameters were wrapped, TypeError for what is no such tensor.
    """
    state_dict = below("", state_dict)
    there = [name for name, _ in module.named_parameters()]
    for own in there:
        if own not in names and own not in besides:
            raise ValueError(
                f"load_published: expected {type(module).__name__} as it was made, without "
                f"wrappers and parametrizations, got one with the parameter {own!r}"
            )
    found = {}
    for own, name in names.items():
        if own not in there:
            continue
        keys = [key for key in state_dict if key == name or key.endswith("." + name)]
        if len(keys) != 1:
            got = keys or "none"
            raise ValueError(f"state_dict: expected one name ending in {name!r}, got {got}")
        found[own] = state_dict[keys[0]]
        _check.floating(name, found[own], "E, ...", module.get_parameter(own).shape)
    for own, value in found.items():
        module.get_parameter(own).copy_(value)
