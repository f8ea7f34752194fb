"""The routers as modules: a gate's parameters, and a call of the function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.utils import parametrize

from molex_kernels import _backends, _check, _modules, _published
from molex_kernels._dtypes import HALF_DTYPES
from molex_kernels.ops.routing import choice, recipes
from molex_kernels.ops.routing.api import ac_route, normalized_gate, topk_route
from molex_kernels.ops.routing.balance import update_expert_bias
from molex_kernels.ops.routing.types import Routing

ROW_NORM = 1.5  # of the published cosine gate's rows
# Options of the choice, which a router names where it has others.
_USUAL = {
    "score": "softmax_topk",
    "num_groups": None,
    "top_groups": None,
    "renormalize": False,
    "scaling": 1.0,
}


class _Gate(_modules.Module):
    """The gate: `weight` [E, D] and, unless without, `bias` [E]."""

    bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        bias: bool,
        impl: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _check.integer("d_model", d_model, 1)
        _check.integer("num_experts", num_experts, 1)
        _check.integer("top_k", top_k, 1, num_experts, of=" experts")
        _check.flags(bias=bias)
        _backends.check_impl(impl)
        self.top_k = top_k
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))
        vector = torch.empty(num_experts, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if vector is None else nn.Parameter(vector))

    def reset_parameters(self) -> None:
        """Draws the gate as `nn.Linear` does: uniform in +-1/sqrt(D)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _published_names(self) -> dict[str, str]:
        names = {"weight": "gate.weight"}
        return names if self.bias is None else {**names, "bias": "gate.bias"}

    def load_published(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies the gate from the published names, alone or under any prefix.

        They are FastMoE's `gate.weight` [E, D] and `gate.bias` [E]; of a cosine gate,
        `expert_embeddings` [E, D].

        Args:
            state_dict: of the checkpoint.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a missing name, a name under two prefixes, or another shape.
        """
        _published.load(self, state_dict, self._published_names())

    def extra_repr(self) -> str:
        num_experts, d_model = self.weight.shape
        has_bias = self.bias is not None
        return f"d_model={d_model}, num_experts={num_experts}, top_k={self.top_k}, bias={has_bias}"


def _rows(name: str, x: Tensor, weight: Tensor) -> Tensor:
    """[..., D] as [T, D], checked against the gate's weight [E, D]."""
    width = weight.shape[1]
    _check.trailing(name, x, "..., D", width=width)
    return x.reshape(-1, width)


def _check_token_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is not None:
        _check.tensor("token_mask", mask, "...", x.shape[:-1], (torch.bool,), x)


class TopKRouter(_Gate):
    """A linear gate and `topk_route`.

    With `expert_bias` the module balances its experts without a loss, as DeepSeek-V3 does. It has a
    buffer `expert_bias` [E], 0 at first, which stays in fp32 where the module is moved to 16 bits,
    and a buffer `expert_counts` [E] int64, not part of the state dict. In training each forward
    pass adds its assignments to the counts; `update_expert_bias`, called after each optimiser step,
    moves the bias by them and sets them to 0. A forward pass that is run again for the backward
    pass (activation checkpointing) counts twice, as all do then, which changes no sign.

    Args:
        d_model: D.
        num_experts: E.
        top_k: K.
        bias: whether the gate has a bias (FastMoE's has; default without, as in Mixtral).
        score: as in `topk_route`.
        num_groups: as in `topk_route`.
        top_groups: as in `topk_route`.
        renormalize: as in `topk_route`.
        scaling: as in `topk_route`.
        expert_bias: whether the module has a bias for the choice, and counts for it.
        impl: passed to `topk_route` at each call.
        device: of the parameters.
        dtype: of the parameters.
    """

    expert_bias: Tensor | None
    expert_counts: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        score: str = "softmax_topk",
        num_groups: int | None = None,
        top_groups: int | None = None,
        renormalize: bool = False,
        scaling: float = 1.0,
        expert_bias: bool = False,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.integer("num_experts", num_experts, 1)
        _check.integer("top_k", top_k, 1, num_experts, of=" experts")
        choice.resolve(num_experts, top_k, score, num_groups, top_groups, renormalize, scaling)
        _check.flags(expert_bias=expert_bias)
        super().__init__(d_model, num_experts, top_k, bias, impl, device, dtype)
        self.score = score
        self.num_groups, self.top_groups = num_groups, top_groups
        self.renormalize, self.scaling = renormalize, scaling
        kinds = {"expert_bias": torch.float32, "expert_counts": torch.int64}
        for name, kind in kinds.items():
            buffer = torch.empty(num_experts, device=device, dtype=kind) if expert_bias else None
            self.register_buffer(name, buffer, persistent=name == "expert_bias")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the gate as `nn.Linear` does: uniform in +-1/sqrt(D); bias and counts are 0."""
        super().reset_parameters()
        for buffer in (self.expert_bias, self.expert_counts):
            if buffer is not None:
                buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and after.dtype in HALF_DTYPES:
            self.expert_bias = before.to(after.device)
        return self

    def update_expert_bias(self, *, rate: float, process_group: ProcessGroup | None = None) -> None:
        """Moves the bias by the assignments since the last call: `update_expert_bias` of the ops.

        Args:
            rate: as there; DeepSeek-V3's is 0.001.
            process_group: as there.

        Raises:
            TypeError: a bad type, which the message names.
            ValueError: a rate below 0; a router without `expert_bias`.
        """
        if self.expert_bias is None or self.expert_counts is None:
            raise ValueError(
                "update_expert_bias: expected a router with expert_bias=True, got one without"
            )
        counts = self.expert_counts
        update_expert_bias(self.expert_bias, counts, rate=rate, process_group=process_group)
        counts.zero_()

    @_modules.fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        expert_bias: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Routing:
        """Routes each token, by itself: padding is masked in the losses, and in the counts here.

        Args:
            x: [..., D], flattened to T tokens.
            expert_bias: as in `topk_route`; None is the module's own, if it has one.
            token_mask: [...] bool, True for tokens that count in `expert_counts`; None counts all.

        Returns:
            The routing of T tokens.

        Raises:
            TypeError: a token_mask that is no bool tensor; else as `topk_route`.
            ValueError: a token_mask of another shape or device; else as `topk_route`.
        """
        tokens = _rows("x", x, self.weight)
        _check_token_mask(token_mask, x)
        bias = self.expert_bias if expert_bias is None else expert_bias
        routing = self._route(tokens, bias)
        if self.expert_counts is not None and self.training:
            index = routing.expert_index
            counted = torch.ones_like(index)
            if token_mask is not None:
                counted = counted * token_mask.reshape(-1, 1)
            self.expert_counts.scatter_add_(0, index.flatten(), counted.flatten())
        return routing

    def _route(self, tokens: Tensor, expert_bias: Tensor | None) -> Routing:
        return topk_route(
            tokens,
            self.weight,
            top_k=self.top_k,
            gate_bias=self.bias,
            score=self.score,
            expert_bias=expert_bias,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            renormalize=self.renormalize,
            scaling=self.scaling,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for name, usual in _USUAL.items():
            value = getattr(self, name)
            if value != usual:
                parts.append(f"{name}={value!r}")
        if self.expert_bias is not None:
            parts.append("expert_bias=True")
        return ", ".join(parts)


class ACRouter(_Gate):
    """The adaptive-clustering router (ACMoE, arXiv 2502.15315): a gate and `ac_route`.

    The clusters are the previous MoE layer's experts, so that layer must have as many experts. A
    layer without a previous routing routes plainly.

    Args:
        d_model: D.
        num_experts: E.
        top_k: K.
        bias: whether the gate has a bias; not with `cosine`.
        cosine: normalise the gate's rows, as the published code does by default. Its rows start
            orthogonal with norm 1.5. The published code rescales them to that norm in place at each
            forward pass; since the forward pass divides by the norm anyway, that changes only the
            gradient's scale. `renormalize_`, called after each optimiser step, reproduces it.
        mix: as in `ac_route`.
        recipe: as in `ac_route`.
        stat: as in `ac_route`.
        eps: as in `ac_route`.
        clip: as in `ac_route`.
        norm: as in `ac_route`.
        empty: as in `ac_route`.
        process_group: as in `ac_route`.
        impl: passed to `ac_route` at each call.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        cosine: bool = False,
        mix: bool = False,
        recipe: str = "lm",
        stat: str | None = None,
        eps: float | None = None,
        clip: float | None = None,
        norm: str | None = None,
        empty: str = "mask",
        process_group: ProcessGroup | None = None,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.flags(bias=bias, cosine=cosine, mix=mix)
        if cosine and bias:
            raise ValueError("bias: expected False with cosine=True, got True")
        recipes.resolve(recipe, stat, eps, clip, norm, empty)
        super().__init__(d_model, num_experts, top_k, bias, impl, device, dtype)
        self.cosine = cosine
        self.mix = mix
        self.recipe = recipe
        self.stat, self.eps, self.clip, self.norm, self.empty = stat, eps, clip, norm, empty
        self.process_group = process_group
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the gate anew."""
        super().reset_parameters()
        if self.cosine:
            nn.init.orthogonal_(self.weight, gain=0.32)
            self.renormalize_()

    @torch.no_grad()
    def renormalize_(self) -> None:
        """Rescales the gate's rows in place to norm 1.5; for `cosine` alone."""
        if not self.cosine:
            raise ValueError("renormalize_: expected a router with cosine=True, got cosine=False")
        scaled = self.weight * (ROW_NORM / self.weight.norm(dim=1, keepdim=True))
        if parametrize.is_parametrized(self, "weight"):
            self.weight = scaled  # and so what it is computed from
        else:
            self.weight.copy_(scaled)

    @_modules.fx_leaf
    def forward(
        self,
        x: Tensor,
        prev: Routing | None = None,
        *,
        stats_from: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Routing:
        """Routes each token, by the clusters that the previous MoE layer's routing makes.

        Args:
            x: [..., D], flattened to T tokens.
            prev: the previous MoE layer's routing; None routes plainly.
            stats_from: [..., D], tokens for the statistics in place of x.
            token_mask: [...] bool, True for tokens that count: others take no part in the clusters'
                statistics, and are routed with weights of 1. None counts all. The losses have a
                mask of their own.

        Returns:
            The routing of T tokens.

        Raises:
            TypeError: a token_mask that is no bool tensor; else as `ac_route`.
            ValueError: a token_mask of another shape or device; else as `ac_route`.
        """
        weight = self.weight
        tokens = _rows("x", x, weight)
        _check_token_mask(token_mask, x)
        if prev is None:
            return self._plain(tokens, weight)
        index, mixture = _modules.routing_pair("prev", prev)
        if token_mask is not None:
            index = torch.where(token_mask.reshape(-1, 1), index, -1)
        return ac_route(
            tokens,
            weight,
            index,
            mixture,
            top_k=self.top_k,
            gate_bias=self.bias,
            cosine=self.cosine,
            mix=self.mix,
            stats_from=None if stats_from is None else _rows("stats_from", stats_from, weight),
            recipe=self.recipe,
            stat=self.stat,
            eps=self.eps,
            clip=self.clip,
            norm=self.norm,
            empty=self.empty,
            process_group=self.process_group,
            impl=self.impl,
        )

    def _plain(self, tokens: Tensor, weight: Tensor) -> Routing:
        gate = normalized_gate(weight) if self.cosine else weight
        return topk_route(tokens, gate, top_k=self.top_k, gate_bias=self.bias, impl=self.impl)

    def _published_names(self) -> dict[str, str]:
        return {"weight": "expert_embeddings"} if self.cosine else super()._published_names()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, cosine={self.cosine}, mix={self.mix}, recipe={self.recipe!r}"
        )
