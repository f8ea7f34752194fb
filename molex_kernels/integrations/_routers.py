"""Adaptive-clustering routers (ACMoE) in transformers' mixture-of-experts models."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from molex_kernels.integrations._handover import Part, Stack, mix_in
from molex_kernels.integrations._layers import check_open
from molex_kernels.ops.routing.api import ac_route, topk_route
from molex_kernels.ops.routing.choice import route_from_index
from molex_kernels.ops.routing.module import ACRouter

_KIND = "routing"
LOGITS = "logits"  # of this layer, for its experts
_NAMES = ("gate", "router")
_OPTIONS = set(inspect.signature(ac_route).parameters) & set(inspect.signature(ACRouter).parameters)
_OPTIONS -= {"top_k"}


class _Habits(NamedTuple):
    """How a gate weighs the experts that it chooses, and in which dtypes it returns what.

    Attributes:
        score: as in `topk_route`.
        logits: "fp32", "x" for the dtype of x, "product" for that of a product (autocast's).
        scores: likewise.
    """

    score: str
    logits: str
    scores: str


class _Gate(Part):
    """A gate that keeps its routing for the next layer's, and follows the one before, if asked.

    Attributes:
        molex_options: of `ac_route`, or None for a gate that routes as it did.
        molex_habits: how it weighs.
        molex_shows: whether its layer's experts get the logits.
    """

    molex_options: dict[str, Any] | None
    molex_habits: Any
    molex_shows = False

    def leave(self) -> None:
        """Takes out of the module what was added to it."""
        super().leave()
        for name in ("molex_options", "molex_habits", "molex_shows"):
            self.__dict__.pop(name, None)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = self.molex_place.given
        if given is None or self.molex_options is None or _KIND not in given.before:
            result = super().forward(hidden_states)
        else:
            index, weight = given.before[_KIND]
            result = self._adaptive(hidden_states, index, weight, given.mask)
        if given is not None:
            given.made[_KIND] = (result[2], result[1].detach())
            if self.molex_shows:
                given.made[LOGITS] = result[0]
        return result

    def _adaptive(
        self, hidden_states: Tensor, index: Tensor, weight: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        gate: Any = self
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, weight = index.to(x.device), weight.to(x.device)
        if mask is not None:
            index = torch.where(mask.reshape(-1, 1).to(x.device), index, -1)
        options: Any = self.molex_options
        if options.get("mix"):
            weight = weight / weight.sum(1, keepdim=True)  # some gates' leave out the other experts
        routing = ac_route(
            x,
            gate.weight,
            index,
            weight,
            top_k=gate.top_k,
            gate_bias=getattr(gate, "bias", None),
            **options,
        )
        habits, kind = self.molex_habits, x.device.type
        if habits.score != "softmax_topk":
            impl = options.get("impl")
            routing = route_from_index(*routing[2::-2], score=habits.score, impl=impl)
        dtypes = {"fp32": torch.float32, "x": x.dtype, "product": x.dtype}
        if torch.is_autocast_enabled(kind):
            dtypes["product"] = torch.get_autocast_dtype(kind)
        logits = routing.logits.to(dtypes[habits.logits])
        return logits, routing.expert_weight.to(dtypes[habits.scores]), routing.expert_index


def install_ac_router(
    model: nn.Module, *, layers: Iterable[int] | None = None, **options: Any
) -> list[int]:
    """Lets the gates of a mixture-of-experts model route by the clusters of the layer before.

    ACMoE (arXiv 2502.15315): the experts that the MoE layer before chose are the clusters by which
    `ac_route` weighs a token's features. Weights, names and checkpoints stay as they are, and so
    does the first MoE layer, which has none before it. Made for Mixtral, OLMoE, Qwen2-, Qwen3-MoE,
    Qwen3-Next, gpt-oss, Granite-MoE, MiniMax and every gate that takes the largest of a softmax
    over x W^T + b, which is tried when it is installed.

    The statistics are of all tokens of a call, later ones among them, as published: the model is no
    causal one any more, and decoding with a cache is another function, which is refused
    (`generate(..., use_cache=False)` runs). Tokens that an `attention_mask` [B, N] leaves out take
    no part in them; a mask of another form leaves out none.

    Training, `gradient_checkpointing_enable()` of both kinds, several forward passes before their
    backward passes, `torch.compile`, deepcopy and pickling work as without it. Installed again, it
    replaces what was installed.

    Args:
        model: a transformers model whose decoder has one list of layers, some of them with a child
            that has `experts` and a `gate` or `router`. It may hold its weights already or not.
        layers: which layers' gates; None is all with experts. The layer before is the nearest with
            experts, chosen or not.
        options: of `ac_route`, and the same for all: `recipe`, `stat`, `eps`, `clip`, `norm`,
            `empty`, `mix`, `cosine`, `process_group`, `impl`.

    Returns:
        The indices of the layers that route by clusters: `layers` without the first that has
        experts.

    Raises:
        TypeError: an unknown option, an index that is no int, a model that is no module.
        ValueError: no such layers, an index that there is not, a gate of another kind, experts of
            another number in the layer before, or a forward set on a module; nothing is changed
            then.
    """
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        raise TypeError(f"options: expected some of {sorted(_OPTIONS)}, got {unknown}")
    stack = Stack(model)
    with_experts = sorted(stack.blocks)
    chosen = [index for index in stack.chosen(layers) if index != with_experts[0]]
    before = {i: with_experts[with_experts.index(i) - 1] for i in chosen}
    gates, habits = softmax_gates(stack, {*chosen, *before.values()})
    for i in chosen:
        gate, previous = gates[i], gates[before[i]]
        experts, width = gate.weight.shape
        if previous.weight.shape[0] != experts:
            raise ValueError(
                f"model: expected as many experts in layer {i} as in {before[i]}, "
                f"got {experts} and {previous.weight.shape[0]}"
            )
        bias = getattr(gate, "bias", None) is not None
        ACRouter(width, experts, gate.top_k, bias=bias, device="meta", **options)
    if not chosen:
        return chosen
    handover = stack.handover()
    handover.no_cache["install_ac_router"] = (
        "the clusters' statistics are of all tokens of a call, and one with a cache has few of them"
    )
    for index in with_experts:
        gate = gates.get(index) or _find(stack.blocks[index])
        if index in gates:
            mix_in(gate, _Gate, stack.place(index))
        if isinstance(gate, _Gate):
            gate.molex_options = dict(options) if index in chosen else None
            gate.molex_habits = habits.get(index, gate.__dict__.get("molex_habits"))
    return chosen


def softmax_gates(stack: Stack, layers: Iterable[int]) -> tuple[dict[int, Any], dict[int, _Habits]]:
    """By layer, gates that take the largest of a softmax over x W^T + b, and how they weigh.

    Args:
        stack: the decoder.
        layers: the indices of layers with experts.

    Returns:
        (gates, habits).

    Raises:
        ValueError: a gate of another kind, which the message names.
    """
    gates = {i: _gate(stack, i) for i in sorted(layers)}
    return gates, {i: _habits(f"layers.{i}", gate) for i, gate in gates.items()}


def show_logits(stack: Stack, gates: dict[int, Any], habits: dict[int, _Habits]) -> None:
    """From now on the experts of these layers find the logits in what their layer has made."""
    for index, block in stack.blocks.items():
        gate = _find(block)
        if index in gates and not isinstance(gate, _Gate):
            mix_in(gate, _Gate, stack.place(index))
            gate.molex_options, gate.molex_habits = None, habits[index]
        if isinstance(gate, _Gate):
            gate.molex_shows = index in gates


def _find(block: nn.Module) -> Any:
    return next((getattr(block, name) for name in _NAMES if hasattr(block, name)), None)


def _gate(stack: Stack, index: int) -> Any:
    """This layer's gate, if it has what `ac_route` takes and nothing else."""
    block = stack.blocks[index]
    gate = _find(block)
    name = f"the gate of layers.{index}"
    if not isinstance(gate, nn.Module):
        raise ValueError(f"model: expected {type(block).__name__} to have a gate or router")
    parameters = {n: p for n, p in gate.named_parameters() if p is not None}
    has_more = set(parameters) - {"weight", "bias"} or dict(gate.named_buffers())
    weight, top_k = parameters.get("weight"), getattr(gate, "top_k", None)
    if has_more or weight is None or weight.dim() != 2 or not isinstance(top_k, int):
        raise ValueError(
            f"model: expected {name} to be a weight [E, D], perhaps a bias [E], and top_k, "
            f"got {type(gate).__name__} with {sorted(parameters)} and top_k={top_k}"
        )
    check_open(name, gate)
    check_open(f"layers.{index}", stack.layers[index])
    return gate


@torch.no_grad()
def _habits(name: str, gate: Any) -> _Habits:
    """Tries the gate on weights of our own, so that the model's may be missing yet."""
    generator = torch.Generator().manual_seed(0)
    width = gate.weight.shape[1]
    shapes = {"x": (16, width), **{n: p.shape for n, p in gate.named_parameters()}}
    draw = {n: torch.randn(s, generator=generator, device="cpu") for n, s in shapes.items()}
    x = draw.pop("x") / width**0.5
    arguments = {"top_k": gate.top_k, "gate_bias": draw.get("bias"), "impl": "reference"}
    halves = {n: p.bfloat16() for n, p in draw.items()}
    try:
        with torch.autocast("cpu", enabled=False):
            logits, scores, index = functional_call(gate, draw, (x,))
            narrow = functional_call(gate, halves, (x.bfloat16(),))
        with torch.autocast("cpu", torch.bfloat16):
            products = functional_call(gate, draw, (x,))
        for score in ("softmax_topk", "softmax"):
            ours = topk_route(x, draw["weight"], score=score, **arguments)
            pairs = ((ours.logits, logits), (ours.expert_weight, scores))
            if torch.equal(ours.expert_index, index) and all(
                a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs
            ):
                return _Habits(score, *map(_dtype, narrow[:2], products))
        why = "one that chooses or weighs differently"
    except Exception as error:
        why = f"one that fails for tokens [T, D]: {error}"
    raise ValueError(
        f"model: expected the gate of {name} to return the logits, the scores and the indices of "
        f"the top_k largest of a softmax, got {type(gate).__name__}, {why}"
    )


def _dtype(narrow: Tensor, product: Tensor) -> str:
    """Which dtype it is: of x in bf16, and of x in fp32 with products in bf16."""
    if narrow.dtype == torch.float32:
        return "fp32"
    return "x" if product.dtype == torch.float32 else "product"
