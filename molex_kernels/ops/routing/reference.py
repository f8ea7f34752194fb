"""Routing in plain PyTorch: the specification, one line per equation.

All arithmetic is in fp32 (fp64 for fp64 input), whatever autocast says. Gradients come from
PyTorch's autograd; every shape is known before the data, so Dynamo traces it whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels._dtypes import accumulate_dtype, without_autocast
from molex_kernels._masks import selected
from molex_kernels.ops.routing.types import RoutePlan, Routing

SCORES = ("softmax_topk", "softmax", "sigmoid", "logits", "sqrtsoftplus")
# Beyond it softplus(z) is z, in fp64 as well.
_SOFTPLUS_LINEAR = 40.0


def route(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    expert_bias: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
    mix: Tensor | None,
    *choice: Any,
) -> Routing:
    """Logits of the (weighted) tokens, and by them the K best experts and their weights."""
    z = router_logits(x, gate, gate_bias, table, labels, mix)
    return Routing(*choose(z, expert_bias, *choice), z)


def choose(
    z: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    score: str,
    num_groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = False,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The K best experts of each token by its logits, and their weights."""
    key = selection_key(z, expert_bias, score)
    allowed = None if top_groups == num_groups else in_groups(key, num_groups, top_groups)
    index = select(key, top_k, allowed)
    return index, weights(z, index, score, renormalize, scaling)


def router_logits(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
    mix: Tensor | None,
) -> Tensor:
    """z_te = sum_q w_tq x_tq g_eq + b_e, with w = 1 where no table of feature weights is given."""
    dtype = accumulate_dtype(x.dtype)
    x, gate = x.to(dtype), gate.to(dtype)
    if table is not None and labels is not None:
        x = token_weights(table.to(dtype), labels, mix) * x
    with without_autocast(x):
        z = x @ gate.mT
    return z if gate_bias is None else z + gate_bias.to(dtype)


def token_weights(table: Tensor, labels: Tensor, mix: Tensor | None) -> Tensor:
    """w_tq = sum_m p_tm W[label_tm, q]; 1 in place of W for a label outside [0, C)."""
    rows = torch.cat([table, table.new_ones(1, table.shape[1])])
    bucket = _bucket(labels, table.shape[0])
    parts = [rows[bucket[:, m]] for m in range(labels.shape[1])]
    if mix is not None:
        parts = [mix[:, m, None].to(table.dtype) * part for m, part in enumerate(parts)]
    return sum(parts[1:], parts[0])


def selection_key(z: Tensor, expert_bias: Tensor | None, score: str) -> Tensor:
    """What experts are ranked by: the logit, or with `expert_bias` the score plus that bias."""
    z = z.detach()
    if expert_bias is None:
        return z
    bias = expert_bias.detach().to(z.dtype)
    if score == "softmax":
        return z.softmax(1) + bias
    return (z if score == "softmax_topk" else elementwise(z, score)) + bias


def group_keys(key: Tensor, num_groups: int) -> Tensor:
    """[T, G]: the sum of the two best keys of each group of experts; of one expert, its key."""
    by_group = _finite(key).unflatten(1, (num_groups, key.shape[1] // num_groups))
    return by_group.topk(min(2, by_group.shape[2]), dim=2).values.sum(2)


def in_groups(key: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """[T, E] bool: whether an expert is in one of the groups with the largest sums."""
    best = select(group_keys(key, num_groups), top_groups)
    chosen = torch.zeros_like(key, dtype=torch.bool)[:, :num_groups].scatter(1, best, True)
    return chosen.repeat_interleave(key.shape[1] // num_groups, dim=1)


def select(key: Tensor, top_k: int, allowed: Tensor | None = None) -> Tensor:
    """The K largest allowed keys, descending; ties to the lower; NaN and -inf are lowest."""
    left = _finite(key)
    if allowed is not None:
        left = torch.where(allowed, left, -torch.inf)
    best = []
    for _ in range(top_k):
        best.append(left.argmax(1, keepdim=True))  # the first of equal ones
        left = left.scatter(1, best[-1], -torch.inf)
    return torch.cat(best, 1)


def _finite(key: Tensor) -> Tensor:
    lowest = torch.finfo(key.dtype).min
    return torch.where(key > lowest, key, lowest)


def elementwise(z: Tensor, score: str) -> Tensor:
    """sigmoid(z), z itself, or sqrt(softplus(z)), with softplus at least the least normal number.

    The square root has an infinite slope at 0.
    """
    if score == "sigmoid":
        return z.sigmoid()
    if score == "logits":
        return z
    least = torch.finfo(z.dtype).tiny
    return F.softplus(z, threshold=_SOFTPLUS_LINEAR).clamp(min=least).sqrt()


def choose_or_weigh(
    z: Tensor, expert_bias: Tensor | None, given: Tensor | None, top_k: int, *options: Any
) -> tuple[Tensor, Tensor]:
    """`choose`, or the given experts, -1 for ids outside [0, E), and their weights."""
    if given is None:
        return choose(z, expert_bias, top_k, *options)
    score, _, _, renormalize, scaling = options
    known = (given >= 0) & (given < z.shape[1])
    index = torch.where(known, given, -1).long()
    return index, weights(z, index.clamp(min=0), score, renormalize, scaling, known)


def weights(
    z: Tensor,
    index: Tensor,
    score: str,
    renormalize: bool,
    scaling: float,
    known: Tensor | None = None,
) -> Tensor:
    """The scores of the chosen experts, over their sum if `renormalize`, times `scaling`.

    Where `known` [T, K] is False the weight is 0, and the expert takes no part in any sum.
    """
    found = _scores(z, index, score, renormalize, known)
    found = found if scaling == 1 else found * scaling
    return found if known is None else torch.where(known, found, 0)


def _scores(
    z: Tensor, index: Tensor, score: str, renormalize: bool, known: Tensor | None
) -> Tensor:
    """softmax over the K chosen or over all E logits, or one of the elementwise scores.

    softmax and sigmoid are divided by their sum as a softmax of their logarithms, which has no 0/0.
    """
    if score == "softmax" and not renormalize:
        return z.softmax(1).gather(1, index)
    chosen = z.gather(1, index)
    if score in ("softmax", "softmax_topk") or (score == "sigmoid" and renormalize):
        chosen = F.logsigmoid(chosen) if score == "sigmoid" else chosen
        if known is not None:  # a row without known experts has a softmax, too, of no use
            chosen = torch.where(known, chosen, torch.where(known.any(1, True), -torch.inf, 0.0))
        return chosen.softmax(1)
    found = elementwise(chosen, score)
    if not renormalize:
        return found
    if known is not None:
        found = torch.where(known, found, torch.where(known.any(1, True), 0.0, 1.0))
    return found / found.sum(1, keepdim=True)


def route_plan(expert_index: Tensor, num_experts: int) -> RoutePlan:
    """Stable sort of the assignments by expert; ids outside [0, E) last."""
    ids = expert_index.reshape(-1)
    buckets = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).long()
    permutation = buckets.sort(stable=True).indices
    inverse = torch.zeros_like(permutation).scatter(
        0, permutation, torch.arange(ids.shape[0], device=ids.device)
    )
    ones = torch.ones_like(buckets)
    counts = ones.new_zeros(num_experts + 1).scatter_add(0, buckets, ones)[:num_experts]
    return RoutePlan(counts.int(), counts.cumsum(0).int(), permutation, inverse)


def cluster_sums(x: Tensor, cluster: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Sums [C, D] of the tokens of each cluster, and the counts [C] int32."""
    x = x.to(accumulate_dtype(x.dtype))
    bucket = _bucket(cluster, num_clusters)
    return _sum_by(x, bucket, num_clusters), _counts(bucket, num_clusters)


def cluster_statistics(
    x: Tensor,
    cluster: Tensor,
    sums: Tensor | None,
    counts: Tensor | None,
    num_clusters: int,
    stat: str,
) -> tuple[Tensor, Tensor]:
    """The sums (stat="sum") or deviations of the clusters, and their counts.

    Deviations are from the means by `sums` and `counts`, those of x itself where they are None.
    """
    if sums is None or counts is None:
        sums, counts = cluster_sums(x, cluster, num_clusters)
    if stat == "sum":
        return sums, counts
    return cluster_deviations(x, cluster, sums, counts, stat), counts


def cluster_deviations(
    x: Tensor, cluster: Tensor, sums: Tensor, counts: Tensor, stat: str
) -> Tensor:
    """n_c s_cq [C, D], with s the dispersion of feature q in cluster c.

    mad:       n s = sum_i |x_i - mean|
    variance:  n s = sum_i (x_i - mean)^2
    pairwise:  n s = sum_{i != j} |x_i - x_j| / (n - 1)
    """
    x = x.to(accumulate_dtype(x.dtype))
    num_clusters = counts.shape[0]
    bucket = _bucket(cluster, num_clusters)
    mean = sums / counts.clamp(min=1)[:, None]
    if stat == "pairwise":
        return _pairwise(x, bucket, mean, counts)
    centred = x - mean[bucket.clamp(max=num_clusters - 1)]
    return _sum_by(centred.abs() if stat == "mad" else centred**2, bucket, num_clusters)


def feature_weights(
    deviations: Tensor, counts: Tensor, eps: float, clip: float, norm: str, mask: bool
) -> Tensor:
    """W_cq = 1 / (s_cq + eps), clipped at `clip` times its mean and normalised.

    Means run over the rows that count: all of them, or with `mask` those of clusters with tokens.
    """
    present = (counts > 0)[:, None] if mask else torch.ones_like(counts, dtype=torch.bool)[:, None]
    rows = present.sum().clamp(min=1)
    w = 1 / (deviations / counts.clamp(min=1)[:, None] + eps)
    w = torch.where(present, w, 0)
    before = w.sum() / (rows * w.shape[1])
    if clip < math.inf:
        w = torch.minimum(w, clip * before)
    if norm == "feature_post":
        w = w / (w.sum(0) / rows)
    elif norm == "global_pre":
        w = w / before
    elif norm == "global_post":
        w = w / (w.sum() / (rows * w.shape[1]))
    return torch.where(present, w, 1.0)


def cluster_weights(
    x: Tensor, cluster: Tensor, num_clusters: int, stat: str, *recipe: Any
) -> Tensor:
    """`feature_weights` of the clusters of these tokens."""
    deviations, counts = cluster_statistics(x, cluster, None, None, num_clusters, stat)
    return feature_weights(deviations, counts, *recipe)


def _bucket(cluster: Tensor, num_clusters: int) -> Tensor:
    """The cluster of each token; C, one past the last, for an id outside [0, C)."""
    return torch.where((cluster >= 0) & (cluster < num_clusters), cluster, num_clusters).long()


def _counts(bucket: Tensor, num_clusters: int) -> Tensor:
    ones = torch.ones_like(bucket)
    return ones.new_zeros(num_clusters + 1).scatter_add(0, bucket, ones)[:num_clusters].int()


def _sum_by(rows: Tensor, bucket: Tensor, num_clusters: int) -> Tensor:
    """Sum of the rows of each cluster, the same bit for bit when repeated."""
    sums = rows.new_zeros(num_clusters + 1, rows.shape[1])
    if rows.is_cuda:  # there index_put sorts, where scatter_add would use atomics
        return sums.index_put((bucket,), rows, accumulate=True)[:num_clusters]
    return sums.scatter_add(0, bucket[:, None].expand_as(rows), rows)[:num_clusters]


def _pairwise(x: Tensor, bucket: Tensor, mean: Tensor, counts: Tensor) -> Tensor:
    """For a cluster's sorted x_(r), sum_{i<j} (x_(j) - x_(i)) = sum_r (2r - n + 1) x_(r)."""
    num_clusters = counts.shape[0]
    by_value = x.argsort(dim=0, stable=True)
    by_cluster = bucket[by_value].argsort(dim=0, stable=True)
    ordered = x.gather(0, by_value.gather(0, by_cluster))
    bucket = bucket.sort().values
    row = bucket.clamp(max=num_clusters - 1)
    start = (counts.cumsum(0) - counts)[row]
    rank = torch.arange(x.shape[0], device=x.device) - start
    coefficient = (2 * rank - counts[row] + 1).to(x.dtype)
    # The coefficients of a cluster sum to 0, so taking the mean off changes only the rounding.
    half = _sum_by(coefficient[:, None] * (ordered - mean[row]), bucket, num_clusters)
    return 2 * half / (counts - 1).clamp(min=1)[:, None]


def load_balance(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    sequence: Tensor | None,
    totals: Tensor | None,
    temperature: float,
    per_assignment: bool,
    ranks: int,
) -> Tensor:
    """E sum_e f_e P_e: the shares of the assignments, the mean probabilities (or those / K).

    With sequences the mean of each one's; `totals` are those of all `ranks`, `balance_totals`.
    """
    experts, top_k = logits.shape[1], max(index.shape[1], 1)
    z = selected(logits.to(accumulate_dtype(logits.dtype)), mask)
    probability = selected((z if temperature == 1.0 else z / temperature).softmax(1), mask)
    if sequence is None and mask is None and totals is None:  # a number that the host knows
        number = torch.sym_max(logits.shape[0], 1)
        counts = _assignments(index, experts, None).to(probability.dtype)
        share = top_k * top_k if per_assignment else top_k
        return (counts * probability.sum(0)).sum() * (ranks * experts / (number * number * share))
    if sequence is None:
        totals = balance_totals(index, experts, mask, None) if totals is None else totals
        counts, tokens = totals[:-1], totals[-1]
        sequences, probability = torch.ones_like(tokens), probability.sum(0)
    else:
        place, by_sequence, length = _by_sequence(index, experts, mask, sequence)
        counts, tokens = by_sequence[place], length[place, None]
        sequences = ((length > 0).sum() if totals is None else totals[0]).clamp(min=1)
    tokens = tokens.clamp(min=1)
    f = counts.to(probability.dtype) / (tokens * top_k)
    p = probability / (tokens * top_k if per_assignment else tokens)
    return ranks * experts * (f * p).sum() / sequences


def balance_totals(
    index: Tensor, experts: int, mask: Tensor | None, sequence: Tensor | None
) -> Tensor:
    """What ranks add up: assignments by expert and the tokens, or the number of sequences."""
    if sequence is None:
        return torch.cat([_assignments(index, experts, mask), token_number(index, mask)[None]])
    _, _, length = _by_sequence(index, experts, mask, sequence)
    return (length > 0).sum()[None]


def _by_sequence(
    index: Tensor, experts: int, mask: Tensor | None, sequence: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's sequence as a number below T; assignments [T, E] and lengths [T] of those."""
    sequence = sequence.contiguous()
    place = torch.searchsorted(sequence.sort().values, sequence)  # the first of equal ones
    ones = torch.ones_like(place)
    length = torch.zeros_like(place).scatter_add(0, place, ones if mask is None else mask.long())
    ids = _counted_ids(index, experts, mask) + place[:, None] * (experts + 1)
    flat = ids.new_zeros(place.shape[0] * (experts + 1))
    counts = flat.scatter_add(0, ids.flatten(), torch.ones_like(ids).flatten())
    return place, counts.view(-1, experts + 1)[:, :experts], length


def _assignments(index: Tensor, experts: int, mask: Tensor | None) -> Tensor:
    """How many there are of each expert, [E]: integers, so that their order does not matter."""
    ids = _counted_ids(index, experts, mask).flatten()
    return ids.new_zeros(experts + 1).scatter_add(0, ids, torch.ones_like(ids))[:-1]


def _counted_ids(index: Tensor, experts: int, mask: Tensor | None) -> Tensor:
    """The ids; E for one outside [0, E), and of a token that does not count."""
    ids = index.long().clamp(-1, experts).remainder(experts + 1)  # of -1 that is E
    return ids if mask is None else ids.masked_fill(~mask[:, None], experts)


def token_number(rows: Tensor, mask: Tensor | None) -> Tensor:
    """How many rows count, int64 []."""
    if mask is not None:
        return mask.sum()
    return torch.full((), rows.shape[0], dtype=torch.int64, device=rows.device)


def router_z(logits: Tensor, mask: Tensor | None, total: Tensor | None, ranks: int) -> Tensor:
    """The mean over tokens of logsumexp(logits_t)^2; `total` is their number on all ranks."""
    z = _logsumexp(selected(logits.to(accumulate_dtype(logits.dtype)), mask))
    squares = selected(z * z, mask).sum()
    if mask is None and total is None:  # a number that the host knows
        return squares * (ranks / torch.sym_max(logits.shape[0], 1))
    number = token_number(logits, mask) if total is None else total
    return ranks * squares / number.clamp(min=1)


def _logsumexp(z: Tensor) -> Tensor:
    """[T, 1]. `torch.logsumexp` asks how many rows there are, which tracing need not know."""
    largest = z.detach().amax(1, keepdim=True)
    most = torch.finfo(z.dtype).max
    largest = largest.clamp(-most, most)  # finite
    return (z - largest).exp().sum(1, keepdim=True).log() + largest
