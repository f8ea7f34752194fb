"""The routers as modules: a gate's parameters, and a call of the function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.utils import parametrize

from molex_kernels import _backends, _check, _modules, _published
from molex_kernels._dtypes import HALF_DTYPES, accumulate_dtype, without_autocast
from molex_kernels.ops.routing import choice, recipes
from molex_kernels.ops.routing.api import ac_route, normalized_gate, topk_route
from molex_kernels.ops.routing.balance import update_expert_bias
from molex_kernels.ops.routing.types import Routing

ROW_NORM = 1.5  # of the published cosine gate's rows
INITIAL_TEMPERATURE, MAX_TEMPERATURE = math.log(2.0), math.log(100.0)
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

    def _published_names(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """The published name of each parameter, and names beside them of which it has none."""
        names = {"weight": "gate.weight", "bias": "gate.bias"}
        return names, ("expert_embeddings", "inp_reduction.weight")

    def load_published(self, state_dict: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Copies the gate from the published names, alone or under any prefix.

        They are FastMoE's `gate.weight` [E, D] and `gate.bias` [E]; of a cosine gate,
        `expert_embeddings` [E, D] and, where it has a reduction, `inp_reduction.weight` [r, D], or
        with a temperature `sim_matrix` [E, r], `cosine_projector.weight` [r, D] and `.bias` [r],
        and `temperature` [1]. A published cosine gate may have the linear one beside it, which
        nothing reads.

        Args:
            state_dict: of the checkpoint, or of a whole model.
            prefix: what the names of this layer start with; "" takes them from anywhere.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a missing name, a name under two prefixes (the message says which), another
                shape, no name with this prefix, or weights that this module has no place for.
        """
        names, foreign = self._published_names()
        _published.load(self, state_dict, names, prefix=prefix, foreign=foreign)

    def extra_repr(self) -> str:
        num_experts, d_model = self.weight.shape
        has_bias = self.bias is not None
        return f"d_model={d_model}, num_experts={num_experts}, top_k={self.top_k}, bias={has_bias}"


def router_names(router: nn.Module) -> tuple[dict[str, str], tuple[str, ...]]:
    """The published names of a router's parameters, and those beside them that it cannot take."""
    return router._published_names() if isinstance(router, _Gate) else ({}, ())


def _rows(name: str, x: Tensor, weight: Tensor) -> Tensor:
    """[..., D] as [T, D], checked against the gate's weight [E, D]."""
    width = weight.shape[1]
    _check.trailing(name, x, "..., D", width=width)
    return x.reshape(-1, width)


@torch.no_grad()
def _draw_orthogonal(router: _Gate) -> None:
    # A decomposition, which 16 bits have not.
    rows = torch.empty_like(router.weight, dtype=accumulate_dtype(router.weight.dtype))
    router.weight.copy_(nn.init.orthogonal_(rows))
    _rescale_rows(router)


@torch.no_grad()
def _rescale_rows(router: _Gate) -> None:
    """Gives the gate's rows the norm that the published cosine gates keep them at."""
    scaled = router.weight * (ROW_NORM / router.weight.norm(dim=1, keepdim=True))
    if parametrize.is_parametrized(router, "weight"):
        router.weight = scaled  # and so what it is computed from
    else:
        router.weight.copy_(scaled)


def _reduced(tokens: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """In fp32, whatever autocast says: of rounded logits other experts would be chosen."""
    dtype = accumulate_dtype(tokens.dtype)
    if matrix.dtype == dtype:
        _check.device("x", tokens, matrix)
    else:
        _modules.check_dtype(tokens, matrix)
    with without_autocast(tokens):
        bias = None if bias is None else bias.to(dtype)
        return F.linear(tokens.to(dtype), matrix.to(dtype), bias)


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
            _draw_orthogonal(self)

    def renormalize_(self) -> None:
        """Rescales the gate's rows in place to norm 1.5; for `cosine` alone."""
        if not self.cosine:
            raise ValueError("renormalize_: expected a router with cosine=True, got cosine=False")
        _rescale_rows(self)

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

    def _published_names(self) -> tuple[dict[str, str], tuple[str, ...]]:
        # The published gate has a linear and a cosine one, and reads one of them.
        names = {"weight": "expert_embeddings"} if self.cosine else super()._published_names()[0]
        return names, ("inp_reduction.weight",)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, cosine={self.cosine}, mix={self.mix}, recipe={self.recipe!r}"
        )


class CosineRouter(_Gate):
    """The gates of XMoE (arXiv 2204.09179) and StableMoE (2204.08396), and `topk_route`.

    As MomentumSMoE's and ACMoE's language models have them as baselines, with R the reduction and
    e_j the rows:

        z_j = <R x, e_j> / max(|e_j|, 1e-4);   weights = softmax of the K largest z

    XMoE has a reduction to 8 dimensions, StableMoE none. Both papers divide by |R x| as well and
    learn a temperature, which that code does not. The gate of ACMoE's Swin (Tutel's) does both:

        z_j = exp(min(theta, log 100)) <v, e_j> / (max(|v|, 1e-12) max(|e_j|, 1e-4)),   v = R x + r

    with `normalize`, `temperature`, `reduction_bias` and, for a softmax over all E logits,
    score="softmax". Its noise in training is left out. All of it is computed in fp32 (fp64 for
    fp64), also under autocast, as in `topk_route`; parameters are of x's dtype or fp32.

    Parameters: `weight` [E, r] (e) and `reduction` [r, D] (R), or `weight` [E, D] alone; where
    asked for `reduction_bias` [r] and `temperature` [1] (theta, from log 2). The rows start
    orthogonal with norm 1.5. As in `ACRouter` the published code rescales them to that norm at each
    forward pass (StableMoE's does not), which changes only the gradient's scale.

    Args:
        d_model: D.
        num_experts: E.
        top_k: K.
        reduced: r; None is no reduction (StableMoE).
        reduction_bias: whether the reduction has a bias.
        normalize: divide by the length of the reduced token.
        temperature: whether there is one to be learned.
        score: as in `topk_route`.
        impl: passed to `topk_route` at each call.
        device: of the parameters.
        dtype: of the parameters.
    """

    reduction: nn.Parameter | None
    reduction_bias: nn.Parameter | None
    temperature: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        reduced: int | None = 8,
        reduction_bias: bool = False,
        normalize: bool = False,
        temperature: bool = False,
        score: str = "softmax_topk",
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.integer("d_model", d_model, 1)
        if reduced is not None:
            _check.integer("reduced", reduced, 1)
        _check.flags(reduction_bias=reduction_bias, normalize=normalize, temperature=temperature)
        if reduced is None and reduction_bias:
            raise ValueError("reduction_bias: expected False with reduced=None, got True")
        choice.resolve_weighing(score, False, 1.0)
        width = d_model if reduced is None else reduced
        super().__init__(width, num_experts, top_k, False, impl, device, dtype)
        self.normalize, self.score = normalize, score
        sizes = {
            "reduction": (width, d_model) if reduced is not None else None,
            "reduction_bias": (width,) if reduction_bias else None,
            "temperature": (1,) if temperature else None,
        }
        for name, size in sizes.items():
            value = None if size is None else torch.empty(size, device=device, dtype=dtype)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the rows orthogonal, with norm 1.5, and the reduction as `nn.Linear` does."""
        _draw_orthogonal(self)
        if self.reduction is not None:
            bound = 1 / math.sqrt(self.reduction.shape[1])
            nn.init.uniform_(self.reduction, -bound, bound)
            if self.reduction_bias is not None:
                nn.init.uniform_(self.reduction_bias, -bound, bound)
        if self.temperature is not None:
            nn.init.constant_(self.temperature, INITIAL_TEMPERATURE)

    def renormalize_(self) -> None:
        """Rescales the rows in place to norm 1.5."""
        _rescale_rows(self)

    @_modules.fx_leaf
    def forward(self, x: Tensor) -> Routing:
        """Routes each token, by itself.

        Args:
            x: [..., D], flattened to T tokens.

        Returns:
            The routing of T tokens.

        Raises:
            TypeError: as `topk_route`.
            ValueError: as `topk_route`.
        """
        tokens = _rows("x", x, self.weight if self.reduction is None else self.reduction)
        if self.reduction is not None:
            tokens = _reduced(tokens, self.reduction, self.reduction_bias)
        if self.normalize:
            tokens = F.normalize(tokens.to(accumulate_dtype(tokens.dtype)), dim=1)
        gate = normalized_gate(self.weight)
        if self.temperature is not None:
            gate = gate * self.temperature.to(gate.dtype).clamp(max=MAX_TEMPERATURE).exp()
        return topk_route(tokens, gate, top_k=self.top_k, score=self.score, impl=self.impl)

    def _published_names(self) -> tuple[dict[str, str], tuple[str, ...]]:
        if self.temperature is None:
            names = {"weight": "expert_embeddings", "reduction": "inp_reduction.weight"}
            return names, ()
        names = {"weight": "sim_matrix", "temperature": "temperature"}
        projector = {"reduction": "weight", "reduction_bias": "bias"}
        return names | {own: f"cosine_projector.{name}" for own, name in projector.items()}, ()

    def extra_repr(self) -> str:
        num_experts, width = self.weight.shape
        reduced = None if self.reduction is None else width
        d_model = width if self.reduction is None else self.reduction.shape[1]
        return (
            f"d_model={d_model}, num_experts={num_experts}, top_k={self.top_k}, "
            f"reduced={reduced}, normalize={self.normalize}, "
            f"temperature={self.temperature is not None}, score={self.score!r}"
        )
