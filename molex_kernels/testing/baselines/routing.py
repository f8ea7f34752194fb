"""What the routing ops are compared with: the published operations, and what one composes today.

All routers compute in fp32, as ours does, so that the choice of experts can be compared exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels.ops.routing.recipes import Recipe, resolve
from molex_kernels.ops.routing.types import RoutePlan, Routing

# Bytes of the published [T, T, D] tensor, of which there are several, by kind of device.
_PAIRWISE_LIMIT = {"cpu": 2**28, "cuda": 2**33}


def library_topk_route(
    x: Tensor, gate_weight: Tensor, *, top_k: int, gate_bias: Tensor | None = None
) -> Routing:
    """`F.linear`, `torch.topk`, softmax: FastMoE's router with a defined order of the experts."""
    bias = None if gate_bias is None else gate_bias.float()
    logits = F.linear(x.float(), gate_weight.float(), bias)
    values, index = torch.topk(logits, top_k, dim=1)
    return Routing(index, values.softmax(1), logits)


def library_route_from_logits(logits: Tensor, *, top_k: int) -> Routing:
    """`torch.topk` and softmax."""
    values, index = torch.topk(logits.float(), top_k, dim=1)
    return Routing(index, values.softmax(1), logits)


def library_route_from_index(logits: Tensor, expert_index: Tensor) -> Routing:
    """A gather and softmax. Every id must be an expert's."""
    return Routing(expert_index, logits.float().gather(1, expert_index).softmax(1), logits)


def published_route_plan(expert_index: Tensor, num_experts: int) -> RoutePlan:
    """FastMoE's preparation, with its five waits for the device. Every id must be an expert's."""
    ids = expert_index.flatten()
    counts = torch.bincount(ids, minlength=num_experts)
    ends = counts.cumsum(0)
    length = int(ends[-1].item())
    permutation = torch.argsort(ids, stable=True)[:length]
    if int(counts.sum().item()) != length:
        raise ValueError("expert_index: expected ids in [0, E)")
    for _ in range(3):
        counts.cpu()
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(length, device=ids.device)
    return RoutePlan(counts.int(), ends.int(), permutation, inverse)


def library_route_plan(expert_index: Tensor, num_experts: int) -> RoutePlan:
    """`torch.sort`, `torch.bincount` and a scatter. Every id must be an expert's."""
    ids = expert_index.flatten()
    permutation = torch.sort(ids, stable=True).indices
    counts = torch.bincount(ids, minlength=num_experts)
    places = torch.arange(ids.shape[0], device=ids.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, places)
    return RoutePlan(counts.int(), counts.cumsum(0).int(), permutation, inverse)


@torch.no_grad()
def published_ac_weights(
    x: Tensor,
    cluster: Tensor,
    num_clusters: int,
    *,
    recipe: str = "lm",
    stat: str | None = None,
    empty: str = "published",
) -> Tensor:
    """The authors' operations: `index_reduce` means and a gather, or all pairs at once.

    Right for `num_clusters` only where the last cluster has tokens: the published code reads the
    number of clusters back from the device.
    """
    settings = resolve(recipe, stat, None, None, None, empty)
    x = x.float()
    clusters = int(cluster.max().item()) + 1
    if settings.stat == "pairwise":
        dispersion = _published_pairwise(x, cluster, clusters)
    else:
        means = x.new_zeros(clusters, x.shape[1])
        means = means.index_reduce(0, cluster, x, "mean", include_self=False)
        if settings.stat == "mad":
            centred = (x - means[cluster]).abs()
            dispersion = torch.zeros_like(means)
            dispersion = dispersion.index_reduce(0, cluster, centred, "mean", include_self=False)
        else:
            squares = torch.zeros_like(means)
            squares = squares.index_reduce(0, cluster, x**2, "mean", include_self=False)
            dispersion = squares - means**2
    return _finish(dispersion, settings)


@torch.no_grad()
def library_ac_weights(
    x: Tensor,
    cluster: Tensor,
    num_clusters: int,
    *,
    recipe: str = "lm",
    stat: str | None = None,
    empty: str = "published",
) -> Tensor:
    """Cluster sums as products with the one-hot matrix of the labels."""
    settings = resolve(recipe, stat, None, None, None, empty)
    if settings.stat == "pairwise":
        raise NotImplementedError("no composition of library calls gives pairwise means in O(T D)")
    x = x.float()
    member = F.one_hot(cluster, num_clusters).float()
    counts = member.sum(0).clamp(min=1)[:, None]
    centred = x - (member.mT @ x / counts)[cluster]
    centred = centred.abs() if settings.stat == "mad" else centred**2
    return _finish(member.mT @ centred / counts, settings)


def published_ac_route(
    x: Tensor,
    gate_weight: Tensor,
    prev_index: Tensor,
    prev_weight: Tensor | None = None,
    *,
    top_k: int,
    gate_bias: Tensor | None = None,
    cosine: bool = False,
    mix: bool = False,
    recipe: str = "lm",
    stat: str | None = None,
) -> Routing:
    """Statistics, the gathered [T, D] weights, the gate, a wait for the finiteness check, top-k."""
    clusters = int(prev_index.max().item()) + 1
    table = published_ac_weights(x, prev_index[:, 0], clusters, recipe=recipe, stat=stat)
    return _route_with(
        table, x, gate_weight, prev_index, prev_weight, top_k, gate_bias, cosine, mix
    )


def library_ac_route(
    x: Tensor,
    gate_weight: Tensor,
    prev_index: Tensor,
    prev_weight: Tensor | None = None,
    *,
    top_k: int,
    gate_bias: Tensor | None = None,
    cosine: bool = False,
    mix: bool = False,
    recipe: str = "lm",
    stat: str | None = None,
) -> Routing:
    """`library_ac_weights` under the same router."""
    clusters = gate_weight.shape[0]
    table = library_ac_weights(x, prev_index[:, 0], clusters, recipe=recipe, stat=stat)
    return _route_with(
        table, x, gate_weight, prev_index, prev_weight, top_k, gate_bias, cosine, mix
    )


def published_load_balance(
    expert_index: Tensor, logits: Tensor, *, temperature: float = 1.0, kind: str = "switch"
) -> Tensor:
    """Counts by an atomic scatter, then the product of the two means."""
    tokens, top_k = expert_index.shape
    experts = logits.shape[1]
    ones = torch.ones(tokens * top_k, device=logits.device)
    counts = torch.zeros(experts, device=logits.device).scatter_add(0, expert_index.flatten(), ones)
    probability = (logits.float() / temperature).softmax(1).sum(0)
    p = probability / (tokens if kind == "switch" else tokens * top_k)
    return (counts / (tokens * top_k) * p).sum() * experts


def _published_pairwise(x: Tensor, cluster: Tensor, clusters: int) -> Tensor:
    size = x.shape[0] ** 2 * x.shape[1] * x.element_size()
    if size > _PAIRWISE_LIMIT[x.device.type]:
        raise NotImplementedError(f"the published [T, T, D] tensor takes {size / 1e9:.0f} GB")
    distance = (x[:, None] - x[None]).abs()
    rows = []
    for c in range(clusters):
        member = (cluster == c).to(x.dtype)
        count = member.sum()
        total = torch.einsum("i,ijd,j->d", member, distance, member)
        rows.append(total / (count * (count - 1)).clamp(min=1))
    return torch.stack(rows)


def _finish(dispersion: Tensor, settings: Recipe) -> Tensor:
    w = 1 / (dispersion + settings.eps)
    before = w.mean()
    w = torch.minimum(w, settings.clip * before)
    if settings.norm == "feature_post":
        return w / w.mean(0)
    if settings.norm == "global_pre":
        return w / before
    return w / w.mean() if settings.norm == "global_post" else w


def _route_with(
    table: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    prev_index: Tensor,
    prev_weight: Tensor | None,
    top_k: int,
    gate_bias: Tensor | None,
    cosine: bool,
    mix: bool,
) -> Routing:
    weights = table[prev_index[:, 0]]
    if mix and prev_weight is not None:
        weights = (prev_weight[..., None] * table[prev_index]).sum(1)
    gate = gate_weight.float()
    if cosine:
        gate = F.normalize(gate, dim=1, eps=1e-4)
    logits = F.linear(weights * x.float(), gate, None if gate_bias is None else gate_bias.float())
    finite = logits.isfinite()
    if not finite.all():
        logits = torch.where(finite, logits, logits[finite].min())
    values, index = torch.topk(logits, top_k, dim=1)
    return Routing(index, values.softmax(1), logits)
