"""Loads a soft mixture from the names of ACMoE's code, in which each expert is a module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from molex_kernels import _check, _published

# Of the router, and of each expert; `{}` is its number.
ROUTER = {"phi": "phi", "scale": "scale"}
EXPERTS = {
    "experts.w_up": "experts.{}.fc1.weight",
    "experts.b_up": "experts.{}.fc1.bias",
    "experts.w_down": "experts.{}.fc2.weight",
    "experts.b_down": "experts.{}.fc2.bias",
}


@torch.no_grad()
def load(
    module: nn.Module, num_experts: int, state_dict: Mapping[str, Tensor], prefix: str
) -> None:
    """Stacks the experts' tensors by number, and copies all; checks everything before."""
    state_dict = _published.entries(state_dict, prefix)
    start = _published.start_of(state_dict, "phi", prefix)
    own = {key: value for key, value in state_dict.items() if key.startswith(start)}
    stacked = {start + name: own[start + name] for name in ROUTER if start + name in own}
    read = set(stacked)
    parameters = dict(module.named_parameters())
    for parameter, name in EXPERTS.items():
        keys = [start + name.format(number) for number in range(num_experts)]
        if parameter in parameters:
            shape = parameters[parameter].shape[1:]
            stacked[start + parameter] = torch.stack([_part(own, key, shape) for key in keys])
            read.update(keys)
    beside = sorted(key for key in own if key.startswith(f"{start}experts.") and key not in read)
    if beside:
        raise ValueError(
            f"state_dict: expected the weights of {type(module).__name__}({module.extra_repr()}), "
            f"which has no place for {_published.listed(beside)}"
        )
    names = {**ROUTER, **{parameter: parameter for parameter in EXPERTS}}
    _published.load(module, stacked, names, prefix=start)
    if isinstance(state_dict, _published.Tracked):
        state_dict.read.update(read)


def _part(state_dict: Mapping[str, Tensor], key: str, shape: torch.Size) -> Tensor:
    """One expert's tensor, of this shape."""
    value = state_dict.get(key)
    if value is None:
        raise ValueError(f"state_dict: expected a name {key!r}, got none")
    _check.trailing(key, value, "...", least=0)
    if value.shape != shape:
        raise ValueError(f"{key}: expected shape {list(shape)}, got {list(value.shape)}")
    return value
