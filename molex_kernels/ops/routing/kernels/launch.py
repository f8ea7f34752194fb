"""The passes of the routing ops as launches. Nothing on the device is ever read here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molex_kernels._dtypes import dot_precision
from molex_kernels._triton import chips
from molex_kernels._triton.arguments import strided
from molex_kernels._triton.launch import launch, shared
from molex_kernels._triton.sizes import cdiv, next_power_of_2
from molex_kernels._triton.tuning import Config, aligned
from molex_kernels.ops.routing.kernels import config
from molex_kernels.ops.routing.kernels.choice import _choice_fwd, _router_bwd_logits
from molex_kernels.ops.routing.kernels.plan import (
    _plan_fwd_count,
    _plan_fwd_scan,
    _plan_fwd_scatter,
    _plan_fwd_whole,
)
from molex_kernels.ops.routing.kernels.router import _router_fwd
from molex_kernels.ops.routing.kernels.router_backward import (
    _router_bwd_gate,
    _router_bwd_x,
)
from molex_kernels.ops.routing.kernels.statistics import (
    _feature_weights_fwd,
    _pairwise_fwd_keys,
    _pairwise_fwd_reduce,
    _pairwise_fwd_tile,
    _statistics_fwd_part,
)

# Feature weights as table [C, D], labels [T, M] and mix [T, M]; None where absent.
Mixture = tuple[Tensor | None, Tensor | None, Tensor | None]


def router_forward(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """expert_index [T, K], expert_weight [T, K] and logits [T, E]."""
    tokens, dim = a.x.shape
    experts = a.gate.shape[0]
    index = a.x.new_empty(tokens, a.top_k, dtype=torch.int64)
    weight = a.x.new_empty(tokens, a.top_k, dtype=torch.float32)
    logits = a.x.new_empty(tokens, experts, dtype=torch.float32)
    if tokens == 0:
        return index, weight, logits
    upcast = a.table is not None or a.x.dtype != a.gate.dtype
    operands = "fp32" if a.x.dtype == torch.float32 else "upcast" if upcast else "16-bit"
    block_e = max(16, next_power_of_2(experts))
    mixture = (a.table, a.labels, a.mix)
    launch(
        _router_fwd,
        lambda b: (cdiv(tokens, b["BLOCK_T"]),),
        (
            *map(strided, (a.x, a.gate, a.gate_bias, a.expert_bias, *mixture)),
            *(index, weight, logits, _unless_one(a.scaling)),
            *(tokens, dim, experts, a.top_k, *_sizes(mixture)),
        ),
        {
            **_choosing(a),
            "PRECISION": _precision(a.x, upcast),
            "UPCAST": upcast,
            "BLOCK_E": block_e,
        },
        config.router(chips.of(a.x.device), block_e, operands),
    )
    return index, weight, logits


def router_backward(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and bias (fp32); an empty tensor for each that is not needed."""
    tokens, experts = a.logits.shape
    needs_x, needs_gate, needs_bias = a.needs
    dx = a.x.new_empty(a.x.shape if needs_x else (0,))
    dgate = a.gate.new_empty(a.gate.shape if needs_gate else (0,))
    dbias = a.logits.new_empty(experts if needs_bias else 0)
    if tokens == 0:
        return dx, dgate.zero_(), dbias.zero_()
    dz = _logits_gradient(a, a.dlogits)
    mixture = (a.table, a.labels, a.mix)
    if needs_x:
        _x_gradient(dz, a.gate, mixture, dx)
    if needs_gate:
        dgate, parts = _gate_gradient(dz, a.x, a.gate, mixture, needs_bias)
        dbias = dbias if parts is None else parts.sum(0)
    elif needs_bias:
        dbias = dz.sum(0)
    return dx, dgate, dbias


def choice_forward(a: Any) -> tuple[Tensor, Tensor]:
    """expert_index [T, K] and expert_weight [T, K] of logits [T, E]."""
    tokens, experts = a.logits.shape
    index = a.logits.new_empty(tokens, a.top_k, dtype=torch.int64)
    weight = a.logits.new_empty(tokens, a.top_k, dtype=torch.float32)
    if tokens == 0 or a.top_k == 0:
        return index, weight
    launch(
        _choice_fwd,
        lambda b: (cdiv(tokens, b["BLOCK_T"]),),
        (
            *map(strided, (a.logits, a.expert_bias, a.given)),
            *(index, weight, _unless_one(a.scaling), tokens, experts, a.top_k),
        ),
        _choosing(a),
        config.logits(chips.of(weight.device), max(16, next_power_of_2(experts))),
    )
    return index, weight


def choice_backward(a: Any) -> Tensor:
    """The gradient of the logits."""
    if a.logits.shape[0] == 0:
        return a.logits.new_empty(a.logits.shape)
    return _logits_gradient(a, None)


def route_plan_forward(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """counts, offsets, permutation, inverse of expert_index [T, K]."""
    return _plan(*a)


def _plan(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, top_k = expert_index.numel(), expert_index.shape[1]
    permutation = expert_index.new_empty(total, dtype=torch.int64)
    inverse = expert_index.new_empty(total, dtype=torch.int64)
    if total == 0:
        zeros = expert_index.new_zeros(2, num_experts, dtype=torch.int32)
        return zeros[0].clone(), zeros[1].clone(), permutation, inverse
    counts = expert_index.new_empty(num_experts, dtype=torch.int32)
    offsets = expert_index.new_empty(num_experts, dtype=torch.int32)
    # One bin for experts that are not local and one for past the end.
    block_e = max(64, next_power_of_2(num_experts + 2))
    chip = chips.of(expert_index.device)
    sizes = (total, top_k, num_experts)
    whole = config.whole(chip, total)
    if whole is not None:
        launch(
            _plan_fwd_whole,
            lambda _: (1,),
            (strided(expert_index), counts, offsets, permutation, inverse, *sizes),
            {"BLOCK_E": block_e},
            whole,
        )
        return counts, offsets, permutation, inverse

    def start(chosen: Config) -> None:
        blocks = cdiv(total, chosen.blocks["BLOCK_A"])
        histogram = expert_index.new_empty(blocks, block_e, dtype=torch.int32)
        index, shift = strided(expert_index), strided(histogram)
        fixed = (chosen, ())
        launch(
            _plan_fwd_count,
            lambda _: (blocks,),
            (index, shift, *sizes),
            {"BLOCK_E": block_e},
            fixed,
        )
        launch(
            _plan_fwd_scan,
            lambda _: (1,),
            (shift, counts, offsets, blocks, num_experts),
            {},
            (config.scan(chip, blocks, block_e), ()),
        )
        launch(
            _plan_fwd_scatter,
            lambda _: (blocks,),
            (index, shift, permutation, inverse, *sizes),
            {},
            fixed,
        )

    kernels = (_plan_fwd_count, _plan_fwd_scan, _plan_fwd_scatter)
    start(shared(kernels, (expert_index, num_experts), config.plan(chip, total), start))
    return counts, offsets, permutation, inverse


def cluster_statistics_forward(a: Any) -> tuple[Tensor, Tensor]:
    """Of each cluster's tokens, [C, D] fp32, and their number, [C] int32.

    "sum": their sum. Else sums of |x - mean| or (x - mean)^2, with mean = sums / counts, of these
    tokens where `sums` is None; "pairwise": sum_{i != j} |x_i - x_j| / (n - 1).
    """
    given = None if a.sums is None or a.counts is None else (a.sums[None], a.counts[None])
    return _added(*_statistics(a.x, a.cluster, given, a.num_clusters, a.stat))


def feature_weights_forward(a: Any) -> Tensor:
    """Feature weights W [C, D] fp32."""
    return _feature_weights(a, a.deviations[None], a.counts[None])


def cluster_weights_forward(a: Any) -> Tensor:
    """Feature weights W [C, D] fp32 of the clusters of these tokens."""
    deviations, counts = _statistics(a.x, a.cluster, None, a.num_clusters, a.stat)
    if deviations.shape[0] > 1 and deviations.numel() > config.MAX_PARTS:
        deviations, counts = (parts[None] for parts in _added(deviations, counts))
    return _feature_weights(a, deviations, counts)


def _feature_weights(a: Any, deviations: Tensor, counts: Tensor) -> Tensor:
    """By the parts [S, C, D] and [S, C] of deviations and counts."""
    parts, clusters, dim = deviations.shape
    out = deviations.new_empty(clusters, dim)
    has_clip = math.isfinite(a.clip)
    launch(
        _feature_weights_fwd,
        lambda b: (cdiv(dim, b["BLOCK_D"]),),
        (
            *(deviations, counts, out, dim, clusters, parts),
            *(a.eps, a.clip if has_clip else 0.0),
        ),
        {"NORM": a.norm, "HAS_CLIP": has_clip, "MASKED": a.mask},
        config.weights(chips.of(out.device), clusters),
    )
    return out


def _choosing(a: Any) -> dict[str, Any]:
    """The constants of a choice of experts."""
    return {
        "SCORE": a.score,
        "NUM_GROUPS": a.num_groups,
        "TOP_GROUPS": a.top_groups,
        "RENORMALIZE": a.renormalize,
        "BLOCK_K": max(8, next_power_of_2(a.top_k)),
    }


def _unless_one(scaling: float) -> float | None:
    return None if scaling == 1 else scaling


def _logits_gradient(a: Any, dlogits: Tensor | None) -> Tensor:
    tokens, experts = a.logits.shape
    dz = torch.empty_like(a.logits, memory_format=torch.contiguous_format)
    # A scaling below the normal numbers leaves weights of 0.
    inverse = 0.0 if abs(a.scaling) < torch.finfo(torch.float32).tiny else 1 / a.scaling
    launch(
        _router_bwd_logits,
        lambda b: (cdiv(tokens, b["BLOCK_T"]),),
        (
            *map(strided, (a.dweight, dlogits)),
            *(a.logits.contiguous(), a.index, a.weight, dz),
            *(_unless_one(a.scaling), _unless_one(inverse), tokens, experts, a.index.shape[1]),
        ),
        {"SCORE": a.score, "RENORMALIZE": a.renormalize},
        config.logits(chips.of(dz.device), max(16, next_power_of_2(experts))),
    )
    return dz


def _x_gradient(dz: Tensor, gate: Tensor, mixture: Mixture, dx: Tensor) -> None:
    tokens, dim = dx.shape
    launch(
        _router_bwd_x,
        lambda b: (cdiv(tokens, b["BLOCK_T"]), cdiv(dim, b["BLOCK_D"])),
        (
            *(dz, strided(gate), *map(strided, mixture), dx),
            *(tokens, dim, gate.shape[0], *_sizes(mixture)),
        ),
        {"PRECISION": _precision(dx, True)},
        config.dx(chips.of(dx.device), gate.shape[0], _in_parts(gate) and aligned(gate)),
    )


def _gate_gradient(
    dz: Tensor, x: Tensor, gate: Tensor, mixture: Mixture, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The gate's gradient, and where it is needed the bias's in parts that are yet to be summed."""
    tokens, dim = x.shape
    experts = gate.shape[0]
    in_parts = mixture[0] is None and _in_parts(x)
    options = config.dgate(chips.of(x.device), experts, in_parts)
    blocks = options[0].blocks  # of all candidates: they differ in other things
    tiles_d, tiles_e = cdiv(dim, blocks["BLOCK_D"]), cdiv(experts, blocks["BLOCK_E"])
    splits, rows = _split(tokens, tiles_d * tiles_e, 128, blocks["BLOCK_T"])
    parts = dz.new_empty(splits, experts, dim)
    bias_parts = dz.new_empty(splits, experts) if needs_bias else None
    launch(
        _router_bwd_gate,
        lambda _: (tiles_d, tiles_e, splits),
        (
            *(dz, strided(x), *map(strided, mixture), parts, bias_parts),
            *(tokens, dim, experts, rows, *_sizes(mixture)),
        ),
        {"PRECISION": _precision(x, True), "IN_PARTS": in_parts},
        options,
    )
    dgate = parts.sum(0) if splits > 1 else parts[0].clone()
    return dgate.to(gate.dtype), bias_parts


def _split(tokens: int, tiles: int, least: int, block: int) -> tuple[int, int]:
    """Parts of the tokens, of about `least` or more, and the rows of each, in whole blocks."""
    splits = min(cdiv(config.PROGRAMS, tiles), cdiv(tokens, least))
    rows = cdiv(cdiv(tokens, splits), block) * block
    return cdiv(tokens, rows), rows


def _added(*parts: Tensor) -> tuple[Tensor, ...]:
    """The sums over the parts, in a fixed order; no launch where there is one."""
    return tuple(p.sum(0, dtype=p.dtype) if p.shape[0] > 1 else p.squeeze(0) for p in parts)


def _statistics(
    x: Tensor, cluster: Tensor, means: tuple[Tensor, Tensor] | None, clusters: int, stat: str
) -> tuple[Tensor, Tensor]:
    """Parts of the sums or deviations, [S, C, D] fp32, and of the counts, [S, C] int32.

    means: parts of the sums and counts of the tokens from whose means the deviations are.
    """
    if means is not None and stat != "pairwise":
        return _parts(x, cluster, means, clusters, stat, True)
    sums, counts = _parts(x, cluster, None, clusters, "sum", True)
    if stat == "sum":
        return sums, counts
    if stat == "pairwise":
        total, size = _added(sums, counts)
        return _pairwise(x, cluster, total, size)[None], size[None]
    return _parts(x, cluster, (sums, counts), clusters, stat, False)[0], counts


def _parts(
    x: Tensor,
    cluster: Tensor,
    means: tuple[Tensor, Tensor] | None,
    clusters: int,
    stat: str,
    needs_counts: bool,
) -> tuple[Tensor, Tensor]:
    """One launch of `_statistics`; without `needs_counts` the second result is empty."""
    tokens, dim = x.shape
    if tokens == 0:
        zeros = x.new_zeros(1, clusters, dim, dtype=torch.float32)
        return zeros, x.new_zeros(1, clusters, dtype=torch.int32)
    is_fp32 = x.dtype == torch.float32
    options = config.statistics(chips.of(x.device), clusters, is_fp32, aligned(x))
    blocks = options[0].blocks  # of all candidates: they differ in other things
    tiles_d, tiles_c = cdiv(dim, blocks["BLOCK_D"]), cdiv(clusters, blocks["BLOCK_C"])
    splits, rows = _split(tokens, tiles_d * tiles_c, 512, blocks["BLOCK_T"])
    partial = x.new_empty(splits, clusters, dim, dtype=torch.float32)
    counts = x.new_empty(splits if needs_counts else 0, clusters, dtype=torch.int32)
    launch(
        _statistics_fwd_part,
        lambda _: (tiles_d, tiles_c, splits),
        (
            *(strided(x), strided(cluster), *(means or (None, None))),
            *(partial, counts if needs_counts else None),
            *(tokens, dim, clusters, rows, means[0].shape[0] if means else 0),
        ),
        # These are sums, whatever is allowed of products.
        {"STAT": stat, "PRECISION": _precise(x)},
        options,
    )
    return partial, counts


def _pairwise(x: Tensor, cluster: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    tokens, dim = x.shape
    clusters = counts.shape[0]
    out = x.new_empty(clusters, dim, dtype=torch.float32)
    if tokens == 0:
        return out.zero_()
    chip = chips.of(x.device)
    offsets = counts.cumsum(0, dtype=torch.int32)
    keys = x.new_empty(dim, tokens, dtype=torch.int64)
    launch(
        _pairwise_fwd_keys,
        lambda b: (cdiv(tokens, b["BLOCK_T"]), cdiv(dim, b["BLOCK_D"])),
        (strided(x), strided(cluster), keys, tokens, dim, clusters),
        {},
        config.keys(chip),
    )
    keys = torch.sort(keys, dim=1).values
    # A partial sum for each tile of a cluster's ranks, and then their sums.
    block_c = {"BLOCK_C": config.block_c(clusters)}
    partial = out

    def tiles(blocks: Mapping[str, int]) -> int:
        return cdiv(tokens, blocks["BLOCK_T"]) + clusters

    def arguments(blocks: Mapping[str, int]) -> tuple[Any, ...]:
        nonlocal partial
        partial = out.new_empty(tiles(blocks), dim)
        return keys, offsets, sums, counts, partial, tokens, dim, clusters

    chosen = launch(
        _pairwise_fwd_tile,
        lambda b: (tiles(b), cdiv(dim, b["BLOCK_D"])),
        arguments,
        block_c,
        config.ranks(chip),
    )
    launch(
        _pairwise_fwd_reduce,
        lambda b: (clusters, cdiv(dim, b["BLOCK_D"])),
        (partial, offsets, counts, out, dim, clusters),
        {"ROWS": chosen.blocks["BLOCK_T"], **block_c},
        config.reduce(chip),
    )
    return out


def _precision(x: Tensor, upcast: bool) -> str:
    """How `tl.dot` multiplies fp32: as three tf32 products where the inputs were 16-bit."""
    return _precise(x) if upcast and x.dtype != torch.float32 else dot_precision(x.dtype)


def _in_parts(x: Tensor) -> bool:
    """Whether `dot_parts` multiplies the parts of fp32 by this tensor."""
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and _precise(x) == "tf32x3")


def _precise(x: Tensor) -> str:
    return "ieee" if chips.of(x.device).is_amd else "tf32x3"


def _sizes(mixture: Mixture) -> tuple[int, int]:
    """Labels per token and clusters."""
    table, labels, _ = mixture
    return (0 if labels is None else labels.shape[1], 0 if table is None else table.shape[0])
