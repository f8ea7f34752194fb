"""Feature weights from cluster statistics, on one device or over a process group."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from molex_kernels import _extension
from molex_kernels.ops.routing import groups, op, reference
from molex_kernels.ops.routing.recipes import Recipe

MAX_CLUSTERS = 1024  # of the Triton kernels


def why_not_triton(num_clusters: int) -> str | None:
    """Why the Triton statistics cannot take this many clusters."""
    if num_clusters <= MAX_CLUSTERS:
        return None
    return f"it takes at most {MAX_CLUSTERS} clusters, got {num_clusters}"


def check_group(group: ProcessGroup | None, stat: str) -> None:
    """The group is one of torch.distributed, and the statistic can be summed over it."""
    groups.check_group(group)
    if group is not None and stat == "pairwise":
        raise NotImplementedError(
            "process_group: stat='pairwise' needs every rank's tokens, not sums of them; "
            "take stat='mad' or 'variance', or gather the tokens and pass them as stats_from"
        )


@torch.no_grad()
def compute(
    x: Tensor,
    cluster: Tensor,
    num_clusters: int,
    recipe: Recipe,
    group: ProcessGroup | None,
    impl: str | None,
) -> Tensor:
    """W [C, D]; over a group, the weights of the union of the ranks' tokens."""
    by_reference = impl == "reference"
    x = x.detach()
    options = (recipe.eps, recipe.clip, recipe.norm, recipe.mask)
    if group is None:
        whole: Any = (
            reference.cluster_weights if by_reference else partial(op.cluster_weights, impl)
        )
        return whole(x, cluster, num_clusters, recipe.stat, *options)
    statistics, weights = _two(impl)
    # The means have to be known first, in a pass of their own.
    sums, counts = groups.summed(group, *statistics(x, cluster, None, None, num_clusters, "sum"))
    deviations, _ = statistics(x, cluster, sums, counts, num_clusters, recipe.stat)
    return weights(*groups.summed(group, deviations), counts, *options)


def cluster_weights_forward(a: Any) -> Tensor:
    """The operator on a CPU, where the sums are in one part anyway."""
    impl = "cpu" if _extension.why_not() is None else "reference"
    # The operators themselves: derivatives were looked after on the way here.
    tokens = (a.x, a.cluster, None, None, a.num_clusters, a.stat)
    deviations, counts = op.statistics.forward(*tokens, impl)
    options = (a.eps, a.clip, a.norm, a.mask)
    return op.weights.forward(deviations, counts, *options, impl)


def _two(impl: str | None) -> tuple[Any, Any]:
    """What computes the statistics, and the weights from them."""
    if impl == "reference":
        return reference.cluster_statistics, reference.feature_weights
    return partial(op.statistics, impl), partial(op.weights, impl)
