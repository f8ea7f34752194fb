"""A sparse mixture of experts with momentum, as a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molex_kernels import _check, _dtypes, _modules, _published
from molex_kernels.ops.dispatch.module import PUBLISHED as EXPERTS
from molex_kernels.ops.dispatch.module import SHARED, MoEMLP, check_experts
from molex_kernels.ops.dispatch.types import Activation
from molex_kernels.ops.momentum import state as states
from molex_kernels.ops.momentum.api import dropout, moe_mlp_momentum, momentum_update
from molex_kernels.ops.momentum.state import State
from molex_kernels.ops.momentum.types import Rule
from molex_kernels.ops.routing.module import TopKRouter, router_names

WIRINGS = ("published", "pre_ln")
# What may be learned, and what stands in the rule while the module has the parameter.
LEARNED = {"mu": 0.0, "gamma": 1.0}


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


def _shaped(part: Tensor, x: Tensor) -> Tensor:
    """[T, K] as [..., K], beside x [..., D]."""
    tokens, rows = x.numel() // x.shape[-1], part.numel() // part.shape[-1]
    if rows != tokens:
        raise ValueError(f"routing: expected T={tokens} rows, as x has tokens, got {rows}")
    return part.reshape(*x.shape[:-1], part.shape[-1])


class MomentumMoE(_modules.Module):
    """Router, experts, momentum and norms: the feed-forward half of a MomentumSMoE block.

    With SMoE(h) = moe_mlp(h, router(h)), plus the shared expert's output if there is one, and step
    by the rule:

    wiring="published" (post-LN, arXiv 2410.14574 and its code), for h = LN1(x + Attention(x)):
        s = norm(h - step(dropout(SMoE(h))));   y = norm_out(h + s)
    wiring="pre_ln":
        y = x - step(dropout(SMoE(norm(x))))

    The first layer of a model is called with state None, each other one with the state that the one
    before returned. `RobustMomentum` evaluates router and experts at its look-ahead point.

    Experts, step and norm are one op as long as `experts` and `norm` are the modules made here,
    without hooks and without a shared expert. Experts that have one, and a child that is hooked,
    wrapped (PEFT), parametrized, sharded (FSDP, `ExpertParallel`), offloaded or replaced are called
    by themselves, between ops that do the rest: the same layer, not the same speed.

    Args:
        d_model: D.
        d_hidden: the experts' width.
        num_experts: E.
        top_k: K.
        rule: shared or one per layer. An `nn.Parameter` in it (mu, gamma) becomes a parameter of
            this module, and of every other one that is given the same rule. FSDP shards it where
            it has the shape [1], not [].
        wiring: "published" or "pre_ln".
        activation: as in `moe_mlp`; relu is the published one.
        bias: whether gate and experts have biases, as FastMoE's have.
        shared_width: as in `MoEMLP`. Momentum, dropout and sign are of the whole layer's output.
        shared_gate: as in `MoEMLP`.
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
        activation: Activation = "relu",
        bias: bool = True,
        shared_width: int = 0,
        shared_gate: bool = False,
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
        shared = (shared_width, shared_gate)
        check_experts(d_model, d_hidden, num_experts, activation, "concat", bias, *shared, impl)
        self.d_model = d_model
        self.rule = rule
        self.wiring = wiring
        self.sign = sign
        self.dropout = dropout
        self.impl = impl
        where: Any = {"device": device, "dtype": dtype}
        self.router = TopKRouter(d_model, num_experts, top_k, bias=bias, impl=impl, **where)
        self.experts = MoEMLP(
            d_model,
            d_hidden,
            num_experts,
            activation=activation,
            bias=bias,
            shared_width=shared_width,
            shared_gate=shared_gate,
            impl=impl,
            **where,
        )
        self.norm = nn.LayerNorm(d_model, **where)
        if wiring == "published":
            self.norm_out = nn.LayerNorm(d_model, **where)

    @property
    def rule(self) -> Rule:
        """The rule, with the numbers that this module learns as they are now.

        They are parameters of the module, `mu` and `gamma`, and nowhere else, so that whatever
        moves, wraps, parametrizes or replaces parameters reaches them.
        """
        learned = {name: getattr(self, name) for name in self._learned}
        return dataclasses.replace(self._rule, **learned) if learned else self._rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        for name in self.__dict__.get("_learned", ()):
            delattr(self, name)
        values = {name: getattr(rule, name, None) for name in LEARNED}
        learned = {name: v for name, v in values.items() if isinstance(v, nn.Parameter)}
        for name, value in learned.items():
            self.register_parameter(name, value)
        self._learned = tuple(learned)
        fixed: Any = {name: LEARNED[name] for name in learned}
        self._rule = dataclasses.replace(rule, **fixed) if fixed else rule

    def reset_parameters(self) -> None:
        """Draws router, experts and norms anew; learned numbers of the rule stay as they are."""
        for child in self.children():
            child.reset_parameters()  # type: ignore[operator]

    @_modules.fx_leaf
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
        _check.trailing("x", x, "..., D", width=self.d_model)
        rule = self.rule
        state = states.checked(state, rule, x, _dtypes.f_dtypes(x))
        experts, norm = self.experts, self.norm
        if _modules.is_plain(experts, MoEMLP):
            _modules.check_dtype(x, experts.w_up)
        published = self.wiring == "published"
        inner = rule.lookahead(x, state)
        if not published:
            inner = self.norm(inner)
        if routing is None:
            routing = self.router(inner)
        index, weight = (_shaped(part, x) for part in _modules.routing_pair("routing", routing))
        within = None
        if published and _modules.is_plain(norm, nn.LayerNorm):
            within = (norm.weight, norm.bias, norm.eps)
        dropout_p = self.dropout if self.training else 0.0
        if _modules.is_plain(experts, MoEMLP) and experts.shared is None:
            y, state = moe_mlp_momentum(
                x,
                index,
                weight if self.sign == 1 else -weight,
                experts.w_up,
                experts.w_down,
                state,
                rule,
                expert_input=inner,
                b_up=experts.b_up,
                b_down=experts.b_down,
                activation=experts.activation,
                gate_layout=experts.gate_layout,
                norm=within,
                dropout_p=dropout_p,
                impl=self.impl,
            )
        else:
            f = experts(inner, (index, weight))
            f = dropout(f if self.sign == 1 else -f, dropout_p)
            y, state = momentum_update(x, f, state, rule, norm=within, impl=self.impl)
        if published:
            if within is None:
                y = norm(y).to(y.dtype)
            y = self.norm_out(x + y)
        return MomentumOutput(y, state, routing)

    def load_published(self, state_dict: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Copies one layer from the names of MomentumSMoE's code, alone or under any prefix.

        `gate.gate.*` (a router in the place of the module's own: `gate.` and its published names),
        `experts.htoh4.*`, `experts.h4toh.*` (all FastMoE's), `layer_norm.*` and, in the published
        wiring, `norm2.*`. Its attention and first norm are not part of this module; a shared
        expert, which it has none of, stays as it is.

        Args:
            state_dict: of the checkpoint, or of a whole model.
            prefix: what the names of this layer start with; "" takes them from anywhere.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a missing name, a name under two prefixes (the message says which), another
                shape, no name with this prefix, or weights that this module has no place for.
        """
        names = {f"experts.{own}": f"experts.{name}" for own, name in EXPERTS.items()}
        gate, foreign = router_names(self.router)
        names |= {f"router.{own}": f"gate.{name}" for own, name in gate.items()}
        for part in ("weight", "bias"):
            names[f"norm.{part}"] = f"layer_norm.{part}"
            names[f"norm_out.{part}"] = f"norm2.{part}"
        besides = (*LEARNED, *(f"experts.{name}" for name in SHARED))
        foreign = tuple(f"gate.{name}" for name in foreign)
        _published.load(self, state_dict, names, prefix=prefix, besides=besides, foreign=foreign)

    def extra_repr(self) -> str:
        return f"rule={self.rule}, wiring={self.wiring!r}, dropout={self.dropout}, sign={self.sign}"
