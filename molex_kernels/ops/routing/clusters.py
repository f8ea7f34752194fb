"""Feature weights from cluster statistics, on one device or over a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from molex_kernels.ops.routing import op, reference
from molex_kernels.ops.routing.recipes import Recipe

MAX_CLUSTERS = 1024  # of the Triton kernels


def why_not_triton(num_clusters: int) -> str | None:
    """Why the Triton statistics cannot take this many clusters."""
    if num_clusters <= MAX_CLUSTERS:
        return None
    return f"it takes at most {MAX_CLUSTERS} clusters, got {num_clusters}"


def check_group(group: dist.ProcessGroup | None, stat: str) -> None:
    """The group is one of torch.distributed, and the statistic can be summed over it."""
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup or None, got "
            f"{type(group).__name__}"
        )
    if stat == "pairwise":
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
    group: dist.ProcessGroup | None,
    chosen: str,
) -> Tensor:
    """W [C, D]; over a group, the weights of the union of the ranks' tokens."""
    x = x.detach()
    if chosen == "triton":
        plan = op.plan_triton(cluster[:, None], num_clusters)
        sums = op.SUM_TRITON(x, plan.permutation, plan.offsets)
        sums, counts = _over(group, sums, plan.counts)
        deviations = op.DEVIATION_TRITON(
            x, cluster, plan.permutation, plan.offsets, sums, counts, recipe.stat
        )
        (deviations,) = _over(group, deviations)
        return op.WEIGHTS_TRITON(
            deviations, counts, recipe.eps, recipe.clip, recipe.norm, recipe.mask
        )
    if chosen == "cpu":
        return op.WEIGHTS_CPU(
            *_statistics_cpu(x, cluster, num_clusters, recipe.stat, group),
            recipe.eps,
            recipe.clip,
            recipe.norm,
            recipe.mask,
        )
    sums, counts = reference.cluster_sums(x, cluster, num_clusters)
    sums, counts = _over(group, sums, counts)
    deviations = reference.cluster_deviations(x, cluster, sums, counts, recipe.stat)
    (deviations,) = _over(group, deviations)
    return reference.feature_weights(
        deviations, counts, recipe.eps, recipe.clip, recipe.norm, recipe.mask
    )


def _statistics_cpu(
    x: Tensor, cluster: Tensor, num_clusters: int, stat: str, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Deviations and counts; over a group the sums have to be known first, in a pass of theirs."""
    if group is None:
        return op.STATISTICS_CPU(x, cluster, None, None, num_clusters, stat)
    own = op.STATISTICS_CPU(x, cluster, None, None, num_clusters, "sum")
    sums, counts = _over(group, *own)
    deviations, _ = op.STATISTICS_CPU(x, cluster, sums, counts, num_clusters, stat)
    return _over(group, deviations)[0], counts


def _over(group: dist.ProcessGroup | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums over the ranks of the group."""
    if group is None:
        return tensors
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)
    return tensors
