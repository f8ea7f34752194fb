"""The experts' MLP as a module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex_kernels import _backends, _check, _modules, _published
from molex_kernels._dtypes import accumulate_dtype
from molex_kernels.ops.dispatch.api import GATE_LAYOUTS, moe_mlp
from molex_kernels.ops.dispatch.types import Activation, activation_of
from molex_kernels.ops.routing.types import RoutePlan

# FastMoE's names, with which MomentumSMoE and ACMoE publish their checkpoints.
PUBLISHED = {
    "w_up": "htoh4.weight",
    "b_up": "htoh4.bias",
    "w_down": "h4toh.weight",
    "b_down": "h4toh.bias",
}
# Which those checkpoints have not.
SHARED = tuple(f"shared.{name}" for name in (*PUBLISHED, "w_gate"))

# w_up, w_down, b_up, b_down.
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def check_experts(
    d_model: int,
    d_hidden: int,
    num_experts: int,
    activation: Activation,
    gate_layout: str,
    bias: bool,
    shared_width: int,
    shared_gate: bool,
    impl: str | None,
) -> None:
    """The options of experts, before anything is allocated."""
    _check.integer("d_model", d_model, 1)
    _check.integer("d_hidden", d_hidden, 1)
    _check.integer("num_experts", num_experts, 1)
    activation_of(activation)
    _check.choice("gate_layout", gate_layout, GATE_LAYOUTS)
    _check.flags(bias=bias, shared_gate=shared_gate)
    _check.integer("shared_width", shared_width, 0)
    if shared_gate and not shared_width:
        raise ValueError("shared_gate: expected False with shared_width=0, got True")
    _backends.check_impl(impl)


class _Experts(_modules.Module):
    """The parameters of experts, stacked by `sizes` (E, or nothing for one), and what they are."""

    b_up: nn.Parameter | None
    b_down: nn.Parameter | None

    def __init__(
        self,
        sizes: tuple[int, ...],
        d_model: int,
        d_hidden: int,
        activation: Activation,
        gate_layout: str,
        bias: bool,
        impl: str | None,
        where: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_layout = gate_layout
        self.impl = impl
        rows = 2 * d_hidden if activation_of(activation)[1] else d_hidden

        def parameter(*own: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*sizes, *own, **where))

        self.w_up = parameter(rows, d_model)
        self.w_down = parameter(d_model, d_hidden)
        self.register_parameter("b_up", parameter(rows) if bias else None)
        self.register_parameter("b_down", parameter(d_model) if bias else None)

    def _weights(self) -> Weights:
        """Each parameter is read once: one that is parametrized is computed when it is read."""
        return self.w_up, self.w_down, self.b_up, self.b_down

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for weight, bias in ((self.w_up, self.b_up), (self.w_down, self.b_down)):
            _draw_like_linear(weight, bias)


def compute(
    experts: _Experts,
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    weights: Weights,
    plan: RoutePlan | None = None,
) -> Tensor:
    """`moe_mlp` with the options of these experts, and with their weights or a rank's part."""
    w_up, w_down, b_up, b_down = weights
    return moe_mlp(
        x,
        expert_index,
        expert_weight,
        w_up,
        w_down,
        b_up=b_up,
        b_down=b_down,
        activation=experts.activation,
        gate_layout=experts.gate_layout,
        plan=plan,
        impl=experts.impl,
    )


def routed_tokens(
    x: Tensor, routing: Sequence[Tensor], w_up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `MoEMLP` is called with, checked: x [T, D], expert_index and expert_weight [T, K]."""
    expert_index, expert_weight = _modules.routing_pair("routing", routing)
    width = w_up.shape[2]
    _check.trailing("x", x, "..., D", width=width)
    _modules.check_dtype(x, w_up)
    return (
        x.reshape(-1, width),
        expert_index.reshape(-1, expert_index.shape[-1]),
        expert_weight.reshape(-1, expert_weight.shape[-1]),
    )


def _draw_like_linear(weight: Tensor, bias: Tensor | None = None) -> None:
    bound = 1 / math.sqrt(weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


class SharedExpert(_Experts):
    """The expert of `MoEMLP(shared_width=...)` through which every token goes.

    Parameters: those of one expert, without the dimension E, and, if it has a gate, `w_gate`
    [1, D], as `nn.Linear(D, 1, bias=False)` has it.
    """

    w_gate: nn.Parameter | None

    def __init__(
        self,
        gated: bool,
        d_model: int,
        width: int,
        activation: Activation,
        gate_layout: str,
        bias: bool,
        impl: str | None,
        where: Mapping[str, Any],
    ) -> None:
        super().__init__((), d_model, width, activation, gate_layout, bias, impl, where)
        gate = nn.Parameter(torch.empty(1, d_model, **where)) if gated else None
        self.register_parameter("w_gate", gate)

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        super().reset_parameters()
        if self.w_gate is not None:
            _draw_like_linear(self.w_gate)

    @_modules.fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """FFN(x), times sigmoid(<x, w_gate>) if it has a gate.

        Args:
            x: [..., D].

        Returns:
            [..., D].
        """
        width = self.w_down.shape[0]
        _check.trailing("x", x, "..., D", width=width)
        _modules.check_dtype(x, self.w_up)
        tokens = x.reshape(-1, width)
        index = tokens.new_zeros(tokens.shape[0], 1, dtype=torch.int64)
        dtype = accumulate_dtype(x.dtype)
        if self.w_gate is None:
            weight = tokens.new_ones(index.shape, dtype=dtype)
        else:
            weight = F.linear(tokens, self.w_gate).to(dtype).sigmoid()
        w_up, w_down, b_up, b_down = self._weights()
        b_up = None if b_up is None else b_up[None]
        b_down = None if b_down is None else b_down[None]
        weights = (w_up[None], w_down[None], b_up, b_down)
        return compute(self, tokens, index, weight, weights).view(x.shape)

    def extra_repr(self) -> str:
        d_model, width = self.w_down.shape
        return f"d_model={d_model}, width={width}, gate={self.w_gate is not None}"


class MoEMLP(_Experts):
    """The experts of a sparse MoE layer, as `moe_mlp` takes them.

    Parameters: `w_up` [E, I, D] (gated: [E, 2I, D]), `w_down` [E, D, I], `b_up` [E, I] (gated:
    [E, 2I]) and `b_down` [E, D]. They start as those of `nn.Linear`, each expert for itself:
    uniform in +-1/sqrt(fan in).

    With `shared_width` a child `shared` has the parameters of one more expert, of that width,
    without the dimension E. Every token goes through it, whatever its routing:

        y = moe_mlp(x, routing) + FFN_shared(x)                               (DeepSeek-V3)
        y = moe_mlp(x, routing) + sigmoid(<x, shared.w_gate>) FFN_shared(x)   (Qwen2-MoE)

    The second is that of `shared_gate`. Several shared experts without gates are one, as wide as
    all of them.

    Args:
        d_model: D.
        d_hidden: I, the width after the activation.
        num_experts: E.
        activation: as in `moe_mlp`.
        gate_layout: as in `moe_mlp`.
        bias: whether the experts have biases (`b_up` and `b_down` are None without), the shared one
            too.
        shared_width: the width of a shared expert after its activation, which is that of the
            others; 0 is none (`shared` is None).
        shared_gate: whether the shared expert has a gate.
        impl: passed to `moe_mlp` at each call.
        device: of the parameters.
        dtype: of the parameters.
    """

    shared: SharedExpert | None

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        *,
        activation: Activation = "relu",
        gate_layout: str = "concat",
        bias: bool = True,
        shared_width: int = 0,
        shared_gate: bool = False,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shared = (shared_width, shared_gate)
        check_experts(d_model, d_hidden, num_experts, activation, gate_layout, bias, *shared, impl)
        where = {"device": device, "dtype": dtype}
        options = (activation, gate_layout, bias, impl, where)
        super().__init__((num_experts,), d_model, d_hidden, *options)
        self.shared = None
        if shared_width:
            self.shared = SharedExpert(shared_gate, d_model, shared_width, *options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        super().reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()

    @_modules.fx_leaf
    def forward(
        self, x: Tensor, routing: Sequence[Tensor], *, plan: RoutePlan | None = None
    ) -> Tensor:
        """Sends every token through its experts, and the shared one.

        Args:
            x: [..., D].
            routing: a `Routing`, or a pair (expert_index, expert_weight) of shape [..., K] each.
            plan: as in `moe_mlp`.

        Returns:
            [..., D].
        """
        weights = self._weights()
        tokens = routed_tokens(x, routing, weights[0])
        y = compute(self, *tokens, weights, plan)
        y = y.view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def load_published(self, state_dict: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Copies the experts from FastMoE's names, alone or under any prefix (`experts.`).

        The names are `htoh4.weight` [E, I, D], `htoh4.bias` [E, I], `h4toh.weight` [E, D, I] and
        `h4toh.bias` [E, D]. A shared expert, which FastMoE has none of, stays as it is.

        Args:
            state_dict: of the checkpoint, or of a whole model.
            prefix: what the names of this layer start with; "" takes them from anywhere.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a missing name, a name under two prefixes (the message says which), another
                shape, no name with this prefix, or weights that this module has no place for.
        """
        _published.load(self, state_dict, PUBLISHED, prefix=prefix, besides=SHARED)

    def extra_repr(self) -> str:
        num_experts, d_model, d_hidden = self.w_down.shape
        return (
            f"d_model={d_model}, d_hidden={d_hidden}, num_experts={num_experts}, "
            f"activation={self.activation!r}, gate_layout={self.gate_layout!r}, "
            f"bias={self.b_up is not None}"
        )
