"""What tests and benchmarks need to know of the dispatch ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molex_kernels.ops.dispatch.api import grouped_gemm, moe_mlp
from molex_kernels.ops.dispatch.permute import permute, unpermute
from molex_kernels.ops.dispatch.types import Activation, ClampedSwiGLU, activation_of
from molex_kernels.ops.routing.api import route_plan
from molex_kernels.testing.baselines.dispatch import (
    batched_gemm,
    library_grouped_gemm,
    library_moe_mlp,
    library_permute,
    library_unpermute,
    liger_moe_mlp,
    published_grouped_gemm,
    published_moe_mlp,
    published_permute,
    published_unpermute,
    transformers_moe_mlp,
)
from molex_kernels.testing.opinfo import Case, Cost, Draw, Inputs, OpInfo, Sweep

# Where a slope jumps, two precisions may differ by the whole jump: tests stay this far away.
KINK = 1e-4
SMALL = 64  # rows up to which that is looked after
# With limits that values at unit scale reach.
CLAMPED = ClampedSwiGLU(alpha=1.3, limit=0.7, up_limit=0.9, up_shift=0.5)


def _activation(case: Case) -> Activation:
    name: str = case.options.get("activation", "relu")
    return CLAMPED if name == "clamped_swiglu" else name


def expert_index(case: Case, draw: Draw) -> Tensor:
    num_experts, top_k = case.sizes["E"], case.sizes["K"]
    tokens = case.sizes["T"] if "T" in case.sizes else case.sizes["R"] // top_k
    routing = case.options.get("routing", "uniform")
    scores = draw.normal(tokens, num_experts, dtype=torch.float32)
    if routing == "zipf":
        rank = torch.arange(1, num_experts + 1, device=draw.device)
        scores = scores - 1.2 * rank.log()
    if routing == "one":
        return torch.zeros(tokens, top_k, dtype=torch.int64, device=draw.device)
    if routing == "empty":
        scores[:, 1] = -torch.inf
    index = scores.topk(top_k, dim=1).indices
    if routing == "twice":
        index[::2] = index[::2, :1]
    if routing == "elsewhere":
        index = index + torch.where(
            draw.normal(tokens, top_k, dtype=torch.float32) > 0.3, num_experts, 0
        )
        index[::5, 0] = -1
    return index


def make_moe_mlp(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    tokens, width, hidden, num_experts, top_k = (case.sizes[name] for name in "TDIEK")
    options = case.options
    activation = _activation(case)
    pointwise, gated, _ = activation_of(activation)
    rows = 2 * hidden if gated else hidden
    draw = Draw(dtype, device, generator)
    weights = torch.softmax(draw.normal(tokens, top_k, dtype=torch.float32), dim=1)
    own = options.get("own_dtype", False) or dtype == torch.float64
    inputs: Inputs = {
        "x": draw.normal(tokens, width),
        "expert_index": expert_index(case, draw),
        "expert_weight": weights.to(dtype) if own else weights,
        "w_up": draw.normal(num_experts, rows, width, scale=width**-0.5),
        "w_down": draw.normal(num_experts, width, hidden, scale=hidden**-0.5),
        "activation": activation,
    }
    if options.get("bias", False):
        inputs["b_up"] = draw.normal(num_experts, rows, scale=0.5)
        inputs["b_down"] = draw.normal(num_experts, width)
    if gated:
        inputs["gate_layout"] = options.get("gate_layout", "concat")
    kinks = {"relu": (0.0,), "clamped_swiglu": (CLAMPED.limit, 0.9, -0.9)}.get(pointwise, ())
    if draw.generator is not None and kinks and tokens <= SMALL:
        _leave_kinks(inputs, draw, kinks)
    return inputs


def _leave_kinks(inputs: Inputs, draw: Draw, kinks: Sequence[float]) -> None:
    """Draws tokens anew until no hidden value lies where the slope jumps."""
    x, w_up = inputs["x"], inputs["w_up"].double()
    bias = inputs["b_up"].double()[:, None] if "b_up" in inputs else 0.0
    while True:
        hidden = torch.matmul(x.double(), w_up.mT) + bias
        near = torch.stack([(hidden - kink).abs() < KINK for kink in kinks]).any(0).any(-1).any(0)
        if not near.any():
            return
        x[near] = draw.normal(int(near.sum()), x.shape[1])


def _make_grouped_gemm(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    tokens, width, columns, num_experts = (case.sizes[name] for name in "TDNE")
    draw = Draw(dtype, device, generator)
    rows = case.options.get("rows", "some")
    if rows == "even":
        ends = torch.arange(1, num_experts + 1) * tokens // num_experts
    elif rows == "one":
        ends = torch.full((num_experts,), tokens)
        ends[0] = 0
    elif rows == "zipf":
        shares = 1.0 / torch.arange(1, num_experts + 1)
        ends = (shares.cumsum(0) / shares.sum() * tokens).floor().long()
        ends[-1] = tokens
    else:
        # Rows past the last end, and an expert without rows.
        ends = draw.integers(tokens + 1, num_experts).sort().values
        ends[1] = ends[0]
    inputs: Inputs = {
        "x": draw.normal(tokens, width),
        "weight": draw.normal(num_experts, columns, width, scale=width**-0.5),
        "offsets": ends.to(device, torch.int32),
    }
    if case.options.get("bias", False):
        inputs["bias"] = draw.normal(num_experts, columns)
    return inputs


def _make_permute(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    index = expert_index(case, draw)
    inputs: Inputs = {
        "x": draw.normal(index.shape[0], case.sizes["D"]),
        "plan": route_plan(index, case.sizes["E"]),
        "top_k": index.shape[1],
    }
    return inputs


def _make_unpermute(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    index = expert_index(case, draw)
    inputs: Inputs = {
        "rows": draw.normal(index.numel(), case.sizes["D"]),
        "plan": route_plan(index, case.sizes["E"]),
        "top_k": index.shape[1],
    }
    if case.options.get("weighted"):
        weights = torch.softmax(draw.normal(*index.shape, dtype=torch.float32), dim=1)
        own = case.options.get("own_dtype", False) or dtype == torch.float64
        inputs["expert_weight"] = weights.to(dtype) if own else weights
    return inputs


def _left_out_of_permute(inputs: Inputs) -> dict[str, Tensor]:
    """Rows of no expert, their weights, and tokens that have no other rows."""
    plan, top_k = inputs["plan"], inputs["top_k"]
    local = plan.offsets[-1]
    rows = torch.arange(plan.inverse.shape[0], device=local.device)
    elsewhere = plan.inverse.view(-1, top_k) >= local
    alone = elsewhere.all(1, keepdim=True)
    left = {"expert_weight": elsewhere, "x": alone, "y": alone, "rows": (rows >= local)[:, None]}
    given = {"x", "rows"} if "x" in inputs else {"rows", "y", *inputs}
    return {name: mask for name, mask in left.items() if name in given}


def left_out_of_moe_mlp(inputs: Inputs) -> dict[str, Tensor]:
    """Experts that nobody chose; assignments to no expert, and tokens that have no others."""
    index, num_experts = inputs["expert_index"], inputs["w_up"].shape[0]
    experts = torch.arange(num_experts, device=index.device)
    idle = ~(index.flatten() == experts[:, None]).any(1)
    elsewhere = (index < 0) | (index >= num_experts)
    alone = elsewhere.all(1, keepdim=True)
    left = {"expert_weight": elsewhere, "x": alone, "y": alone}
    left |= dict.fromkeys(("w_up", "w_down"), idle[:, None, None])
    left |= dict.fromkeys(("b_up", "b_down"), idle[:, None])
    return {name: mask for name, mask in left.items() if name in inputs or name == "y"}


def _left_out_of_grouped_gemm(inputs: Inputs) -> dict[str, Tensor]:
    """Experts without rows, and rows past the last expert's."""
    ends = inputs["offsets"]
    idle = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    rows = torch.arange(inputs["x"].shape[0], device=ends.device)
    past = (rows >= ends[-1])[:, None]
    return {"weight": idle[:, None, None], "bias": idle[:, None], "x": past, "y": past}


def cost_moe_mlp(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    tokens, width, hidden, num_experts, top_k = (case.sizes[name] for name in "TDIEK")
    rows = 2 * hidden if activation_of(_activation(case))[1] else hidden
    assignments = tokens * top_k
    weights = min(num_experts, assignments) * (rows + hidden) * width
    flops = 2 * assignments * (rows + hidden) * width
    elements = 2 * tokens * width + weights
    routing = assignments * (8 + 4)
    if backward:
        # H written and read; x, dy and the weights read; dx and the weights' gradients written.
        elements += 2 * assignments * rows + 3 * tokens * width + 2 * weights
        routing *= 3
        flops *= 3
    return Cost(elements * dtype.itemsize + routing, flops)


def _cost_grouped_gemm(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    tokens, width, columns, num_experts = (case.sizes[name] for name in "TDNE")
    weights = min(num_experts, tokens) * width * columns
    passes = 3 if backward else 1
    elements = passes * (tokens * (width + columns) + weights)
    return Cost(elements * dtype.itemsize + 4 * num_experts, passes * 2 * tokens * width * columns)


def _cost_permute(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    rows, width, top_k = (case.sizes[name] for name in "RDK")
    one_way = (rows + rows // top_k) * width * dtype.itemsize + 8 * rows
    return Cost(2 * one_way if backward else one_way, 0)


def _cost_unpermute(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    one_way = _cost_permute(case, dtype, False)
    rows, width = case.sizes["R"], case.sizes["D"]
    weights = 4 * rows if case.options.get("weighted") else 0
    size = one_way.bytes + weights
    if backward:  # the rows are read again where weights have a gradient, which is written
        size += one_way.bytes + (2 * weights + rows * width * dtype.itemsize if weights else 0)
    return Cost(size, 0)


def _moe(t: int, d: int, i: int, e: int, k: int, note: str = "", **options: Any) -> Case:
    return Case({"T": t, "D": d, "I": i, "E": e, "K": k}, options, note)


def _served(tokens: int) -> Case:
    """A mixture in use, on a few tokens that are decoded or on a prompt: 75 MB of bf16 weights."""
    case = _moe(tokens, 768, 512, 32, 2, activation="swiglu")
    return dataclasses.replace(case, inference=tokens < 64)


def _gemm(t: int, d: int, n: int, e: int, **options: Any) -> Case:
    return Case({"T": t, "D": d, "N": n, "E": e}, options)


def _rows(r: int, d: int, e: int, k: int, note: str = "", **options: Any) -> Case:
    return Case({"R": r, "D": d, "E": e, "K": k}, options, note)


_MOE_TESTS = (
    _moe(37, 44, 17, 5, 2, activation="relu", bias=True),
    _moe(17, 17, 44, 3, 2, activation="swiglu", gate_layout="interleaved", routing="elsewhere"),
    _moe(0, 17, 44, 3, 2, activation="relu", bias=True),
    _moe(37, 44, 17, 8, 2, activation="gelu", bias=True, routing="elsewhere"),
    _moe(17, 17, 17, 5, 2, activation="gelu_tanh", routing="empty"),
    _moe(37, 17, 44, 3, 1, activation="silu", bias=True, routing="one"),
    _moe(17, 44, 17, 5, 2, activation="swiglu", bias=True, own_dtype=True),
    _moe(37, 44, 44, 8, 2, activation="geglu", routing="empty"),
    _moe(
        17, 44, 17, 5, 2, activation="reglu", gate_layout="interleaved", bias=True, routing="twice"
    ),
    _moe(17, 352, 352, 3, 2, activation="relu"),
    _moe(7, 6, 5, 3, 2, activation="relu_squared"),
    _moe(9, 6, 5, 3, 2, activation="clamped_swiglu", gate_layout="interleaved", bias=True),
)
# The papers' layers: relu, both biases.
_PAPER = tuple(_moe(3072, d, d, 16, 2, activation="relu", bias=True) for d in (128, 352, 512))
_FIELD_SIZES = (
    (40960, 768, 256, 128, 8),
    (40960, 768, 512, 64, 4),
    (40960, 768, 1024, 32, 2),
    (24576, 1536, 256, 128, 8),
    (24576, 1536, 512, 64, 4),
    (24576, 1536, 1024, 32, 2),
    (32768, 4096, 256, 256, 16),
    (32768, 4096, 512, 128, 8),
    (32768, 4096, 1024, 64, 4),
    (32768, 4096, 512, 256, 16),
    (32768, 4096, 1024, 128, 8),
    (32768, 4096, 2048, 64, 4),
)
_QWEN3_TOKENS = (128, 1024, 4096, 32768)
_FIELD = (
    *(_moe(t, 2048, 768, 128, 8, "qwen3", activation="swiglu") for t in _QWEN3_TOKENS),
    _moe(32768, 2048, 768, 128, 8, "qwen3", activation="swiglu", routing="zipf"),
    *(_moe(*sizes, activation="swiglu") for sizes in _FIELD_SIZES),
    _moe(*_FIELD_SIZES[0], activation="swiglu", routing="zipf"),
    _moe(32768, 2048, 1024, 64, 8, "olmoe", activation="swiglu"),
)
_LARGE_T = (512, 2048, 8192, 32768)
_LARGE_E = (16, 64, 256)
# Few, some and many rows per expert; sizes that no wide load fits.
_MOE_COMPILED = (
    _moe(32, 128, 128, 4, 2, activation="swiglu"),
    _moe(128, 128, 128, 4, 2, activation="relu", bias=True),
    _moe(128, 128, 128, 4, 2, activation="swiglu"),
    _moe(512, 128, 128, 4, 2, activation="relu", bias=True),
    _moe(512, 128, 128, 4, 2, activation="swiglu"),
    _moe(512, 128, 128, 4, 2, activation="geglu", bias=True),
    _moe(512, 44, 44, 4, 2, activation="geglu", bias=True),
)

# The widths at which tiles change, on both sides.
_PERMUTE_COMPILED = tuple(_rows(64, d, 4, 2, weighted=True) for d in (128, 1024, 1000))
_PERMUTE_BENCHMARKS = (
    (12288, 352, 16, 2),
    (262144, 2048, 128, 8, "qwen3"),
    (262144, 4096, 128, 8),
)

OPINFOS = (
    OpInfo(
        name="grouped_gemm",
        function=grouped_gemm,
        make=_make_grouped_gemm,
        results=lambda y: {"y": y},
        differentiable=("x", "weight", "bias"),
        tests=(
            _gemm(37, 44, 17, 5, bias=True),
            _gemm(17, 17, 44, 3),
            _gemm(0, 17, 17, 3, bias=True),
            _gemm(37, 17, 44, 3, rows="one", bias=True),
            _gemm(17, 352, 44, 8, rows="even"),
        ),
        benchmarks=(
            _gemm(6144, 352, 352, 16, rows="even"),
            _gemm(65536, 2048, 768, 64, rows="even"),
            _gemm(65536, 2048, 768, 64, rows="zipf"),
            _gemm(131072, 4096, 1024, 64, rows="even"),
        ),
        quick=(_gemm(6144, 352, 352, 16, rows="even"),),
        cost=_cost_grouped_gemm,
        baselines={"published": published_grouped_gemm, "library": library_grouped_gemm},
        oracle="published",
        proxies={"bmm": batched_gemm},
        left_out=_left_out_of_grouped_gemm,
        masked=(_gemm(7, 6, 5, 3, bias=True), _gemm(9, 8, 4, 3, rows="one")),
        compiled=(
            _gemm(64, 128, 128, 4, bias=True),
            _gemm(256, 128, 128, 4, bias=True),
            _gemm(1024, 128, 128, 4, bias=True),
            _gemm(1024, 44, 44, 4, bias=True),
        ),
    ),
    OpInfo(
        name="moe_mlp",
        function=moe_mlp,
        make=make_moe_mlp,
        results=lambda y: {"y": y},
        differentiable=("x", "expert_weight", "w_up", "w_down", "b_up", "b_down"),
        tests=_MOE_TESTS,
        benchmarks=(*_PAPER, *_FIELD),
        quick=_PAPER[:2],
        half=tuple(_served(tokens) for tokens in (1, 16, 512, 4096)),
        cost=cost_moe_mlp,
        baselines={
            "published": published_moe_mlp,
            "library": library_moe_mlp,
            "transformers": transformers_moe_mlp,
            "liger": liger_moe_mlp,
        },
        oracle="published",
        compiled=_MOE_COMPILED,
        left_out=left_out_of_moe_mlp,
        masked=(
            _moe(7, 6, 5, 4, 2, activation="relu", bias=True, routing="empty"),
            _moe(7, 6, 5, 4, 1, activation="swiglu", routing="elsewhere"),
            _moe(7, 8, 4, 4, 2, activation="gelu", bias=True, routing="one"),
        ),
        sweeps=(
            Sweep("T", tuple(_moe(t, 2048, 768, 128, 8, activation="swiglu") for t in _LARGE_T)),
            Sweep("E", tuple(_moe(16384, 1024, 512, e, 4, activation="swiglu") for e in _LARGE_E)),
        ),
        quick_sweeps=(
            Sweep("T", tuple(_moe(t, 128, 128, 16, 2, bias=True) for t in (512, 1024, 2048, 4096))),
            Sweep("E", tuple(_moe(2048, 128, 128, e, 2, bias=True) for e in (4, 8, 16, 32))),
        ),
    ),
    OpInfo(
        name="permute",
        function=permute,
        make=_make_permute,
        results=lambda rows: {"rows": rows},
        differentiable=("x",),
        tests=(
            _rows(74, 44, 5, 2),
            _rows(51, 17, 8, 3, routing="elsewhere"),
            _rows(0, 17, 3, 2),
            _rows(37, 130, 3, 1, routing="one"),
            _rows(34, 1030, 5, 2, routing="twice"),
        ),
        large=(_rows(3000, 300, 17, 3, routing="elsewhere"),),
        benchmarks=tuple(_rows(*sizes) for sizes in _PERMUTE_BENCHMARKS),
        quick=(_rows(12288, 352, 16, 2),),
        cost=_cost_permute,
        baselines={"published": published_permute, "library": library_permute},
        left_out=_left_out_of_permute,
        masked=(_rows(28, 6, 4, 2, routing="elsewhere"),),
        compiled=_PERMUTE_COMPILED,
    ),
    OpInfo(
        name="unpermute",
        function=unpermute,
        make=_make_unpermute,
        results=lambda y: {"y": y},
        differentiable=("rows", "expert_weight"),
        tests=(
            _rows(74, 44, 5, 2, weighted=True),
            _rows(51, 17, 8, 3, routing="elsewhere", weighted=True, own_dtype=True),
            _rows(0, 17, 3, 2, weighted=True),
            _rows(51, 17, 8, 3, routing="elsewhere"),
            _rows(37, 130, 3, 1, routing="one", weighted=True),
            _rows(34, 1030, 5, 2, routing="twice", weighted=True),
        ),
        large=(_rows(3000, 300, 17, 3, routing="elsewhere", weighted=True),),
        benchmarks=tuple(_rows(*sizes, weighted=True) for sizes in _PERMUTE_BENCHMARKS),
        quick=(_rows(12288, 352, 16, 2, weighted=True),),
        cost=_cost_unpermute,
        baselines={"published": published_unpermute, "library": library_unpermute},
        left_out=_left_out_of_permute,
        masked=(
            _rows(28, 6, 4, 2, routing="elsewhere", weighted=True),
            _rows(28, 6, 4, 2, routing="elsewhere"),
        ),
        compiled=_PERMUTE_COMPILED,
    ),
)
