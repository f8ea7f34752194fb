"""Choosing experts by their logits: the options that routers share, and the choice by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from molex_kernels import _backends, _check
from molex_kernels._dtypes import FLOAT_DTYPES, accumulate_dtype
from molex_kernels.ops.routing import op, reference
from molex_kernels.ops.routing.types import Routing

for _name in ("route_from_logits", "route_from_index"):
    _backends.declare(_name, _backends.TRITON, _backends.CPU, _backends.REFERENCE)
SCORES = reference.SCORES
_MAX_EXPERTS = 1024  # the Triton router holds a token's logits in one block
_MAX_TOP_K = 64


class Choice(NamedTuple):
    """The options as the operators and the reference take them."""

    top_k: int
    score: str = "softmax_topk"
    num_groups: int = 1
    top_groups: int = 1
    renormalize: bool = False
    scaling: float = 1.0


def resolve(
    experts: int,
    top_k: int,
    score: str,
    num_groups: int | None,
    top_groups: int | None,
    renormalize: bool,
    scaling: float,
) -> Choice:
    """Checks all options but `top_k` by itself, and puts numbers where None stands."""
    weighing = resolve_weighing(score, renormalize, scaling)
    if num_groups is None and top_groups is None:
        return Choice(top_k, **weighing)
    if num_groups is None:
        raise ValueError(f"top_groups: expected None without num_groups, got {top_groups!r}")
    _check.integer("num_groups", num_groups, 1, experts, of=" experts")
    if experts % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {experts} experts, got {num_groups}"
        )
    _check.integer("top_groups", top_groups, 1, num_groups, of=" groups")
    assert top_groups is not None  # for the type checker alone
    eligible = top_groups * (experts // num_groups)
    if top_k > eligible:
        raise ValueError(
            f"top_k: expected at most the {eligible} experts of top_groups={top_groups} groups, "
            f"got {top_k}"
        )
    return Choice(top_k, num_groups=num_groups, top_groups=top_groups, **weighing)


def resolve_weighing(score: str, renormalize: bool, scaling: float) -> dict[str, Any]:
    """The options of the weights, checked."""
    _check.choice("score", score, SCORES)
    _check.flags(renormalize=renormalize)
    _check.number("scaling", scaling)
    # Which have this sum anyway.
    over_sum = renormalize and score != "softmax_topk"
    return {"score": score, "renormalize": over_sum, "scaling": float(scaling)}


def route_from_logits(
    logits: Tensor,
    *,
    top_k: int,
    score: str = "softmax_topk",
    expert_bias: Tensor | None = None,
    num_groups: int | None = None,
    top_groups: int | None = None,
    renormalize: bool = False,
    scaling: float = 1.0,
    impl: str | None = None,
) -> Routing:
    """Routes each token by its logits, as `topk_route` does after its product.

    Args:
        logits: z [T, E], floating.
        top_k: as in `topk_route`.
        score: as in `topk_route`.
        expert_bias: [E], floating; as in `topk_route`.
        num_groups: as in `topk_route`.
        top_groups: as in `topk_route`.
        renormalize: as in `topk_route`.
        scaling: as in `topk_route`.
        impl: None (the fastest that runs), "triton" (E <= 1024, K <= 64), "cpu" or "reference".

    Returns:
        Routing(expert_index [T, K] int64, expert_weight [T, K] fp32 (fp64 for fp64 logits), the
        given logits). Differentiable in the logits; a second time with impl="reference" alone.
        Deterministic, no host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: an explicit `impl` that cannot run, with every reason.
    """
    experts = check_logits("logits", logits)
    _check.integer("top_k", top_k, 1, experts, of=" experts")
    if expert_bias is not None:
        _check.tensor("expert_bias", expert_bias, "E", (experts,), FLOAT_DTYPES, logits)
    options = resolve(experts, top_k, score, num_groups, top_groups, renormalize, scaling)
    return _choose("route_from_logits", impl, logits, expert_bias, None, options)


def route_from_index(
    logits: Tensor,
    expert_index: Tensor,
    *,
    score: str = "softmax_topk",
    renormalize: bool = False,
    scaling: float = 1.0,
    impl: str | None = None,
) -> Routing:
    """Weighs given experts by the logits: a routing replayed, or a balanced one imposed.

    The weights are those of `topk_route` for these experts. An id outside [0, E) has weight 0,
    takes no part in a sum over the chosen experts, and passes no gradient.

    Args:
        logits: z [T, E], floating.
        expert_index: [T, K] int64 or int32.
        score: as in `topk_route`.
        renormalize: as in `topk_route`.
        scaling: as in `topk_route`.
        impl: None (the fastest that runs), "triton" (E <= 1024, K <= 64), "cpu" or "reference".

    Returns:
        Routing(the given expert_index, expert_weight [T, K] fp32 (fp64 for fp64 logits), the given
        logits). Differentiable in the logits; a second time with impl="reference" alone.
        Deterministic, no host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: an explicit `impl` that cannot run, with every reason.
    """
    check_logits("logits", logits)
    _check.index("expert_index", expert_index, "T, K", (logits.shape[0], None), logits)
    options = Choice(expert_index.shape[1], **resolve_weighing(score, renormalize, scaling))
    routing = _choose("route_from_index", impl, logits, None, expert_index, options)
    return routing._replace(expert_index=expert_index)


def check_logits(name: str, logits: Tensor) -> int:
    """Checks logits [T, E] and returns E."""
    _check.floating(name, logits, "T, E", (None, None))
    if logits.shape[1] < 1:
        raise ValueError(f"{name}: expected shape [T, E] with E at least 1, got E=0")
    return logits.shape[1]


def _choose(
    name: str,
    impl: str | None,
    logits: Tensor,
    expert_bias: Tensor | None,
    given: Tensor | None,
    options: Choice,
) -> Routing:
    limit = why_not_triton(logits.shape[1], options.top_k)
    chosen = _backends.select(name, impl, logits, triton=limit)
    dtype = accumulate_dtype(logits.dtype)
    bias = None if expert_bias is None else expert_bias.to(dtype)
    arguments = (logits.to(dtype), bias, given, *options)
    if chosen == "reference":
        index, weight = reference.choose_or_weigh(*arguments)
    else:
        index, weight = op.choice(impl, *arguments)
    return Routing(index, weight, logits)


def why_not_triton(experts: int, top_k: int) -> str | None:
    """Why the Triton kernels cannot choose so many of so many experts."""
    if top_k > _MAX_TOP_K:
        return f"it takes top_k up to {_MAX_TOP_K}, got {top_k}"
    return why_not_experts(experts)


def why_not_experts(experts: int) -> str | None:
    """Why the Triton kernels cannot take so many experts."""
    if experts > _MAX_EXPERTS:
        return f"it takes at most {_MAX_EXPERTS} experts, got {experts}"
    return None
