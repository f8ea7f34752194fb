"""How experts are chosen by their logits: the options that the routers share."""

from __future__ import annotations

from typing import Any, NamedTuple

from molex_kernels import _check
from molex_kernels.ops.routing import reference

SCORES = reference.SCORES


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
    _check.integer("num_groups", num_groups, 1, experts, of=" experts")
    assert num_groups is not None  # for the type checker alone
    if experts % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {experts} experts, got {num_groups}"
        )
    _check.integer("top_groups", top_groups, 1, num_groups, of=" groups")
    assert top_groups is not None
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
