"""A soft mixture of experts as a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex_kernels import _check, _modules
from molex_kernels._dtypes import FLOAT_DTYPES, accumulate_dtype, without_autocast
from molex_kernels._masks import selected
from molex_kernels.ops.dispatch.module import MoEMLP, check_experts
from molex_kernels.ops.dispatch.types import Activation
from molex_kernels.ops.routing import recipes
from molex_kernels.ops.routing.api import ac_weights
from molex_kernels.ops.routing.choice import route_from_logits
from molex_kernels.ops.routing.types import Routing
from molex_kernels.ops.soft_moe import published

SLOT_INPUTS = ("routed", "plain")


class SoftMoEOutput(NamedTuple):
    """What a layer returns: `routing` goes to the next layer, whose clusters it makes.

    Attributes:
        y: [B, M, D].
        routing: of the T = B M tokens, or None where the layer has no `top_k`.
    """

    y: Tensor
    routing: Routing | None


class SoftMoE(_modules.Module):
    """A soft mixture of experts (Soft MoE, arXiv 2308.00951), as ACMoE's code has it.

    Nothing is dropped and nothing is chosen: each expert e has P slots, each slot is an average
    over the M tokens of its sequence, and each token an average over all E P slots' outputs. With
    s = (e, p) a slot, m a token, and v_m the row of x that is routed:

        v_m = x_m / max(|x_m|, 1e-12);   f_s = scale phi_s / max(|phi_s|, 1e-12)
        z_ms = <v_m, f_s>
        u_s = sum_m softmax over m of z_ms v_m                  slot_inputs="routed" (ACMoE's code)
            = sum_m softmax over m of z_ms x_m                  slot_inputs="plain" (the paper)
        y_m = sum_s softmax over s of z_ms FFN_e(u_s)

    With normalize=False v = x and f = phi.

    Adaptive clusters (ACMoE, arXiv 2502.15315), in a layer that is handed the routing of the one
    before: v_m is multiplied by the weights of its cluster, W = ac_weights(v, cluster, E,
    recipe="softmoe"), where the cluster is the expert of its largest slot there:

        v_m <- W[prev.expert_index_m0] v_m,   or with mix:
        v_m <- (sum_k prev.expert_weight_mk W[prev.expert_index_mk]) v_m

    Differences from the published code: its number of clusters is the largest id in use plus one (a
    host read), E here; its [T, K, D] tensor of the rows that are mixed does not exist here; it asks
    that mixing weights sum to exactly 1. Its variance is stat="variance", eps=1e-4, clip=10,
    norm="global_pre".

    Logits, both softmaxes and the clusters are computed in fp32 (fp64 for fp64), also under
    autocast; the averages in x's dtype (autocast's). The logits are [B, M, E P], of x's size where
    there are about D slots.

    Parameters: `phi` [D, E, P] from N(0, 1 / sqrt(D)), `scale` [1] from 1 (None without
    `normalize`), and the child `experts`, a `MoEMLP`. They are of x's dtype, or fp32 under
    autocast.

    Args:
        d_model: D.
        d_hidden: I, the experts' width.
        num_experts: E.
        slots: P, of each expert.
        activation: as in `moe_mlp`; gelu is the published one.
        bias: whether the experts have biases.
        normalize: tokens and phi to length 1, for the logits.
        slot_inputs: what slots are averages of, "routed" or "plain".
        top_k: K, how many of a token's slots the returned routing has; the published is 8. None
            returns no routing.
        mix: mix the weights of all K' clusters of `prev`.
        stat: as in `ac_weights`.
        eps: as in `ac_weights`.
        clip: as in `ac_weights`.
        norm: as in `ac_weights`.
        empty: as in `ac_weights`.
        impl: passed to the ops at each call.
        device: of the parameters.
        dtype: of the parameters.
    """

    scale: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        slots: int = 1,
        *,
        activation: Activation = "gelu",
        bias: bool = True,
        normalize: bool = True,
        slot_inputs: str = "routed",
        top_k: int | None = None,
        mix: bool = False,
        stat: str | None = None,
        eps: float | None = None,
        clip: float | None = None,
        norm: str | None = None,
        empty: str = "mask",
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_experts(d_model, d_hidden, num_experts, activation, "concat", bias, 0, False, impl)
        _check.integer("slots", slots, 1)
        _check.flags(normalize=normalize, mix=mix)
        _check.choice("slot_inputs", slot_inputs, SLOT_INPUTS)
        if top_k is not None:
            _check.integer("top_k", top_k, 1, num_experts * slots, of=" slots")
        recipes.resolve("softmoe", stat, eps, clip, norm, empty)
        self.slot_inputs = slot_inputs
        self.top_k = top_k
        self.mix = mix
        self.stat, self.eps, self.clip, self.norm, self.empty = stat, eps, clip, norm, empty
        self.impl = impl
        where: Any = {"device": device, "dtype": dtype}
        self.phi = nn.Parameter(torch.empty(d_model, num_experts, slots, **where))
        scale = nn.Parameter(torch.empty(1, **where)) if normalize else None
        self.register_parameter("scale", scale)
        self.experts = MoEMLP(
            d_model, d_hidden, num_experts, activation=activation, bias=bias, impl=impl, **where
        )
        self._draw_router()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        self._draw_router()
        self.experts.reset_parameters()

    def _draw_router(self) -> None:
        nn.init.normal_(self.phi, std=1 / math.sqrt(self.phi.shape[0]))
        if self.scale is not None:
            nn.init.ones_(self.scale)

    @_modules.fx_leaf
    def forward(
        self, x: Tensor, prev: Routing | None = None, *, token_mask: Tensor | None = None
    ) -> SoftMoEOutput:
        """Averages tokens into slots, sends these through their experts, and averages back.

        Args:
            x: [B, M, D], floating, on the device of the parameters.
            prev: the routing of the layer before, (expert_index, expert_weight, ...) of [..., K']
                for the T = B M tokens, best first: weighs the tokens by its clusters. None does
                not. An id outside [0, E) has the weight 1.
            token_mask: [B, M] bool, True for tokens that count; None counts all. Others may hold
                anything: they take part in no slot and in no cluster, and get an output and a
                gradient of 0.

        Returns:
            (y [B, M, D], routing): `expert_index` [T, K] int64, the experts of a token's K largest
            logits, in their order (one expert may stand there for several of its slots),
            `expert_weight` [T, K], the softmax over these, and `logits` [T, E P]; or None. Y is
            differentiable in x and all parameters, with the clusters' weights constant; a second
            time with impl="reference" alone. Deterministic, no host synchronisation.

        Raises:
            TypeError: an argument of a bad type or dtype, which the message names.
            ValueError: an argument of a bad shape or device, which the message names.
            NotImplementedError: an explicit `impl` that cannot run, with every reason.
        """
        phi, scale = self.phi, self.scale
        d_model, _, slots = phi.shape
        _check.floating("x", x, "B, M, D", (None, None, d_model))
        _modules.check_dtype(x, phi)
        if token_mask is not None:
            _check.tensor("token_mask", token_mask, "B, M", x.shape[:2], (torch.bool,), x)
        x = selected(x, token_mask)
        dtype = accumulate_dtype(x.dtype)
        with without_autocast(x):
            v, keys = x.to(dtype), phi.to(dtype).flatten(1)
            if scale is not None:
                v = F.normalize(v, dim=2)
                keys = scale.to(dtype) * F.normalize(keys, dim=0)
            if prev is not None:
                v = v * self._cluster_weights(v, prev, token_mask)
            logits = torch.matmul(v, keys)
            counted = logits
            if token_mask is not None:
                lowest = torch.finfo(dtype).min
                counted = torch.where(token_mask[..., None], logits, lowest)
            dispatch = torch.softmax(counted, 1).to(x.dtype)
            combine = torch.softmax(logits, 2)
        source = v.to(x.dtype) if self.slot_inputs == "routed" else x
        inputs = torch.matmul(dispatch.mT, source)  # [B, E P, D]
        outputs = self.experts(inputs, self._slots_of_experts(inputs))
        y = selected(torch.matmul(combine.to(outputs.dtype), outputs), token_mask)
        return SoftMoEOutput(y, self._routing(logits.flatten(0, 1), slots))

    def _slots_of_experts(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The expert of each slot, and its weight of 1, as `MoEMLP` takes them."""
        _, num_experts, slots = self.phi.shape
        expert = torch.arange(num_experts, device=inputs.device).repeat_interleave(slots)
        index = expert.expand(inputs.shape[:2])[..., None]
        return index, inputs.new_ones(index.shape, dtype=accumulate_dtype(inputs.dtype))

    def _routing(self, logits: Tensor, slots: int) -> Routing | None:
        if self.top_k is None:
            return None
        routing = route_from_logits(logits, top_k=self.top_k, impl=self.impl)
        return routing._replace(expert_index=routing.expert_index // slots)

    @torch.no_grad()
    def _cluster_weights(self, v: Tensor, prev: Routing, token_mask: Tensor | None) -> Tensor:
        """What multiplies each token, [B, M, D]."""
        num_experts = self.phi.shape[1]
        index, mixture = _modules.routing_pair("prev", prev)
        tokens = v.flatten(0, 1)
        index = index.reshape(-1, index.shape[-1])
        mixture = mixture.reshape(-1, mixture.shape[-1])
        _check.index("prev.expert_index", index, "T, K'", (tokens.shape[0], None), v)
        _check.tensor("prev.expert_weight", mixture, "T, K'", index.shape, FLOAT_DTYPES, v)
        if token_mask is not None:
            index = torch.where(token_mask.reshape(-1, 1), index, -1)
        table = ac_weights(
            tokens,
            index[:, 0].contiguous(),
            num_experts,
            recipe="softmoe",
            stat=self.stat,
            eps=self.eps,
            clip=self.clip,
            norm=self.norm,
            empty=self.empty,
            impl=self.impl,
        )
        # One row more, of ones, is that of every other id.
        table = torch.cat([table, torch.ones_like(table[:1])])
        index = torch.where((index >= 0) & (index < num_experts), index, num_experts)
        if not self.mix:
            return F.embedding(index[:, 0], table).view_as(v)
        weight = mixture.to(table.dtype)
        rows = F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)
        return rows.view_as(v)

    def load_published(self, state_dict: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Copies the layer from the names of ACMoE's Soft MoE, alone or under any prefix.

        They are `phi` [D, E, P], `scale` [1] and, for each expert e, `experts.e.fc1.weight` [I, D],
        `experts.e.fc1.bias` [I], `experts.e.fc2.weight` [D, I] and `experts.e.fc2.bias` [D].

        Args:
            state_dict: of the checkpoint, or of a whole model.
            prefix: what the names of this layer start with; "" takes them from anywhere.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a missing name, a name under two prefixes (the message says which), another
                shape, no name with this prefix, or weights that this module has no place for.
        """
        published.load(self, self.phi.shape[1], state_dict, prefix)

    def extra_repr(self) -> str:
        d_model, num_experts, slots = self.phi.shape
        return (
            f"d_model={d_model}, num_experts={num_experts}, slots={slots}, "
            f"normalize={self.scale is not None}, slot_inputs={self.slot_inputs!r}, "
            f"top_k={self.top_k}, mix={self.mix}"
        )
