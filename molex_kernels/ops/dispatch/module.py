"""The experts' MLP as a module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from molex_kernels import _backends, _check, _modules, _published
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


def check_experts(
    d_model: int,
    d_hidden: int,
    num_experts: int,
    activation: Activation,
    gate_layout: str,
    bias: bool,
    impl: str | None,
) -> None:
    """The options of experts, before anything is allocated."""
    _check.integer("d_model", d_model, 1)
    _check.integer("d_hidden", d_hidden, 1)
    _check.integer("num_experts", num_experts, 1)
    activation_of(activation)
    _check.choice("gate_layout", gate_layout, GATE_LAYOUTS)
    _check.flags(bias=bias)
    _backends.check_impl(impl)


class MoEMLP(_modules.Module):
    """The experts of a sparse MoE layer, as `moe_mlp` takes them.

    Parameters: `w_up` [E, I, D] (gated: [E, 2I, D]), `w_down` [E, D, I], `b_up` [E, I] (gated:
    [E, 2I]) and `b_down` [E, D]. They start as those of `nn.Linear`, each expert for itself:
    uniform in +-1/sqrt(fan in).

    Args:
        d_model: D.
        d_hidden: I, the width after the activation.
        num_experts: E.
        activation: as in `moe_mlp`.
        gate_layout: as in `moe_mlp`.
        bias: whether the experts have biases (`b_up` and `b_down` are None without).
        impl: passed to `moe_mlp` at each call.
        device: of the parameters.
        dtype: of the parameters.
    """

    b_up: nn.Parameter | None
    b_down: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        *,
        activation: Activation = "relu",
        gate_layout: str = "concat",
        bias: bool = True,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_experts(d_model, d_hidden, num_experts, activation, gate_layout, bias, impl)
        self.activation = activation
        self.gate_layout = gate_layout
        self.impl = impl
        rows = 2 * d_hidden if activation_of(activation)[1] else d_hidden

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *sizes, device=device, dtype=dtype))

        self.w_up = parameter(rows, d_model)
        self.w_down = parameter(d_model, d_hidden)
        self.register_parameter("b_up", parameter(rows) if bias else None)
        self.register_parameter("b_down", parameter(d_model) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for weight, bias in ((self.w_up, self.b_up), (self.w_down, self.b_down)):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    @_modules.fx_leaf
    def forward(
        self, x: Tensor, routing: Sequence[Tensor], *, plan: RoutePlan | None = None
    ) -> Tensor:
        """Sends every token through its experts.

        Args:
            x: [..., D].
            routing: a `Routing`, or a pair (expert_index, expert_weight) of shape [..., K] each.
            plan: as in `moe_mlp`.

        Returns:
            [..., D].
        """
        expert_index, expert_weight = _modules.routing_pair("routing", routing)
        w_up = self.w_up
        width = w_up.shape[2]
        _check.trailing("x", x, "..., D", width=width)
        _modules.check_dtype(x, w_up)
        y = moe_mlp(
            x.reshape(-1, width),
            expert_index.reshape(-1, expert_index.shape[-1]),
            expert_weight.reshape(-1, expert_weight.shape[-1]),
            w_up,
            self.w_down,
            b_up=self.b_up,
            b_down=self.b_down,
            activation=self.activation,
            gate_layout=self.gate_layout,
            plan=plan,
            impl=self.impl,
        )
        return y.view(x.shape)

    def load_published(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies the experts from FastMoE's names, alone or under any prefix (`experts.`).

        The names are `htoh4.weight` [E, I, D], `htoh4.bias` [E, I], `h4toh.weight` [E, D, I] and
        `h4toh.bias` [E, D].

        Args:
            state_dict: of the checkpoint.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a missing name, a name under two prefixes, or another shape.
        """
        _published.load(self, state_dict, PUBLISHED)

    def extra_repr(self) -> str:
        num_experts, d_model, d_hidden = self.w_down.shape
        return (
            f"d_model={d_model}, d_hidden={d_hidden}, num_experts={num_experts}, "
            f"activation={self.activation!r}, gate_layout={self.gate_layout!r}, "
            f"bias={self.b_up is not None}"
        )
