"""Experts merged into one for every segment (CAMEx) in transformers' mixture-of-experts models."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex_kernels import _backends, _check
from molex_kernels._dtypes import accumulate_dtype
from molex_kernels.integrations import _routers
from molex_kernels.integrations._handover import Part, Stack, mix_in
from molex_kernels.integrations._layers import check_open
from molex_kernels.integrations._stacked import says, weights
from molex_kernels.ops.merging.api import MASKS, camex_linear
from molex_kernels.ops.merging.gates import FIRST, chosen_gates, mean_of_tokens, segment_gates
from molex_kernels.ops.merging.types import PARTS, SCALES, KroneckerCurvature

_KIND = "install_merged_experts"
_BASES = ("mean", "first")


class _Merging(NamedTuple):
    """The options of a layer, as `install_merged_experts` has them."""

    base: str
    mask: str | None
    alpha: float
    top_k: int
    segment: int | None
    first: str
    expert_dropout: float
    impl: str | None


class _Curvature(nn.Module):
    """The factors of both projections, of one rank."""

    def __init__(self, w_up: Tensor, w_down: Tensor, rank: int, scale: str) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        for part, weight in zip(PARTS, (w_up, w_down), strict=True):
            placed: Any = {"device": weight.device, "dtype": weight.dtype}
            num_experts, rows, columns = weight.shape
            factors = KroneckerCurvature.identity(num_experts, rows, columns, rank, scale, **placed)
            for name, factor in factors._asdict().items():
                self.register_parameter(f"{part}_{name}", nn.Parameter(factor))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity again."""
        for name, factor in self.named_parameters():
            factor.copy_(torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device))
            if self.scale == "unit" and name.endswith("out1"):
                factor.div_(self.rank)

    def forward(self) -> tuple[KroneckerCurvature, KroneckerCurvature]:
        """By call, so that whoever shards, offloads or trains the module sees it used."""
        up, down = (
            KroneckerCurvature(*(getattr(self, f"{part}_{n}") for n in KroneckerCurvature._fields))
            for part in PARTS
        )
        return up, down


class _Experts(Part):
    """Experts that are merged into one for every segment, where that is asked for."""

    molex_merging: _Merging | None

    def leave(self) -> None:
        """Takes out of the module what was added to it."""
        super().leave()
        self.__dict__.pop("molex_merging", None)
        self._modules.pop("molex_curvature", None)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        given, merging = self.molex_place.given, self.molex_merging
        if given is None or merging is None:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        batch, length = given.tokens
        logits = given.made.pop(_routers.LOGITS).to(hidden_states.device)
        if hidden_states.shape[0] != batch * length or logits.shape[0] != batch * length:
            raise ValueError(
                f"hidden_states: expected the {batch * length} tokens of the layer, got "
                f"{hidden_states.shape[0]} and logits of {logits.shape[0]}"
            )
        segment = length if merging.segment is None else min(merging.segment, length)
        lacking = -length % max(segment, 1)
        counted = given.mask
        if counted is None and lacking:
            counted = hidden_states.new_ones((batch, length), dtype=torch.bool)
        if counted is not None:
            counted = F.pad(counted.to(hidden_states.device), (0, lacking)).view(-1, segment)
        sizes = (batch, length, lacking, segment)
        gates = _gates(_segments(logits, *sizes), counted, batch, merging)
        y = self._merged(_segments(hidden_states, *sizes), gates, merging)
        y = y.view(batch, length + lacking, y.shape[2])[:, :length]
        return y.reshape(hidden_states.shape).to(hidden_states.dtype)

    def _merged(self, x: Tensor, gates: Tensor, merging: _Merging) -> Tensor:
        experts: Any = self
        w_up, w_down, b_up, b_down = weights(self, functools.partial(getattr, self))
        curvature = "molex_curvature" in self._modules
        up, down = experts.molex_curvature() if curvature else (None, None)
        p = merging.expert_dropout if self.training else 0.0
        hidden = _linear(x, w_up, b_up, up, gates, merging, p)
        act = experts._apply_gate if says(self, "has_gate") else experts.act_fn
        return _linear(act(hidden), w_down, b_down, down, gates, merging, p)


def _segments(x: Tensor, batch: int, length: int, lacking: int, segment: int) -> Tensor:
    """[B N, D] -> [B S, T, D], the last segment of each sequence filled up with zeros."""
    return F.pad(x.view(batch, length, -1), (0, 0, 0, lacking)).view(-1, segment, x.shape[1])


def _gates(logits: Tensor, counted: Tensor | None, batch: int, merging: _Merging) -> Tensor:
    """[B S, T, E] -> [B S, E]: what the gate, being linear, says to the mean of the tokens."""
    mean = mean_of_tokens(logits.to(accumulate_dtype(logits.dtype)), counted)
    largest, index = mean.topk(merging.top_k, dim=1)
    any_counts = None if counted is None else counted.any(1)
    gates = chosen_gates(mean, largest, index, any_counts)
    if merging.segment is None:
        return gates
    by_sequence = gates.view(batch, -1, gates.shape[1])
    return segment_gates(by_sequence, first=merging.first).flatten(0, 1)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    curvature: KroneckerCurvature | None,
    gates: Tensor,
    merging: _Merging,
    p: float,
) -> Tensor:
    base, base_bias = (
        None if w is None else w.mean(0) if merging.base == "mean" else w[0] for w in (weight, bias)
    )
    assert base is not None
    return camex_linear(
        x,
        base,
        weight,
        gates,
        curvature=curvature,
        mask=merging.mask,
        alpha=merging.alpha,
        bias=bias,
        base_bias=base_bias,
        expert_dropout=p,
        impl=merging.impl,
    )


def install_merged_experts(
    model: nn.Module,
    *,
    layers: Iterable[int] | None = None,
    base: str = "mean",
    rank: int = 1,
    scale: str = "unit",
    mask: str | None = None,
    alpha: float = 1.0,
    top_k: int | None = None,
    segment: int | None = 256,
    first: str = "uniform",
    expert_dropout: float = 0.0,
    enabled: bool = True,
    impl: str | None = None,
) -> list[int]:
    """Merges the experts of a mixture-of-experts model into one, anew for every segment of tokens.

    CAMEx (arXiv 2502.18821) on the model's own experts and gates. For segment s with tokens x_t,
    logits z_t of the model's gate, and each of the two stacked projections W_e (gate and up
    together are one):

        g_s = softmax over the K largest of mean_t z_t, which is the gate on the mean of the tokens
        W_s = base + alpha sum_e g_s'e mask_e * M_e (W_e - base),  s' = s - 1, for s = 0 see `first`
        y_t = W_s,down act(W_s,up x_t)

    Biases likewise, without a curvature. So each token costs one expert and not `top_k`, and each
    segment a merge of all E. A token's own choice of experts and its weights are used by the
    model's balancing loss alone (`output_router_logits=True`); gates sum to 1, also where the
    model's weights do not (OLMoE, Qwen2-MoE), whose outputs become larger so.

    The published base is a weight of its own, started as a copy of expert 0, where all experts are
    copies of one pretrained layer. Here experts are what the model has learned, so that the default
    base is their mean, which prefers none and needs no new weight; "first" takes expert 0 itself,
    the start of the published code. Without mask, curvature and with alpha=1 both are
    W_s = sum_e g_s'e W_e. Shared experts run beside, as they did.

    With the defaults no token sees a later one, and the gate of a sequence's last segment has no
    effect: where sequences are no longer than a segment, the model's gate gets a gradient from its
    balancing loss alone. A cache is refused all the same
    (`generate(..., use_cache=False)` runs), for a call with one has not the segment before. Tokens
    that an `attention_mask` [B, N] leaves out take no part in the means; segments count from the
    first column, and the last may be shorter. With AC routers (`install_ac_router`) the logits are
    theirs.

    What is new are the factors of the curvature, in `molex_curvature` of the experts and so in the
    model's parameters and state dict. `from_pretrained` drops them, whose class knows of none: keep
    those of `model.state_dict()` with this name beside what `save_pretrained` writes, and give them
    to `load_state_dict(..., strict=False)` after this call with the same options. All else stays as
    it is, adapters of PEFT on the expert weights included; PEFT freezes what it finds, so that
    factors train where it comes before, or as `modules_to_save=["molex_curvature"]`.

    Training, `gradient_checkpointing_enable()` of both kinds, `torch.compile`, deepcopy and
    pickling work as without it; `ExpertParallel` refuses such experts. Installed again, it replaces
    the options and keeps a curvature of the same rank. `uninstall` takes it out. The experts run by
    the fastest implementation of `camex_linear`, whatever `set_experts_implementation` says.

    Args:
        model: a transformers model whose decoder has one list of layers, some of them with stacked
            experts and a gate that takes the largest of a softmax over x W^T + b: Mixtral, OLMoE,
            Qwen2-, Qwen3-MoE, gpt-oss, Granite-MoE, MiniMax and the like.
        layers: which layers; None is all with experts.
        base: "mean" of the experts or the "first" of them.
        rank: r of the curvature; 0 is none, the Euclidean merging.
        scale: of the curvature at the start: "unit" (M = 1) or "published" (M = r).
        mask: "ties" or None, as in `camex_deltas`; "ties" needs base="first", for the differences
            from a mean add up to 0, and the sign of that is chance.
        alpha: the step size.
        top_k: experts with a gate above 0; None is all of them, as published.
        segment: T, tokens that share an expert, the last of a sequence maybe fewer (published: 256
            on GPT-2); None is the whole sequence, later tokens included, which fits encoders and
            classifiers.
        first: the gate of a sequence's first segment, as in `segment_gates`: "uniform" is causal,
            "own" published. Without effect where segment is None.
        expert_dropout: p in training, as in `camex_linear`.
        enabled: False puts the curvature in and leaves outputs and all gradients the model's own,
            bit for bit.
        impl: as in `camex_linear`.

    Returns:
        The indices of the layers whose experts are merged.

    Raises:
        TypeError: a wrong type, an index that is no int, a model that is no module.
        ValueError: no such layers, an index that there is not, a wrong option, experts or a gate of
            another kind, a forward set on a module. Nothing is changed then.
    """
    _check.choice("base", base, _BASES)
    _check.integer("rank", rank, 0)
    _check.choice("scale", scale, SCALES)
    _check.choice("mask", mask, MASKS)
    if mask is not None and base == "mean":
        raise ValueError(
            f"mask: expected None with base='mean', from which all differences add up to 0, so "
            f"that no sign can be elected, got {mask!r}"
        )
    _check.number("alpha", alpha, -float("inf"))
    if top_k is not None:
        _check.integer("top_k", top_k, 1)
    if segment is not None:
        _check.integer("segment", segment, 1)
    _check.choice("first", first, FIRST)
    _check.probability("expert_dropout", expert_dropout)
    _check.flags(enabled=enabled)
    _backends.check_impl(impl)
    stack = Stack(model)
    chosen = stack.chosen(layers)
    gates, habits = _routers.softmax_gates(stack, chosen)
    stacked = {i: _stacked_experts(stack, i, gates[i].weight.shape[0]) for i in chosen}
    for i, (_, w_up, _) in stacked.items():
        if top_k is not None:
            _check.integer("top_k", top_k, 1, w_up.shape[0], of=f" experts of layers.{i}")
    _leave_alone(stack, chosen)
    if not chosen:
        return chosen
    handover = stack.handover()
    handover.no_cache.pop(_KIND, None)
    if enabled:
        handover.no_cache[_KIND] = "a call with one has not the tokens of the segment before"
    _routers.show_logits(stack, gates if enabled else {}, habits)
    for i, (experts, w_up, w_down) in stacked.items():
        mix_in(experts, _Experts, stack.place(i))
        kept = experts._modules.get("molex_curvature")
        if getattr(kept, "rank", 0) != rank:
            experts._modules.pop("molex_curvature", None)
            if rank:
                experts.molex_curvature = _Curvature(w_up, w_down, rank, scale)
        num = w_up.shape[0] if top_k is None else top_k
        merging = _Merging(base, mask, alpha, num, segment, first, expert_dropout, impl)
        experts.molex_merging = merging if enabled else None
    return chosen


def is_merged(experts: nn.Module) -> bool:
    """Whether `install_merged_experts` has been there."""
    return isinstance(experts, _Experts)


def _leave_alone(stack: Stack, chosen: Iterable[int]) -> None:
    """The experts of other layers run one by one, as they did."""
    for index, block in stack.blocks.items():
        experts = _unwrapped(block)
        if index not in chosen and isinstance(experts, _Experts):
            experts.molex_merging = None
            experts._modules.pop("molex_curvature", None)


def _unwrapped(block: nn.Module) -> Any:
    """The experts of a block, inside of PEFT's wrappers for parameters."""
    experts: Any = block.experts
    while isinstance(getattr(experts, "base_layer", None), nn.Module):
        experts = experts.base_layer
    return experts


def _stacked_experts(stack: Stack, index: int, num_experts: int) -> tuple[Any, Tensor, Tensor]:
    """The experts of a layer, and their weights as [E, O, D] and [E, D, I]."""
    experts = _unwrapped(stack.blocks[index])
    name = f"the experts of layers.{index}"
    if not hasattr(getattr(experts, "config", None), "_experts_implementation"):
        raise ValueError(
            f"model: expected {name} in stacked weights behind transformers' experts interface, "
            f"got {type(experts).__name__}"
        )
    check_open(name, experts)
    check_open(f"layers.{index}", stack.layers[index])
    if says(experts, "has_post_expert_norm"):
        raise ValueError(
            f"model: expected {name} without a norm behind each, got {type(experts).__name__}"
        )
    w_up, w_down = weights(experts, functools.partial(getattr, experts))[:2]
    for what, weight in (("up", w_up), ("down", w_down)):
        _check.trailing(f"{name}, {what}", weight, "E, O, D", 3)
        if weight.shape[0] != num_experts:
            raise ValueError(
                f"model: expected {name} to be {num_experts}, as many as the gate has, got "
                f"{weight.shape[0]}"
            )
    return experts, w_up, w_down
