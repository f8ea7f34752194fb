"""Tokens to the ranks of their experts and back: two ways, by PyTorch's functional collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from molex_kernels import _check, _dtypes
from molex_kernels.ops.dispatch.api import check_plan
from molex_kernels.ops.dispatch.permute import permute, unpermute
from molex_kernels.ops.routing.api import route_plan
from molex_kernels.ops.routing.types import RoutePlan

# Releases before 2.13 have them under other names, which later ones warn of.
_all_gather: Any = getattr(collectives, "all_gather_single_autograd", None)
_all_gather = _all_gather or collectives.all_gather_tensor_autograd
_reduce_scatter: Any = getattr(collectives, "reduce_scatter_single_autograd", None)
_reduce_scatter = _reduce_scatter or collectives.reduce_scatter_tensor_autograd


class Experts(NamedTuple):
    """The experts of one rank among those of its group.

    Attributes:
        num_experts: E, of all ranks; rank r has those from r E / P on.
        group: of P ranks.
        compute: x [R, D], ids of this rank's experts [R, K] (others are no local experts) and
            weights [R, K] to the weighted sums [R, D].
        impl: for what is done besides.
        beside: computed while tokens travel, with nothing of them.
    """

    num_experts: int
    group: dist.ProcessGroup
    compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    impl: str | None = None
    beside: Callable[[], Tensor] | None = None


# Each strategy returns the weighted sums [T, D] and what was computed beside.
Result = tuple[Tensor, Tensor | None]


def all_to_all(
    x: Tensor, index: Tensor, weight: Tensor, experts: Experts, plan: RoutePlan | None
) -> Result:
    """Every assignment's row goes to the rank of its expert, and comes back to be summed at home.

    The host reads once how many rows go and come, which PyTorch's collective takes from the host.
    """
    x, weight = _checked(x, index, weight)
    ranks, top_k = dist.get_world_size(experts.group), index.shape[1]
    own = experts.num_experts // ranks
    if plan is None:
        plan = route_plan(index, experts.num_experts)
    else:
        check_plan(plan, experts.num_experts, index.numel(), x)
    leaving = plan.counts.view(ranks, own)
    arriving = _wait(collectives.all_to_all_single(leaving, None, None, experts.group))
    out, in_ = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()

    rows = permute(x, plan, top_k=top_k, impl=experts.impl)[: sum(out)]
    pending = collectives.all_to_all_single_autograd(rows, in_, out, experts.group)
    # Rows come rank by rank, and those of each rank in the order of the experts here.
    ids = torch.arange(own, device=x.device).repeat(ranks)
    ids = ids.repeat_interleave(arriving.flatten(), output_size=sum(in_))[:, None]
    aside = experts.beside() if experts.beside else None
    ones = x.new_ones(ids.shape, dtype=_dtypes.accumulate_dtype(x.dtype))
    rows = experts.compute(_wait(pending), ids, ones)
    rows = _wait(collectives.all_to_all_single_autograd(rows, out, in_, experts.group))
    if rows.shape[0] < index.numel():  # ids that are no expert's went nowhere
        rows = F.pad(rows, (0, 0, 0, index.numel() - rows.shape[0]))
    return unpermute(rows, plan, weight, impl=experts.impl), aside


def all_gather(
    x: Tensor, index: Tensor, weight: Tensor, experts: Experts, max_tokens: int | None
) -> Result:
    """Every rank computes its experts' part for the tokens of all ranks, and the parts are summed.

    The host reads nothing that a device has computed. The collectives take as many tokens from
    every rank: `max_tokens`, with empty ones behind the given, or what is given.
    """
    x, weight = _checked(x, index, weight)
    group, tokens = experts.group, x.shape[0]
    own = experts.num_experts // dist.get_world_size(group)
    if max_tokens is None:
        _refuse_unlike_numbers(x, group)
    elif tokens > max_tokens:
        raise ValueError(f"x: expected at most max_tokens={max_tokens} tokens, got {tokens}")
    else:
        missing = (0, 0, 0, max_tokens - tokens)
        x, weight = F.pad(x, missing), F.pad(weight, missing)
        index = F.pad(index, missing, value=-1)  # no expert's
    parts = [_all_gather(part.contiguous(), 0, group) for part in (x, index, weight)]
    aside = experts.beside() if experts.beside else None
    x, index, weight = map(_wait, parts)
    # What belongs to other ranks falls out of the range of the ids here.
    y = experts.compute(x, index - dist.get_rank(group) * own, weight)
    return _wait(_reduce_scatter(y, "sum", 0, group))[:tokens], aside


def _checked(x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and weight as autocast has them. A rank that raised later would leave others waiting."""
    (x,) = _dtypes.autocast(x)
    (weight,) = _dtypes.kept(x, weight)
    _check.floating("x", x, "T, D", (None, None))
    _check.index("expert_index", index, "T, K", (x.shape[0], None), x)
    dtypes = (x.dtype, torch.float32)
    _check.tensor("expert_weight", weight, "T, K", index.shape, dtypes, x)
    for name, value in (("x", x), ("expert_index", index), ("expert_weight", weight)):
        if isinstance(value, DTensor):
            raise TypeError(f"{name}: expected this rank's part as a plain tensor, got a DTensor")
    return x, weight


def _refuse_unlike_numbers(x: Tensor, group: dist.ProcessGroup) -> None:
    """On a CPU, where asking costs little: gloo would return rows that nobody has written."""
    if not x.is_cpu:
        return
    mine = torch.tensor([x.shape[0]])
    counts = _wait(_all_gather(mine, 0, group)).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"x: expected equally many tokens on all ranks with strategy='all_gather', got "
            f"{counts}: name the most that a rank may have as max_tokens"
        )


def _wait(tensor: Tensor) -> Tensor:
    return collectives.wait_tensor(tensor)
