"""Feature weights from cluster statistics, on one device or over a process group."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

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
    statistics: Any = reference.cluster_statistics
    weights: Any = reference.feature_weights
    if impl != "reference":
        statistics, weights = partial(op.statistics, impl), partial(op.weights, impl)
    given = (x.detach(), cluster)
    sums: Any = (None, None)
    if group is not None:  # the means have to be known first, in a pass of their own
        sums = groups.summed(group, *statistics(*given, *sums, num_clusters, "sum"))
    deviations, counts = statistics(*given, *sums, num_clusters, recipe.stat)
    if group is not None:
        deviations, counts = groups.summed(group, deviations)[0], sums[1]
    return weights(deviations, counts, recipe.eps, recipe.clip, recipe.norm, recipe.mask)
