"""Routers and the plan: which experts take which tokens, with which weight, in which order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from molex_kernels import _backends, _check, _dtypes
from molex_kernels._dtypes import FLOAT_DTYPES, accumulate_dtype
from molex_kernels.ops.routing import choice, clusters, op, reference
from molex_kernels.ops.routing.recipes import resolve
from molex_kernels.ops.routing.types import RoutePlan, Routing

for _name in ("topk_route", "ac_weights", "ac_route", "route_plan"):
    _backends.declare(_name, _backends.TRITON, _backends.CPU, _backends.REFERENCE)
_MAX_ASSIGNMENTS = 2**31 - 1  # the plan's offsets are int32


def topk_route(
    x: Tensor,
    gate_weight: Tensor,
    *,
    top_k: int,
    gate_bias: Tensor | None = None,
    score: str = "softmax_topk",
    expert_bias: Tensor | None = None,
    num_groups: int | None = None,
    top_groups: int | None = None,
    renormalize: bool = False,
    scaling: float = 1.0,
    impl: str | None = None,
) -> Routing:
    """Routes each token to the K experts with the largest logits.

        z_te = sum_q x_tq gate_eq + b_e
        i_t1 ... i_tK: the K largest keys, descending; ties to the lower expert
        key = z, or with expert_bias: z + bias (softmax_topk), score + bias (the others)
        s_tk = softmax over the K chosen logits     score="softmax_topk" (FastMoE, Mixtral)
             = softmax over all E logits, at i_tk   score="softmax" (Switch)
             = sigmoid(z) at i_tk                   score="sigmoid" (DeepSeek-V3)
             = z at i_tk                            score="logits"
             = sqrt(softplus(z)) at i_tk            score="sqrtsoftplus"
        weight_tk = scaling s_tk, or with renormalize: scaling s_tk / sum_m s_tm

    With groups (DeepSeek-V3, arXiv 2412.19437) the experts stand in `num_groups` equal, consecutive
    ones, and only experts of `top_groups` of them may be chosen: of those with the largest sum of
    their two best keys, ties to the lower group. A group of one expert has that one's key. DeepSeek
    sets the keys of other groups to 0, so that a negative key may lose to them; here they are out.

    The sum of "logits" is taken as it is: of either sign, and where it is 0 the weights are not
    finite. Other scores are above 0. Softplus is at least the smallest normal number, whose square
    root has a finite slope.

    NaN and -inf keys count as the lowest finite number, so indices are always distinct and in
    range; the weights and logits keep the NaN.

    Logits and scores are computed in fp32 (fp64 for fp64 input), also under autocast, where each
    argument may be fp16, bf16 or fp32, whatever the others are. The published routers select with
    `sorted=False`, in which the order of the K experts is undefined.

    Args:
        x: tokens [T, D].
        gate_weight: [E, D], of x's dtype or fp32.
        top_k: K, from 1 to E; with groups at most E top_groups / num_groups.
        gate_bias: [E], of x's dtype or fp32.
        score: "softmax_topk" (default), "softmax", "sigmoid", "logits" or "sqrtsoftplus".
        expert_bias: [E], of x's dtype or fp32: added to the key alone (balancing without a loss);
            it receives no gradient.
        num_groups: a divisor of E; None, with top_groups None, is no groups.
        top_groups: from 1 to num_groups.
        renormalize: divide the weights by their sum over the chosen experts.
        scaling: finite; multiplies the weights, after that.
        impl: None (the fastest that runs), "triton" (E <= 1024, K <= 64), "cpu" or "reference".

    Returns:
        Routing(expert_index [T, K] int64, expert_weight [T, K] fp32, logits [T, E] fp32).
        Differentiable in x, gate_weight and gate_bias through weights and logits; a second time
        with impl="reference" alone. Deterministic, no host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: an explicit `impl` that cannot run, with every reason.
    """
    gate_weight, gate_bias, expert_bias = _dtypes.kept(x, gate_weight, gate_bias, expert_bias)
    _check_router(x, gate_weight, gate_bias, top_k)
    _vector_of_experts("expert_bias", expert_bias, x, gate_weight)
    experts = gate_weight.shape[0]
    options = choice.resolve(experts, top_k, score, num_groups, top_groups, renormalize, scaling)
    chosen = _backends.select("topk_route", impl, x, triton=choice.why_not_triton(experts, top_k))
    arguments = (x, gate_weight, gate_bias, expert_bias, None, None, None, *options)
    if chosen == "reference":
        return reference.route(*arguments)
    return Routing(*op.route(impl, *arguments))


def ac_weights(
    x: Tensor,
    cluster: Tensor,
    num_clusters: int,
    *,
    recipe: str = "lm",
    stat: str | None = None,
    eps: float | None = None,
    clip: float | None = None,
    norm: str | None = None,
    empty: str = "mask",
    impl: str | None = None,
) -> Tensor:
    """Adaptive-clustering feature weights (ACMoE, arXiv 2502.15315): large in tight clusters.

    With the n tokens i, j of cluster c and its mean m_c:

        s_cq = mean_i |x_iq - m_cq|                      stat="mad"
             = mean_i (x_iq - m_cq)^2                    stat="variance"
             = sum_{i != j} |x_iq - x_jq| / (n (n - 1))  stat="pairwise", exact, by sorting
        W = 1 / (s + eps);  W = min(W, clip * mean W);  W = W / norm

    norm: "feature_post" divides by each feature's mean over clusters after the clip, "global_pre"
    by the mean of all entries before the clip, "global_post" by that after it, "none" by 1.

        recipe     eps    clip   norm            (stat="mad", the default; the published backbones)
        "lm"       1e-4   10     "feature_post"
        "swin"     1e-4   1.5    "global_pre"
        "softmoe"  0.35   5      "global_post"

    With any recipe, variance defaults to eps 0.1 and pairwise to eps 1e-4, without clip or norm.
    Explicit arguments win; `clip=float("inf")` is no clip.

    The published code takes a cluster without tokens as s = 0, so its W of 1/eps takes over the
    means (`empty="published"`). `empty="mask"`, the default, gives such a cluster weight 1 and
    leaves it out of the means. A cluster of one token, or of equal ones, has s = 0 and W = 1/eps in
    both. The published variance is E[x^2] - E[x]^2, which cancels; here it takes two passes. The
    published number of clusters is the largest id in use plus one, a host read; here it is given.

    Args:
        x: tokens [T, D].
        cluster: [T] int64 or int32; tokens with an id outside [0, C) take no part.
        num_clusters: C, at least 1.
        recipe: "lm", "swin" or "softmoe", as above.
        stat: "mad", "variance" or "pairwise", as above; None means the recipe's.
        eps: above 0; None means the recipe's.
        clip: above 0; None means the recipe's.
        norm: "feature_post", "global_pre", "global_post" or "none", as above; None means the
            recipe's.
        empty: "mask" or "published".
        impl: None, "triton" (C <= 1024), "cpu" or "reference".

    Returns:
        W [C, D] fp32 (fp64 for fp64 input), without gradient. Deterministic, no host
        synchronisation; pairwise takes O(T log T) time per feature and O(T D) memory.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: an explicit `impl` that cannot run, with every reason.
    """
    _check.floating("x", x, "T, D", (None, None))
    _has_features("x", x)
    _check.index("cluster", cluster, "T", (x.shape[0],), x)
    _check.integer("num_clusters", num_clusters, 1)
    settings = resolve(recipe, stat, eps, clip, norm, empty)
    chosen = _backends.select("ac_weights", impl, x, triton=clusters.why_not_triton(num_clusters))
    named = chosen if chosen == "reference" else impl
    return clusters.compute(x, cluster, num_clusters, settings, None, named)


def ac_route(
    x: Tensor,
    gate_weight: Tensor,
    prev_index: Tensor,
    prev_weight: Tensor | None = None,
    *,
    top_k: int,
    gate_bias: Tensor | None = None,
    cosine: bool = False,
    mix: bool = False,
    stats_from: Tensor | None = None,
    recipe: str = "lm",
    stat: str | None = None,
    eps: float | None = None,
    clip: float | None = None,
    norm: str | None = None,
    empty: str = "mask",
    process_group: ProcessGroup | None = None,
    impl: str | None = None,
) -> Routing:
    """Adaptive-clustering router (ACMoE, arXiv 2502.15315): previous experts are the clusters.

        W = ac_weights(stats_from or x, cluster = prev_index[:, 0], num_clusters = E)
        w_t = W[prev_index_t0]                               or with mix:
        w_t = sum_m prev_weight_tm W[prev_index_tm]
        z_te = sum_q w_tq x_tq g_eq + b_e;   g = gate_weight, or its rows normalised (cosine)
        the K largest logits, descending, ties to the lower expert; softmax over those K

    "triton" and "cpu" form the rows w_t inside the matrix product: no [T, D] tensor of them exists.
    The weight of a label outside [0, E) is 1. The experts are meant to receive the plain x, as in
    the published language models; the published Swin gives them w * x. Differences from the
    published code: C is the largest previous id plus one there (a host read), E here; the cosine
    gate's rows are rescaled in place at each forward pass there (see `ACRouter.renormalize_`); its
    cosine gate replaces non-finite logits by the least finite one, here only the selection does.

    Args:
        x: tokens [T, D].
        gate_weight: [E, D], of x's dtype or fp32.
        prev_index: [T, K'] int64 or int32, the previous layer's `expert_index`, best first.
        prev_weight: [T, K'], floating, the previous layer's `expert_weight`; needed by `mix`.
        top_k: K, from 1 to E.
        gate_bias: [E], of x's dtype or fp32; not with `cosine`.
        cosine: normalise the gate's rows, with norms of at least 1e-4; differentiable.
        mix: mix the weights of all K' previous experts.
        stats_from: [T, D], of x's dtype or fp32: tokens for the statistics in place of x.
        recipe: as in `ac_weights`.
        stat: as in `ac_weights`.
        eps: as in `ac_weights`.
        clip: as in `ac_weights`.
        norm: as in `ac_weights`.
        empty: as in `ac_weights`.
        process_group: sums the statistics over the ranks of this `torch.distributed` group, so that
            all route by the clusters of all their tokens; every rank must call. Not for "pairwise",
            and outside what `torch.compile` traces.
        impl: None, "triton" (E <= 1024, K <= 64), "cpu" or "reference".

    Returns:
        Routing, as `topk_route`. Differentiable in x, gate_weight and gate_bias with W constant: no
        gradient reaches stats_from, prev_weight or x through W. A second time with impl="reference"
        alone. Deterministic, no host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: an explicit `impl` that cannot run, or "pairwise" over a group.
    """
    gate_weight, gate_bias, stats_from = _dtypes.kept(x, gate_weight, gate_bias, stats_from)
    _check_router(x, gate_weight, gate_bias, top_k)
    _check.flags(cosine=cosine, mix=mix)
    tokens, dim = x.shape
    experts = gate_weight.shape[0]
    _check.index("prev_index", prev_index, "T, K'", (tokens, None), x)
    if prev_index.shape[1] == 0:
        raise ValueError("prev_index: expected at least one column, got shape [T, 0]")
    if prev_weight is not None:
        _check.tensor("prev_weight", prev_weight, "T, K'", prev_index.shape, FLOAT_DTYPES, x)
    elif mix:
        raise ValueError("prev_weight: expected a tensor [T, K'] with mix=True, got None")
    if cosine and gate_bias is not None:
        raise ValueError("gate_bias: expected None with cosine=True, got a tensor")
    if stats_from is not None:
        _check.tensor("stats_from", stats_from, "T, D", (tokens, dim), _like_or_fp32(x), x)
    settings = resolve(recipe, stat, eps, clip, norm, empty)
    clusters.check_group(process_group, settings.stat)
    chosen = _backends.select("ac_route", impl, x, triton=choice.why_not_triton(experts, top_k))
    table = clusters.compute(
        x if stats_from is None else stats_from,
        prev_index[:, 0],
        experts,
        settings,
        process_group,
        chosen if chosen == "reference" else impl,
    )
    gate = normalized_gate(gate_weight) if cosine else gate_weight
    labels = prev_index if mix else prev_index[:, :1]
    mixture = prev_weight.detach().to(table.dtype) if mix and prev_weight is not None else None
    arguments = (x, gate, gate_bias, None, table, labels, mixture, *choice.Choice(top_k))
    if chosen == "reference":
        return reference.route(*arguments)
    return Routing(*op.route(impl, *arguments))


def route_plan(expert_index: Tensor, num_experts: int, *, impl: str | None = None) -> RoutePlan:
    """Groups the T*K assignments by expert: made once, shared by the ops that need it.

        counts_e = |{(t, k): expert_index_tk = e}|;  offsets = inclusive cumulative sum of counts
        permutation: the assignments t * K + k sorted by expert; stable
        inverse[permutation[row]] = row

    An id outside [0, E) is no local expert (expert parallelism): such assignments come last.

    Args:
        expert_index: [T, K] int64 or int32, T * K below 2^31.
        num_experts: E, at least 1.
        impl: None, "triton" (E <= 1024), "cpu" or "reference".

    Returns:
        RoutePlan(counts [E] int32, offsets [E] int32, permutation [T*K] and inverse [T*K] int64).
        Not differentiable. Deterministic, no host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: an explicit `impl` that cannot run, with every reason.
    """
    _check.index("expert_index", expert_index, "T, K", (None, None))
    _check.integer("num_experts", num_experts, 1)
    if expert_index.numel() > _MAX_ASSIGNMENTS:
        raise ValueError(
            f"expert_index: expected T * K at most {_MAX_ASSIGNMENTS}, got {expert_index.numel()}"
        )
    limit = choice.why_not_experts(num_experts)
    if _backends.select("route_plan", impl, expert_index, triton=limit) == "reference":
        return reference.route_plan(expert_index, num_experts)
    return RoutePlan(*op.plan(impl, expert_index, num_experts))


def normalized_gate(gate_weight: Tensor) -> Tensor:
    """The rows of the gate divided by their norms (at least 1e-4), in fp32; differentiable."""
    return F.normalize(gate_weight.to(accumulate_dtype(gate_weight.dtype)), dim=1, eps=1e-4)


def _check_router(x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, top_k: int) -> None:
    _check.floating("x", x, "T, D", (None, None))
    _has_features("x", x)
    _check.tensor("gate_weight", gate_weight, "E, D", (None, x.shape[1]), _like_or_fp32(x), x)
    if gate_weight.shape[0] == 0:
        raise ValueError("gate_weight: expected at least one expert, got shape [0, D]")
    _vector_of_experts("gate_bias", gate_bias, x, gate_weight)
    _check.integer("top_k", top_k, 1, gate_weight.shape[0], of=" experts")


def _vector_of_experts(name: str, value: Tensor | None, x: Tensor, gate_weight: Tensor) -> None:
    if value is not None:
        _check.tensor(name, value, "E", (gate_weight.shape[0],), _like_or_fp32(x), x)


def _has_features(name: str, x: Tensor) -> None:
    if x.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one feature, got shape {list(x.shape)}")


def _like_or_fp32(x: Tensor) -> tuple[torch.dtype, ...]:
    return (x.dtype,) if x.dtype == torch.float32 else (x.dtype, torch.float32)
