"""How transformers' experts keep their weights: stacked, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# What the experts of releases before 5.24 do not say of themselves, and what held for all of them.
_UNSAID = {"has_gate": True, "is_concatenated": True, "has_post_expert_norm": False}


def says(experts: Any, name: str) -> bool:
    """What the experts say of themselves under this name."""
    return getattr(experts, name, _UNSAID[name])


def weights(
    experts: Any, stacked: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """w_up and w_down as `moe_mlp` has them (views), and their biases.

    Args:
        experts: the module.
        stacked: gives its parameters by name: the module's own, or a rank's part.

    Returns:
        ([E, O, D], [E, D, I], [E, O] or None, [E, D] or None), O = 2 I with a gate, else I.
    """
    name = "gate_up_proj" if says(experts, "has_gate") else "up_proj"
    w_up, w_down = stacked(name), stacked("down_proj")
    if experts.is_transposed:
        w_up, w_down = w_up.mT, w_down.mT
    if not experts.has_bias:
        return w_up, w_down, None, None
    return w_up, w_down, stacked(f"{name}_bias"), stacked("down_proj_bias")
