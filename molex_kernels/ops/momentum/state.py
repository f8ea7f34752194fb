"""The state that a rule carries from layer to layer: what it holds, and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molex_kernels import _check
from molex_kernels._dtypes import FLOAT_DTYPES, accumulate_dtype, kept
from molex_kernels.ops.momentum.types import AdEMAMix, Mars, RobustMomentum, Rule

State = tuple[Any, ...]


def checked(state: Any, rule: Rule, x: Tensor, f_dtypes: Sequence[torch.dtype]) -> State | None:
    """A state of this rule for x, or None."""
    if state is None:
        return None
    names = rule.states
    expected = f"({', '.join((*names, 'step') if isinstance(rule, AdEMAMix) else names)})"
    length = len(names) + isinstance(rule, AdEMAMix)
    if not isinstance(state, tuple | list):
        raise TypeError(f"state: expected a tuple {expected}, got {type(state).__name__}")
    if len(state) != length:
        raise ValueError(
            f"state: expected {length} entries {expected} for {type(rule).__name__}, "
            f"got {len(state)}"
        )
    averages = num_averages(rule)
    state = (*kept(x, *state[:averages]), *state[averages:])
    dtypes: tuple[torch.dtype, ...] = (accumulate_dtype(x.dtype), x.dtype)
    for index, name in enumerate(names):
        if index >= averages:
            dtypes = FLOAT_DTYPES if isinstance(rule, RobustMomentum) else tuple(f_dtypes)
        elif index > 0:
            dtypes = (state[0].dtype,)
        _check.same_shape(f"state.{name}", state[index], dtypes, x, "x")
    if isinstance(rule, AdEMAMix):
        _check.integer("state.step", state[-1], 0)
    return state


def num_averages(rule: Rule) -> int:
    """How many of the states are running averages, computed by the kernels; they come first."""
    return len(rule.states) - isinstance(rule, RobustMomentum | Mars)


def averages(state: State | None, rule: Rule, width: int) -> list[Tensor]:
    """The running averages as [T, D]; none before the first layer, where they are 0."""
    if state is None:
        return []
    return [s.reshape(-1, width) for s in state[: num_averages(rule)]]


def output_before(state: State | None, rule: Rule) -> Tensor | None:
    """The f of the layer before, for the rule that takes it."""
    return state[2] if state is not None and isinstance(rule, Mars) else None


def step_number(state: State | None, rule: Rule) -> int:
    """The number of the update that is about to be made, from 1, for rules that count them."""
    if state is None or not isinstance(rule, AdEMAMix):
        return 1
    return state[-1] + 1


def after(new: Sequence[Tensor], rule: Rule, x: Tensor, f: Tensor | None, step: int) -> State:
    """The state after an update: the new averages, and what else the rule carries."""
    shaped = tuple(s.view(x.shape) for s in new)
    if isinstance(rule, AdEMAMix):
        return (*shaped, step)
    if isinstance(rule, RobustMomentum):
        return (*shaped, x)
    if isinstance(rule, Mars) and f is not None:
        return (*shaped, f.detach().view(x.shape))
    return shaped
