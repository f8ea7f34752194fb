"""A sparse mixture of experts with momentum, as a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex_kernels import _check, _published
from molex_kernels.ops.dispatch.module import PUBLISHED as EXPERTS
from molex_kernels.ops.dispatch.module import MoEMLP
from molex_kernels.ops.momentum.api import moe_mlp_momentum
from molex_kernels.ops.momentum.state import State
from molex_kernels.ops.momentum.types import Rule
from molex_kernels.ops.routing.module import TopKRouter

WIRINGS = ("published", "pre_ln")
LEARNED = ("mu", "gamma")


class MomentumOutput(NamedTuple):
    """What a layer returns: `state` goes to the next layer, `routing` to a balance loss.

    Attributes:
        y: [..., D].
        state: of the rule.
        routing: what the router returned, or was given.
    """

    y: Tensor
    state: State
    routing: Sequence[Tensor]


class MomentumMoE(nn.Module):
    """Router, experts, momentum and norms: the feed-forward half of a MomentumSMoE block.

    With SMoE(h) = moe_mlp(h, router(h)) and step by the rule:

    wiring="published" (post-LN, arXiv 2410.14574 and its code), for h = LN1(x + Attention(x)):
        s = norm(h - step(dropout(SMoE(h))));   y = norm_out(h + s)
    wiring="pre_ln":
        y = x - step(dropout(SMoE(norm(x))))

    The first layer of a model is called with state None, each other one with the state that the one
    before returned. `RobustMomentum` evaluates router and experts at its look-ahead point.

    Args:
        d_model: D.
        d_hidden: the experts' width.
        num_experts: E.
        top_k: K.
        rule: shared or one per layer. An `nn.Parameter` in it (mu, gamma) becomes a parameter of
            this module, and of every other one that is given the same rule.
        wiring: "published" or "pre_ln".
        activation: as in `moe_mlp`; relu is the published one.
        bias: whether gate and experts have biases, as FastMoE's have.
        dropout: probability, in training, on the experts' summed output. The published code has a
            second dropout inside the experts, after the activation, which is left out here.
        sign: 1 subtracts the step, as published. -1 adds it, which is what weights expect that were
            trained without momentum, where the experts' output is added.
        impl: passed to the functions at each call.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
        rule: Rule,
        *,
        wiring: str = "published",
        activation: str = "relu",
        bias: bool = True,
        dropout: float = 0.0,
        sign: int = 1,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(rule, Rule):
            raise TypeError(f"rule: expected a rule, got {type(rule).__name__}")
        _check.choice("wiring", wiring, WIRINGS)
        _check.choice("sign", sign, (1, -1))
        _check.probability("dropout", dropout)
        self.rule = rule
        self.wiring = wiring
        self.sign = sign
        self.dropout = dropout
        self.impl = impl
        where: Any = {"device": device, "dtype": dtype}
        self.router = TopKRouter(d_model, num_experts, top_k, bias=bias, impl=impl, **where)
        self.experts = MoEMLP(
            d_model, d_hidden, num_experts, activation=activation, bias=bias, impl=impl, **where
        )
        self.norm = nn.LayerNorm(d_model, **where)
        if wiring == "published":
            self.norm_out = nn.LayerNorm(d_model, **where)
        for name in LEARNED:
            value = getattr(rule, name, None)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)

    def reset_parameters(self) -> None:
        """Draws router, experts and norms anew; learned numbers of the rule stay as they are."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]

    def forward(
        self, x: Tensor, state: State | None = None, *, routing: Sequence[Tensor] | None = None
    ) -> MomentumOutput:
        """Runs one layer.

        Args:
            x: [..., D].
            state: what the layer before returned; None in the first layer.
            routing: a `Routing` or (expert_index, expert_weight) of T rows, takes the place of the
                module's own router.

        Returns:
            (y [..., D], state, routing).
        """
        rule = self._current_rule()
        published = self.wiring == "published"
        inner = rule.lookahead(x, state)
        if not published:
            inner = self.norm(inner)
        if routing is None:
            routing = self.router(inner)
        weight = routing[1] if self.sign == 1 else -routing[1]
        experts = self.experts
        norm = self.norm
        y, state = moe_mlp_momentum(
            x,
            routing[0].view(*x.shape[:-1], -1),
            weight.view(*x.shape[:-1], -1),
            experts.w_up,
            experts.w_down,
            state,
            rule,
            expert_input=inner,
            b_up=experts.b_up,
            b_down=experts.b_down,
            activation=experts.activation,
            norm=(norm.weight, norm.bias, norm.eps) if published else None,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )
        if published:
            out = self.norm_out
            y = F.layer_norm(x + y, out.normalized_shape, out.weight, out.bias, out.eps)
        return MomentumOutput(y, state, routing)

    def load_published(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies one layer from the names of MomentumSMoE's code, alone or under any prefix.

        `gate.gate.*`, `experts.htoh4.*`, `experts.h4toh.*` (all FastMoE's), `layer_norm.*` and, in
        the published wiring, `norm2.*`. Its attention and first norm are not part of this module.

        Args:
            state_dict: of the checkpoint.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a missing name, a name under two prefixes, or another shape.
        """
        names = {f"experts.{own}": f"experts.{name}" for own, name in EXPERTS.items()}
        for part in ("weight", "bias"):
            names[f"router.{part}"] = f"gate.gate.{part}"
            names[f"norm.{part}"] = f"layer_norm.{part}"
            names[f"norm_out.{part}"] = f"norm2.{part}"
        own = {name for name, _ in self.named_parameters()}
        _published.load(self, state_dict, {k: v for k, v in names.items() if k in own})

    def extra_repr(self) -> str:
        return f"rule={self.rule}, wiring={self.wiring!r}, dropout={self.dropout}, sign={self.sign}"

    def _current_rule(self) -> Rule:
        # By name, since whoever wraps or moves a module may put other parameters in their place.
        learned = {name: self.get_parameter(name) for name in LEARNED if name in self._parameters}
        return dataclasses.replace(self.rule, **learned) if learned else self.rule
