"""What tests and benchmarks need to know of the routing ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molex_kernels.ops.routing import reference
from molex_kernels.ops.routing.api import ac_route, ac_weights, route_plan, topk_route
from molex_kernels.ops.routing.choice import route_from_index, route_from_logits
from molex_kernels.ops.routing.losses import load_balance_loss, router_z_loss
from molex_kernels.ops.routing.recipes import STATS
from molex_kernels.ops.routing.types import RoutePlan, Routing
from molex_kernels.testing.baselines import routing as baselines
from molex_kernels.testing.opinfo import Case, Cost, Draw, Inputs, OpInfo, Sweep

# Keys around the choice of a token differ by this share of the largest: no dtype chooses otherwise.
MARGIN = 1e-3
CHOICE = ("score", "num_groups", "top_groups", "renormalize", "scaling")
STATISTICS = ("recipe", "stat", "eps", "clip", "norm", "empty")


def _labels(draw: Draw, tokens: int, experts: int, top_k: int, how: str) -> Tensor:
    """Distinct experts per token; `how` they spread."""
    keys = draw.normal(tokens, experts, dtype=torch.float32)
    if how == "one":
        keys[:, -1] = torch.inf
    if how == "empty":
        keys[:, 1::3] = -torch.inf
    index = keys.topk(top_k, dim=1).indices
    if how == "elsewhere":
        index = index + torch.where(keys[:, :top_k] > 0.5, experts, 0)
        index[::5, 0] = -1
    return index


def _clear_choice(key: Tensor, top_k: int) -> Tensor:
    """[T]: whether each of the K largest keys is clearly above the next one."""
    ordered = key.sort(dim=1, descending=True).values[:, : top_k + 1]
    if ordered.shape[1] < 2:
        return torch.ones(key.shape[0], dtype=torch.bool, device=key.device)
    gap = (ordered[:, :-1] - ordered[:, 1:]).amin(1)
    return gap > MARGIN * key.abs().amax(1)


def _clear_groups(key: Tensor, num_groups: int, top_groups: int) -> tuple[Tensor, Tensor]:
    """[T]: whether the choice of groups is clear; the keys with others' below all."""
    clear = _clear_choice(reference.group_keys(key, num_groups), top_groups)
    allowed = reference.in_groups(key, num_groups, top_groups)
    return clear, torch.where(allowed, key, key.amin() - 1)


def _draw_until_clear(
    inputs: Inputs, draw: Draw, key: Callable[[Inputs], Tensor], drawn: str = "x"
) -> None:
    """Draws tokens anew until every choice is clear in fp64."""
    x = inputs[drawn]
    while draw.generator is not None and x.shape[0]:
        doubles = {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        keys = key(doubles)
        unclear = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        if "num_groups" in inputs:
            clear, keys = _clear_groups(keys, inputs["num_groups"], inputs["top_groups"])
            unclear = ~clear
        unclear = unclear | ~_clear_choice(keys, inputs["top_k"])
        if not unclear.any():
            return
        x[unclear] = draw.normal(int(unclear.sum()), x.shape[1])


def _gate(case: Case, draw: Draw) -> Inputs:
    dim, experts, top_k = (case.sizes[name] for name in "DEK")
    dtype = torch.float32 if case.options.get("fp32_gate") else draw.dtype
    inputs: Inputs = {
        "gate_weight": draw.normal(experts, dim, scale=dim**-0.5, dtype=dtype),
        "top_k": top_k,
    }
    if case.options.get("bias"):
        inputs["gate_bias"] = draw.normal(experts, scale=0.5)
    return inputs


def _make_topk_route(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    inputs = {"x": draw.normal(case.sizes["T"], case.sizes["D"]), **_gate(case, draw)}
    inputs.update((k, v) for k, v in case.options.items() if k in CHOICE)
    score = case.options.get("score", "softmax_topk")
    if case.options.get("expert_bias"):
        inputs["expert_bias"] = draw.normal(case.sizes["E"], scale=0.3)

    def key(doubles: Inputs) -> Tensor:
        logits = topk_route(**doubles, impl="reference").logits
        return reference.selection_key(logits, doubles.get("expert_bias"), score)

    _draw_until_clear(inputs, draw, key)
    return inputs


def _make_from_logits(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    tokens, experts, top_k = (case.sizes[name] for name in "TEK")
    inputs: Inputs = {"logits": draw.normal(tokens, experts), "top_k": top_k}
    inputs.update((k, v) for k, v in case.options.items() if k in CHOICE)
    if case.options.get("expert_bias"):
        inputs["expert_bias"] = draw.normal(experts, scale=0.3)
    score = case.options.get("score", "softmax_topk")

    def key(doubles: Inputs) -> Tensor:
        # Refuses more experts than there are, whose choice would never be clear.
        logits = route_from_logits(**doubles, impl="reference").logits
        return reference.selection_key(logits, doubles.get("expert_bias"), score)

    _draw_until_clear(inputs, draw, key, "logits")
    return inputs


def _make_from_index(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    tokens, experts, top_k = (case.sizes[name] for name in "TEK")
    return {
        "logits": draw.normal(tokens, experts),
        "expert_index": _labels(draw, tokens, experts, top_k, case.options.get("clusters", "")),
        **{k: v for k, v in case.options.items() if k in CHOICE},
    }


def _make_ac_weights(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    tokens, dim, clusters = (case.sizes[name] for name in "TDC")
    return {
        "x": draw.normal(tokens, dim) + draw.normal(dim),
        "cluster": _labels(draw, tokens, clusters, 1, case.options.get("clusters", ""))[:, 0],
        "num_clusters": clusters,
        **{k: v for k, v in case.options.items() if k in STATISTICS},
    }


def _make_ac_route(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    tokens, dim, experts = (case.sizes[name] for name in "TDE")
    options = case.options
    previous = case.sizes.get("M", 2)
    inputs: Inputs = {
        "x": draw.normal(tokens, dim),
        **_gate(case, draw),
        "prev_index": _labels(draw, tokens, experts, previous, options.get("clusters", "")),
        **{k: v for k, v in options.items() if k in (*STATISTICS, "cosine", "mix")},
    }
    if options.get("mix"):
        inputs["prev_weight"] = draw.normal(tokens, previous, dtype=torch.float32).softmax(1)
    if options.get("stats_from"):
        inputs["stats_from"] = draw.normal(tokens, dim)
    _draw_until_clear(inputs, draw, lambda doubles: ac_route(**doubles, impl="reference").logits)
    return inputs


def _left_out_of_weights(inputs: Inputs) -> dict[str, Tensor]:
    """Tokens of no cluster."""
    cluster, num_clusters = inputs["cluster"], inputs["num_clusters"]
    return {"x": ((cluster < 0) | (cluster >= num_clusters))[:, None]}


def _left_out_of_ac_route(inputs: Inputs) -> dict[str, Tensor]:
    """Tokens of no cluster, where they are for the statistics alone."""
    clusters = {"cluster": inputs["prev_index"][:, 0], "num_clusters": len(inputs["gate_weight"])}
    return {"stats_from": _left_out_of_weights(clusters)["x"]}


def _left_out_of_loss(inputs: Inputs) -> dict[str, Tensor]:
    """Tokens that the mask does not count."""
    masked = ~inputs["mask"]
    left = {"logits": masked[:, None], "expert_index": masked[:, None], "sequence": masked}
    return {name: mask for name, mask in left.items() if name in inputs}


def _make_route_plan(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    tokens, experts, top_k = (case.sizes[name] for name in "TEK")
    index = _labels(
        Draw(dtype, device, generator), tokens, experts, top_k, case.options.get("clusters", "")
    )
    return {
        "expert_index": index.int() if case.options.get("int32") else index,
        "num_experts": experts,
    }


def _make_load_balance(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    tokens, experts, top_k = (case.sizes[name] for name in "TEK")
    return {
        "expert_index": _labels(draw, tokens, experts, top_k, case.options.get("clusters", "")),
        "logits": draw.normal(tokens, experts),
        **{k: v for k, v in case.options.items() if k in ("temperature", "kind")},
        **_mask(case, draw),
        **_sequence(case, draw),
    }


def _make_z_loss(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    return {"logits": draw.normal(case.sizes["T"], case.sizes["E"]), **_mask(case, draw)}


def _mask(case: Case, draw: Draw) -> Inputs:
    """Two tokens of three, where the case wants a mask; or none at all."""
    if "mask" not in case.options:
        return {}
    counted = draw.normal(case.sizes["T"], dtype=torch.float32) < 0.4
    counted[:1] = False
    return {"mask": counted & (case.options["mask"] != "none")}


def _sequence(case: Case, draw: Draw) -> Inputs:
    """Four sequences with ids of any size: in order as packed ones are, or mixed."""
    if "sequence" not in case.options:
        return {}
    own = draw.integers(4, case.sizes["T"])
    ids = torch.tensor([7, -1, 2**40, 0], device=draw.device)
    return {"sequence": ids[own.sort().values if case.options["sequence"] == "packed" else own]}


def _load_balance(
    expert_index: Tensor,
    logits: Tensor,
    **options: Any,
) -> Tensor:
    """`load_balance_loss` with the routing's tensors as arguments of their own."""
    routing = Routing(expert_index, logits.new_zeros(expert_index.shape), logits)
    return load_balance_loss(routing, **options)


def _routing_results(routing: Routing) -> dict[str, Tensor]:
    return routing._asdict()


def _plan_results(plan: RoutePlan) -> dict[str, Tensor]:
    return plan._asdict()


def _cost_route(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    tokens, dim, experts, top_k = (case.sizes[name] for name in "TDEK")
    operands = (tokens + experts) * dim * dtype.itemsize
    outputs = tokens * (12 * top_k + 4 * experts)
    # Backward reads the operands and the saved outputs, and writes gradients of the operands.
    passes = 3 if backward else 1
    size = passes * operands + (2 if backward else 1) * outputs
    return Cost(size, passes * 2 * tokens * dim * experts)


def _cost_ac_weights(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    tokens, dim = case.sizes["T"], case.sizes["D"]
    clusters = case.sizes.get("C", case.sizes.get("E", 0))
    # The deviations need the means first, so the tokens are read twice.
    return Cost(
        2 * tokens * dim * dtype.itemsize + 8 * tokens + 4 * clusters * dim, 4 * tokens * dim
    )


def _cost_ac_route(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    statistics, router = _cost_ac_weights(case, dtype, False), _cost_route(case, dtype, backward)
    return Cost(statistics.bytes + router.bytes, statistics.flops + router.flops)


def _cost_route_plan(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    return Cost(24 * case.sizes["T"] * case.sizes["K"] + 8 * case.sizes["E"], 0)


def _cost_loss(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    tokens, experts = case.sizes["T"], case.sizes["E"]
    size = tokens * (experts * dtype.itemsize + 8 * case.sizes.get("K", 0))
    return Cost(3 * size if backward else size, (8 if backward else 4) * tokens * experts)


def _route(t: int, d: int, e: int, k: int, note: str = "", **options: Any) -> Case:
    return Case({"T": t, "D": d, "E": e, "K": k}, options, note)


def _mixed(t: int, d: int, e: int, k: int, m: int, **options: Any) -> Case:
    return Case({"T": t, "D": d, "E": e, "K": k, "M": m}, {"mix": True, **options})


def _weights(t: int, d: int, c: int, **options: Any) -> Case:
    return Case({"T": t, "D": d, "C": c}, options)


def _plan(t: int, e: int, k: int, **options: Any) -> Case:
    return Case({"T": t, "E": e, "K": k}, options)


V3: dict[str, Any] = {"num_groups": 4, "top_groups": 2, "renormalize": True, "scaling": 2.5}
GROUPS_OF_ONE: dict[str, Any] = {"num_groups": 16, "top_groups": 8}

OPINFOS = (
    OpInfo(
        name="topk_route",
        function=topk_route,
        make=_make_topk_route,
        results=_routing_results,
        differentiable=("x", "gate_weight", "gate_bias"),
        tests=(
            _route(37, 44, 5, 2, bias=True),
            _route(17, 65, 16, 3, score="sigmoid", expert_bias=True, bias=True, **V3),
            _route(0, 17, 5, 2, bias=True),
            _route(37, 17, 5, 5, score="softmax", expert_bias=True),
            _route(1, 44, 16, 1, score="softmax", bias=True),
            _route(37, 65, 33, 2, fp32_gate=True, num_groups=11, top_groups=2),
            _route(17, 17, 1, 1),
            _route(17, 17, 5, 2, score="sigmoid"),
            _route(17, 17, 5, 2, score="softmax", expert_bias=True, renormalize=True),
            _route(17, 17, 6, 2, score="sqrtsoftplus", expert_bias=True, scaling=-0.5, bias=True),
            _route(17, 17, 5, 2, score="sqrtsoftplus", renormalize=True, scaling=1.5),
            _route(17, 17, 5, 2, score="logits", scaling=2.0),
            _route(17, 17, 16, 3, score="logits", renormalize=True, **GROUPS_OF_ONE),
        ),
        large=(
            _route(1300, 300, 17, 2, bias=True, score="softmax", expert_bias=True),
            _route(500, 2048, 16, 2),
        ),
        benchmarks=(
            _route(6144, 352, 16, 2),
            _route(25088, 384, 16, 2),
            _route(25216, 192, 128, 2),
            _route(32768, 2048, 128, 8, "qwen3"),
            _route(32768, 2048, 64, 8, "olmoe"),
        ),
        quick=(_route(6144, 352, 16, 2),),
        cost=_cost_route,
        baselines={"library": baselines.library_topk_route},
        compiled=(
            *(_route(64, 64, e, 8) for e in (16, 64, 128, 256, 512, 1024)),
            _route(64, 64, 1024, 16, score="softmax", expert_bias=True, bias=True),
        ),
        sweeps=(
            Sweep("T", tuple(_route(t, 2048, 128, 8) for t in (2048, 8192, 32768, 131072))),
            Sweep("E", tuple(_route(32768, 1024, e, 8) for e in (16, 64, 256))),
        ),
        quick_sweeps=(
            Sweep("T", tuple(_route(t, 352, 16, 2) for t in (1024, 2048, 4096, 8192))),
            Sweep("E", tuple(_route(4096, 128, e, 2) for e in (8, 16, 32, 64))),
        ),
    ),
    OpInfo(
        name="route_from_logits",
        function=route_from_logits,
        make=_make_from_logits,
        results=_routing_results,
        differentiable=("logits",),
        tests=(
            _plan(17, 16, 3, score="sigmoid", expert_bias=True, **V3),
            _plan(0, 5, 2),
            _plan(37, 5, 2),
        ),
        benchmarks=(_plan(32768, 128, 8),),
        quick=(_plan(6144, 16, 2),),
        cost=_cost_loss,
        baselines={"library": baselines.library_route_from_logits},
    ),
    OpInfo(
        name="route_from_index",
        function=route_from_index,
        make=_make_from_index,
        results=_routing_results,
        differentiable=("logits",),
        tests=(
            _plan(37, 5, 2, clusters="elsewhere"),
            _plan(0, 5, 2),
            _plan(17, 16, 3, score="sigmoid", clusters="elsewhere", renormalize=True, scaling=2.5),
        ),
        benchmarks=(_plan(32768, 128, 8),),
        quick=(_plan(6144, 16, 2),),
        cost=_cost_loss,
        baselines={"library": baselines.library_route_from_index},
    ),
    OpInfo(
        name="ac_route",
        function=ac_route,
        make=_make_ac_route,
        results=_routing_results,
        differentiable=("x", "gate_weight", "gate_bias"),
        tests=(
            _route(37, 44, 5, 2, stats_from=True, bias=True),
            _mixed(17, 65, 16, 3, 2, stats_from=True, cosine=True, clusters="elsewhere"),
            _route(0, 17, 5, 2, stats_from=True, cosine=True),
            _route(37, 17, 5, 2, stats_from=True, recipe="swin", clusters="one"),
            _mixed(37, 44, 16, 1, 8, stats_from=True, recipe="softmoe", clusters="empty"),
            _route(37, 44, 16, 2, stats_from=True, stat="variance", empty="published", bias=True),
            _route(17, 17, 5, 2, stats_from=True, stat="pairwise", eps=0.1, cosine=True),
        ),
        large=(
            _mixed(1300, 300, 17, 2, 2, stats_from=True, cosine=True),
            _route(1300, 300, 17, 2, stats_from=True, stat="variance", clusters="elsewhere"),
        ),
        benchmarks=(
            _route(6144, 352, 16, 2, cosine=True),
            _route(25088, 384, 16, 2, recipe="swin"),
            _mixed(25216, 192, 128, 2, 8, recipe="softmoe"),
            _route(3072, 128, 16, 2, stat="pairwise", cosine=True),
            _route(6144, 352, 16, 2, stat="pairwise", cosine=True),
        ),
        quick=(_route(6144, 352, 16, 2, cosine=True), _route(8192, 1024, 64, 2)),
        cost=_cost_ac_route,
        baselines={
            "published": baselines.published_ac_route,
            "library": baselines.library_ac_route,
        },
        left_out=_left_out_of_ac_route,
        masked=tuple(
            _mixed(12, 6, 4, 2, 2, stats_from=True, stat=stat, clusters="elsewhere")
            for stat in STATS
        ),
        compiled=tuple(_mixed(64, 64, e, 2, 8, cosine=True) for e in (16, 64, 128, 256, 512, 1024)),
        sweeps=(
            Sweep("T", tuple(_route(t, 352, 16, 2, cosine=True) for t in (4096, 16384, 65536))),
        ),
        quick_sweeps=(
            Sweep("T", tuple(_route(t, 352, 16, 2, cosine=True) for t in (1024, 2048, 4096, 8192))),
        ),
    ),
    OpInfo(
        name="ac_weights",
        function=ac_weights,
        make=_make_ac_weights,
        results=lambda w: {"w": w},
        differentiable=(),
        tests=(
            _weights(37, 44, 5),
            _weights(37, 65, 16, empty="published", clusters="empty"),
            _weights(0, 17, 5, recipe="softmoe"),
            _weights(37, 17, 5, recipe="swin", clusters="elsewhere"),
            _weights(17, 44, 16, recipe="softmoe", clusters="empty"),
            _weights(37, 44, 5, stat="variance", clusters="one"),
            _weights(17, 17, 16, stat="variance", recipe="swin", clip=10.0, norm="global_pre"),
            _weights(37, 44, 5, stat="pairwise", clusters="elsewhere", norm="global_post"),
            _weights(150, 65, 5, stat="pairwise", clusters="one"),
            _weights(150, 17, 3),
        ),
        large=(_weights(2500, 300, 300, clusters="elsewhere"),),
        benchmarks=(
            _weights(6144, 352, 16),
            _weights(25088, 384, 16, recipe="swin"),
            _weights(25216, 192, 128, recipe="softmoe"),
            _weights(3072, 128, 16, stat="pairwise"),
            _weights(6144, 352, 16, stat="pairwise"),
        ),
        quick=(_weights(6144, 352, 16), _weights(6144, 352, 16, stat="pairwise")),
        cost=_cost_ac_weights,
        baselines={
            "published": baselines.published_ac_weights,
            "library": baselines.library_ac_weights,
        },
        left_out=_left_out_of_weights,
        masked=tuple(_weights(12, 6, 3, stat=stat, clusters="elsewhere") for stat in STATS),
        compiled=tuple(_weights(64, 64, 1024, stat=stat) for stat in ("mad", "pairwise")),
        sweeps=(
            Sweep(
                "T", tuple(_weights(t, 128, 16, stat="pairwise") for t in (1024, 2048, 4096, 8192))
            ),
        ),
        quick_sweeps=(
            Sweep("T", tuple(_weights(t, 64, 16, stat="pairwise") for t in (256, 512, 1024, 2048))),
        ),
    ),
    OpInfo(
        name="route_plan",
        function=route_plan,
        make=_make_route_plan,
        results=_plan_results,
        differentiable=(),
        tests=(
            _plan(37, 5, 2),
            _plan(17, 16, 3, clusters="elsewhere", int32=True),
            _plan(0, 5, 2),
            _plan(37, 5, 1, clusters="one"),
            _plan(150, 7, 4, clusters="empty"),
            _plan(515, 7, 2, clusters="empty"),
        ),
        benchmarks=(
            _plan(6144, 16, 2),
            _plan(25088, 16, 2),
            _plan(32768, 128, 8),
            _plan(32768, 256, 16),
        ),
        quick=(_plan(6144, 16, 2), _plan(32768, 128, 8)),
        cost=_cost_route_plan,
        baselines={
            "published": baselines.published_route_plan,
            "library": baselines.library_route_plan,
        },
        compiled=(_plan(16384, 1024, 8), _plan(16384, 128, 8), _plan(16384, 16, 8)),
        sweeps=(
            Sweep("T", tuple(_plan(t, 128, 8) for t in (8192, 32768, 131072, 524288))),
            Sweep("E", tuple(_plan(32768, e, 8) for e in (16, 64, 256, 1024))),
        ),
        quick_sweeps=(
            Sweep("T", tuple(_plan(t, 16, 2) for t in (2048, 4096, 8192, 16384))),
            Sweep("E", tuple(_plan(8192, e, 2) for e in (8, 32, 128, 512))),
        ),
    ),
    OpInfo(
        name="load_balance_loss",
        function=_load_balance,
        make=_make_load_balance,
        results=lambda loss: {"loss": loss},
        differentiable=("logits",),
        tests=(
            _plan(37, 5, 2),
            _plan(17, 16, 3, kind="published", temperature=0.5, clusters="elsewhere"),
            _plan(0, 5, 2),
            _plan(37, 5, 2, mask="some", temperature=0.5, kind="published"),
            _plan(17, 16, 3, mask="none"),
            _plan(37, 5, 2, mask="some", sequence="mixed", clusters="elsewhere"),
            _plan(17, 16, 3, sequence="packed", temperature=0.5, kind="published"),
        ),
        large=(_plan(1300, 17, 2, mask="some"), _plan(1300, 17, 2, sequence="mixed")),
        benchmarks=(_plan(6144, 16, 2), _plan(32768, 128, 8)),
        quick=(_plan(6144, 16, 2),),
        cost=_cost_loss,
        left_out=_left_out_of_loss,
        masked=(
            *(_plan(9, 5, 2, mask=mask) for mask in ("some", "none")),
            _plan(9, 5, 2, mask="some", sequence="mixed"),
        ),
        baselines={"published": baselines.published_load_balance},
    ),
    OpInfo(
        name="router_z_loss",
        function=router_z_loss,
        make=_make_z_loss,
        results=lambda loss: {"loss": loss},
        differentiable=("logits",),
        tests=(
            Case({"T": 37, "E": 5}),
            Case({"T": 0, "E": 5}),
            Case({"T": 37, "E": 17}, {"mask": "some"}),
            Case({"T": 17, "E": 5}, {"mask": "none"}),
        ),
        large=(Case({"T": 1300, "E": 17}, {"mask": "some"}),),
        benchmarks=(Case({"T": 6144, "E": 16}), Case({"T": 32768, "E": 128})),
        quick=(Case({"T": 6144, "E": 16}),),
        cost=_cost_loss,
        left_out=_left_out_of_loss,
        masked=tuple(Case({"T": 9, "E": 5}, {"mask": mask}) for mask in ("some", "none")),
    ),
)
