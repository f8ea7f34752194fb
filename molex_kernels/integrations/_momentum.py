"""Momentum over the expert layers (MomentumSMoE) of transformers' mixture-of-experts models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from molex_kernels import _backends
from molex_kernels.integrations._handover import Part, Stack, mix_in
from molex_kernels.integrations._layers import check_open
from molex_kernels.ops.momentum.api import momentum_update
from molex_kernels.ops.momentum.types import Mars, RobustMomentum, Rule

_KIND = "momentum"


class _Block(Part):
    """A block whose output is taken for a gradient: it returns the step, which its layer adds."""

    molex_rule: Rule | None
    molex_impl: str | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        given = self.molex_place.given
        if given is None or self.molex_rule is None:
            return output
        if given.has_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "gradient_checkpointing: expected use_reentrant=False with install_momentum, got "
                "True: no gradient would go from layer to layer through the momentum"
            )
        f = output[0] if isinstance(output, tuple) else output
        state = given.before.get(_KIND)
        if state is not None:  # the layer before may stand on another device
            state = tuple(s.to(f.device) if isinstance(s, torch.Tensor) else s for s in state)
        # What is added to the stream x is the negative step, that is y - x: the update of x = 0.
        step, given.made[_KIND] = momentum_update(
            torch.zeros_like(f), -f, state, self.molex_rule, impl=self.molex_impl
        )
        return (step, *output[1:]) if isinstance(output, tuple) else step


def install_momentum(
    model: nn.Module,
    rule: Rule,
    *,
    layers: Iterable[int] | None = None,
    impl: str | None = None,
) -> list[int]:
    """Gives the expert layers of a mixture-of-experts model momentum, from layer to layer.

    MomentumSMoE (arXiv 2410.14574): the output of an expert layer, experts and shared experts
    together, is taken for a negative gradient, and the layer adds -step(-output, state) to the
    stream x where it added the output: with `HeavyBall`, p' = mu p + gamma output, y = x + p'. So
    it is `MomentumMoE` with wiring="pre_ln" and sign=-1, on the model's own weights. The state is 0
    before the first layer, which with `HeavyBall(mu)` stays as it is bit for bit; in every layer so
    does `HeavyBall(0.0)`. Whatever scales or normalises the output before it is added, does so with
    the step.

    Weights, names and checkpoints stay as they are. Training, decoding with a cache (not with
    `Mars`, whose norm is over all tokens of a call), `gradient_checkpointing_enable()` in its
    non-reentrant kind, which is the default of transformers, several forward passes before their
    backward passes, `torch.compile`, deepcopy and pickling work as without it. The state is fp32,
    one or more tensors as large as the stream, and is kept per layer for the backward pass.
    Installed again, it replaces what was installed. `uninstall` takes it out.

    Args:
        model: a transformers model whose decoder has one list of layers, some of them with a child
            that has `experts`.
        rule: `HeavyBall`, `Nesterov`, `Adam`, `AdEMAMix`, `Signum` or `Mars`, of numbers, the same
            for all layers.
        layers: which layers; None is all with experts. The state passes by the others.
        impl: as in `momentum_update`.

    Returns:
        The indices of the layers that have momentum.

    Raises:
        TypeError: a rule that is none, an index that is no int, a model that is no module.
        ValueError: no such layers, an index that there is not, a forward set on a module, or a rule
            that needs what a layer does not show: the stream (`RobustMomentum`, a decay) or
            parameters of its own (a tensor for mu or gamma). Nothing is changed then.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule: expected a rule such as HeavyBall(0.7), got {type(rule).__name__}")
    if isinstance(rule, RobustMomentum) or getattr(rule, "decay", None):
        raise ValueError(
            f"rule: expected one that the experts' output is enough for, got {rule}, which needs "
            "the stream as well"
        )
    if rule.learned_mu is not None or rule.learned_gamma is not None:
        raise ValueError(f"rule: expected numbers, got a tensor in {rule}")
    _backends.check_impl(impl)
    stack = Stack(model)
    chosen = stack.chosen(layers)
    for index in chosen:
        name, layer, block = f"layers.{index}", stack.layers[index], stack.blocks[index]
        if not any(child is block for child in layer.children()):
            raise ValueError(
                f"model: expected {name} to have a child with experts, got {type(layer).__name__}, "
                f"in which they belong to {type(block).__name__}"
            )
        check_open(name, layer)
        check_open(f"the experts of {name}", block)
    if not chosen:
        return chosen
    handover = stack.handover()
    handover.no_cache.pop("install_momentum", None)
    if isinstance(rule, Mars):
        handover.no_cache["install_momentum"] = "the norm of Mars is over all tokens of a call"
    for index, block in stack.blocks.items():
        if index in chosen:
            mix_in(block, _Block, stack.place(index))
        if isinstance(block, _Block):
            block.molex_rule = rule if index in chosen else None
            block.molex_impl = impl
    return chosen
