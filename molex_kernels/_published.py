"""Loads parameters from the names of published checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from molex_kernels import _check

_SHOWN = 6  # prefixes in an error


class Tracked(dict[str, Tensor]):
    """A state dict that knows which of its names were loaded, also those of its parts."""

    def __init__(self, state_dict: Mapping[str, Tensor], read: set[str] | None = None) -> None:
        super().__init__(state_dict)
        self.read: set[str] = set() if read is None else read


def entries(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The entries whose names start with the prefix, which ends with a dot or is given one."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected tensors by name, got {type(state_dict).__name__}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str, got {type(prefix).__name__}")
    for key in state_dict:
        if not isinstance(key, str):
            raise TypeError(f"state_dict: expected tensors by name, got a key {key!r}")
    prefix = _dotted(prefix)
    found = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    if state_dict and not found:
        some = listed(dict.fromkeys(key.rpartition(".")[0] + "." for key in state_dict))
        raise ValueError(
            f"prefix: expected what names of state_dict start with ({some}), got {prefix!r}"
        )
    return Tracked(found, state_dict.read) if isinstance(state_dict, Tracked) else found


def listed(names: Collection[str]) -> str:
    """The first of the names, for a message."""
    text = ", ".join(map(repr, list(names)[:_SHOWN]))
    return text if len(names) <= _SHOWN else f"{text} and {len(names) - _SHOWN} more"


def _dotted(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def _ends(key: str, name: str) -> bool:
    return key == name or key.endswith("." + name)


@torch.no_grad()
def load(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    names: Mapping[str, str],
    *,
    prefix: str = "",
    besides: Collection[str] = (),
    foreign: Collection[str] = (),
    constants: Mapping[str, float] | None = None,
    rows: Collection[str] = (),
) -> None:
    """Copies into the module's parameters; `names` maps each that it may have to its published one.

    The names stand behind the prefix, or anywhere behind it under one of their own; parameters
    `besides` are not published, those in `rows` may be [1, N] there. Everything is checked before
    anything is copied: ValueError for a missing name, a name under two prefixes, another shape, a
    module whose parameters were wrapped, and for weights that the module has no place for: names
    that it would have with other options, `foreign` ones beside its own, and `constants` there that
    have another value; TypeError for what is no such tensor.
    """
    state_dict = entries(state_dict, prefix)
    there = [name for name, _ in module.named_parameters()]
    for own in there:
        if own not in names and own not in besides:
            raise ValueError(
                f"load_published: expected {type(module).__name__} as it was made, without "
                f"wrappers and parametrizations, got one with the parameter {own!r}"
            )
    found: dict[str, Tensor] = {}
    beside: set[str] = set()
    read: set[str] = set()
    for own, name in names.items():
        if own not in there:
            beside.update(key for key in state_dict if _ends(key, name))
            continue
        start = start_of(state_dict, name, prefix)
        value = state_dict[start + name]
        if own in rows and isinstance(value, Tensor) and value.dim() == 2 and len(value) == 1:
            value = value[0]
        found[own] = value
        read.add(start + name)
        _check.trailing(start + name, value, "...", least=0)
        shape = module.get_parameter(own).shape
        if value.shape != shape:
            raise ValueError(
                f"{start + name}: expected shape {list(shape)}, got {list(value.shape)}"
            )
        beside.update(start + other for other in foreign if start + other in state_dict)
        for other, constant in (constants or {}).items():
            given = state_dict.get(start + other)
            if given is None:
                continue
            if not isinstance(given, Tensor) or not (given == constant).all():
                raise ValueError(f"state_dict: expected {start + other!r} to be {constant}")
            read.add(start + other)
    if beside:
        raise ValueError(
            f"state_dict: expected the weights of {type(module).__name__}({module.extra_repr()}), "
            f"which has no place for {listed(sorted(beside))}"
        )
    for own, value in found.items():
        module.get_parameter(own).copy_(value)
    if isinstance(state_dict, Tracked):
        state_dict.read.update(read)


def start_of(state_dict: Mapping[str, Tensor], name: str, prefix: str) -> str:
    """What stands before this name: the prefix, or the one there is behind it."""
    exact = _dotted(prefix) + name
    keys = [exact] if exact in state_dict else [k for k in state_dict if _ends(k, name)]
    if len(keys) != 1:
        raise ValueError(
            f"state_dict: expected one name ending in {name!r}, got {_got(keys, name, prefix)}"
        )
    return keys[0].removesuffix(name)


def _got(keys: list[str], name: str, prefix: str) -> str:
    if not keys:
        return f"none behind {prefix!r}" if prefix else "none"
    prefixes = [key.removesuffix(name) for key in keys]
    return f"{len(keys)}; prefix= takes one layer out, here one of {listed(prefixes)}"
