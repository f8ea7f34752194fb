"""What tests and benchmarks need to know of merging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molex_kernels.ops.merging.api import camex_deltas, camex_linear, camex_merge
from molex_kernels.ops.merging.types import KroneckerCurvature, nearest_factors
from molex_kernels.testing.baselines.merging import (
    published_camex_deltas,
    published_camex_linear,
    published_camex_merge,
)
from molex_kernels.testing.opinfo import Case, Cost, Draw, Inputs, OpInfo, Sweep

# Where a sign changes, two precisions may differ by a whole delta: inputs stay away from it.
KINK = 1e-3

_FACTORS = KroneckerCurvature._fields


def _curvature(options: dict[str, Any]) -> KroneckerCurvature | None:
    """Takes the factors out of the keyword arguments, where gradients reach them."""
    factors = [options.pop(name, None) for name in _FACTORS]
    return None if factors[0] is None else KroneckerCurvature(*factors)


def _deltas(base: Tensor, experts: Tensor, **options: Any) -> Tensor:
    curvature = _curvature(options)
    return camex_deltas(base, experts, curvature=curvature, **options)


def _merge(base: Tensor, experts: Tensor, gates: Tensor, **options: Any) -> Tensor:
    curvature = _curvature(options)
    return camex_merge(base, experts, gates, curvature=curvature, **options)


def _linear(
    x: Tensor, base: Tensor, experts: Tensor | None, gates: Tensor, **options: Any
) -> Tensor:
    curvature = _curvature(options)
    bias_factors = (options.pop("bias_out1", None), options.pop("bias_out2", None))
    return camex_linear(
        x,
        base,
        experts,
        gates,
        curvature=curvature,
        bias_curvature=None if bias_factors[0] is None else bias_factors,
        **options,
    )


class _Draw(Draw):
    """Draws factors and weights as well."""

    def factor(self, rank: int, num_experts: int, size: int) -> Tensor:
        """Near the identity, as in training."""
        noise = self.normal(rank, num_experts, size, size, scale=0.5 * size**-0.5)
        return torch.eye(size, dtype=self.dtype, device=self.device) + noise

    def weights(self, num_experts: int, *sizes: int, scale: float) -> tuple[Tensor, Tensor]:
        """Base and experts, no task vector and no sum of task vectors near 0."""
        base = self.normal(*sizes, scale=scale)
        experts = self.normal(num_experts, *sizes, scale=scale)
        while self.generator is not None:
            tau = experts.double() - base.double()
            near = (tau.abs() < KINK * scale) | (tau.sum(0).abs() < KINK * scale)
            if not near.any():
                return base, experts
            experts = torch.where(near, self.normal(*experts.shape, scale=scale), experts)
        return base, experts


def _make_deltas(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    out_features, in_features, num_experts, rank = (case.sizes[name] for name in "ODEr")
    draw = _Draw(dtype, device, generator)
    base, experts = draw.weights(num_experts, out_features, in_features, scale=in_features**-0.5)
    inputs: Inputs = {"base": base, "experts": experts, "mask": case.options.get("mask")}
    if rank:
        sizes = (*nearest_factors(out_features), *nearest_factors(in_features))
        for name, size in zip(_FACTORS, sizes, strict=True):
            inputs[name] = draw.factor(rank, num_experts, size)
    return inputs


def _make_merge(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = _Draw(dtype, device, generator)
    inputs = _make_deltas(case, dtype, device, generator)
    logits = draw.normal(case.sizes["S"], case.sizes["E"]).float()
    # Of gates whose sum is 1, the gradient of base is what rounding leaves of a difference.
    inputs["gates"] = (0.75 * torch.softmax(logits, 1)).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    if "alpha" in case.options:
        inputs["alpha"] = case.options["alpha"]
    return inputs


def _make_linear(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = _Draw(dtype, device, generator)
    inputs = _make_merge(case, dtype, device, generator)
    segments, tokens, in_features, out_features, num_experts = (
        case.sizes[name] for name in "STDOE"
    )
    inputs["x"] = draw.normal(segments, tokens, in_features)
    if case.options.get("bias", False):
        inputs["base_bias"], inputs["bias"] = draw.weights(num_experts, out_features, scale=1.0)
        if case.sizes["r"]:
            sizes = nearest_factors(out_features)
            for name, size in zip(("bias_out1", "bias_out2"), sizes, strict=True):
                inputs[name] = draw.factor(case.sizes["r"], num_experts, size)
    if case.options.get("base_bias", False):
        inputs["base_bias"] = draw.normal(out_features)
    if case.options.get("deltas", False):
        inputs["deltas"], inputs["experts"] = inputs["experts"], None
    if case.options.get("own_dtype", False):
        inputs["gates"] = inputs["gates"].to(dtype)
    return inputs


def _deltas_flops(case: Case) -> int:
    """One product along every mode, for every expert and rank."""
    out_features, in_features, num_experts, rank = (case.sizes[name] for name in "ODEr")
    sizes = (*nearest_factors(out_features), *nearest_factors(in_features))
    return 2 * rank * num_experts * out_features * in_features * sum(sizes)


def _cost_deltas(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    elements = (2 * case.sizes["E"] + 1) * case.sizes["O"] * case.sizes["D"]
    # Backward: as much to read and write again, and two more products along every mode.
    passes = 2 if backward else 1
    flops = _deltas_flops(case) * (4 if backward else 1)
    return Cost(passes * elements * dtype.itemsize, flops)


def _cost_merge(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    weight = case.sizes["O"] * case.sizes["D"]
    segments, num_experts = case.sizes["S"], case.sizes["E"]
    passes = 2 if backward else 1
    elements = passes * (num_experts + 1 + segments) * weight
    flops = 2 * segments * num_experts * weight * (3 if backward else 1)
    flops += _deltas_flops(case) * (4 if backward else 1)
    return Cost(elements * dtype.itemsize, flops)


def _cost_linear(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    segments, tokens, in_features, out_features, num_experts = (
        case.sizes[name] for name in "STDOE"
    )
    weight = out_features * in_features
    rows = segments * tokens * (in_features + out_features)
    product = 2 * segments * tokens * weight
    merge = 2 * segments * num_experts * weight
    flops = product + merge + _deltas_flops(case)
    elements = rows + (num_experts + 1) * weight
    if backward:
        # Merged again for dx; the gradients of the deltas and of the gates cost as much each.
        flops = 3 * product + 4 * merge + 4 * _deltas_flops(case)
        elements = 3 * rows + 2 * (num_experts + 1) * weight
    return Cost(elements * dtype.itemsize, flops)


def _weight(o: int, d: int, e: int, r: int, **options: Any) -> Case:
    return Case({"O": o, "D": d, "E": e, "r": r}, options)


def _merged(s: int, o: int, d: int, e: int, r: int, **options: Any) -> Case:
    return Case({"S": s, "O": o, "D": d, "E": e, "r": r}, options)


def _layer(s: int, t: int, o: int, d: int, e: int, r: int, **options: Any) -> Case:
    return Case({"S": s, "T": t, "O": o, "D": d, "E": e, "r": r}, options)


# T5-base: 16 sequences of 128; GPT-2: 8 sequences of 4 segments of 256.
_PAPER = tuple(
    _layer(*segments, *features, 7, rank, mask="ties")
    for rank in (1, 8)
    for segments in ((16, 128), (32, 256))
    for features in ((3072, 768), (768, 3072))
)
_LARGE, _SMALL = (3072, 768), (384, 192)
_KEPT = tuple(
    _layer(*segments, *features, 7, 0, deltas=True)
    for segments in ((16, 128), (32, 256))
    for features in ((3072, 768), (768, 3072))
)

OPINFOS = (
    OpInfo(
        name="camex_linear",
        function=_linear,
        make=_make_linear,
        results=lambda y: {"y": y},
        differentiable=(
            *("x", "base", "experts", "deltas", "gates", "bias", "base_bias"),
            *(*_FACTORS, "bias_out1", "bias_out2"),
        ),
        tests=(
            _layer(3, 37, 17, 44, 5, 0, mask="ties", bias=True),
            _layer(2, 17, 44, 18, 3, 2, mask="ties", bias=True, alpha=0.5),
            _layer(2, 0, 17, 44, 3, 0, bias=True),
            _layer(1, 5, 44, 17, 1, 0, own_dtype=True),
            _layer(3, 5, 44, 18, 1, 1, base_bias=True),
            _layer(3, 17, 17, 44, 9, 0),
            _layer(2, 33, 48, 32, 2, 1, mask="ties"),
            _layer(2, 65, 32, 64, 3, 0, deltas=True, alpha=2.0),
            _layer(0, 5, 17, 17, 2, 0),
        ),
        # More than one group of segments, and several tiles of rows.
        large=(_layer(9, 150, 60, 700, 3, 0, deltas=True, bias=True),),
        benchmarks=(*_PAPER, *_KEPT),
        quick=(
            _layer(16, 128, 1536, 384, 7, 1, mask="ties"),
            _layer(16, 128, 1536, 384, 7, 0, deltas=True),
            _layer(64, 32, 1536, 384, 7, 0, deltas=True),
        ),
        cost=_cost_linear,
        sweeps=(
            Sweep(
                "S", tuple(_layer(s, 8192 // s, *_LARGE, 7, 0, mask="ties") for s in (8, 32, 128))
            ),
            Sweep("E", tuple(_layer(16, 128, *_LARGE, e, 0, mask="ties") for e in (2, 4, 8, 16))),
        ),
        quick_sweeps=(
            Sweep(
                "S",
                tuple(_layer(s, 2048 // s, *_SMALL, 7, 0, mask="ties") for s in (8, 16, 32, 64)),
            ),
            Sweep("E", tuple(_layer(16, 64, *_SMALL, e, 0, mask="ties") for e in (2, 4, 8, 16))),
        ),
        baselines={"published": published_camex_linear},
        compiled=(
            _layer(2, 128, 128, 128, 7, 0, bias=True),
            _layer(2, 64, 128, 128, 7, 0, bias=True),
            _layer(2, 32, 128, 128, 7, 0, bias=True),
            _layer(2, 128, 128, 128, 12, 0, bias=True),
            *(_layer(66, tokens, 256, 64, 7, 0, bias=True) for tokens in (32, 64, 128)),
        ),
    ),
    OpInfo(
        name="camex_deltas",
        function=_deltas,
        make=_make_deltas,
        results=lambda deltas: {"deltas": deltas},
        differentiable=("base", "experts", *_FACTORS),
        tests=(
            _weight(17, 44, 5, 2, mask="ties"),
            _weight(44, 17, 3, 0, mask="ties"),
            _weight(48, 32, 2, 3),
            _weight(18, 44, 1, 3, mask="ties"),
            _weight(17, 17, 9, 0),
        ),
        large=(_weight(60, 77, 3, 2, mask="ties"),),
        benchmarks=(_weight(3072, 768, 7, 1, mask="ties"), _weight(3072, 768, 7, 8, mask="ties")),
        quick=(_weight(1536, 384, 7, 1, mask="ties"),),
        cost=_cost_deltas,
        baselines={"published": published_camex_deltas},
        compiled=(
            _weight(3072, 768, 1, 2, mask="ties"),
            _weight(768, 3072, 1, 2, mask="ties"),
            _weight(1024, 64, 3, 1, mask="ties"),
        ),
    ),
    OpInfo(
        name="camex_merge",
        function=_merge,
        make=_make_merge,
        results=lambda weights: {"weights": weights},
        differentiable=("base", "experts", "gates", *_FACTORS),
        tests=(
            _merged(3, 17, 44, 5, 1, mask="ties", alpha=0.5),
            _merged(2, 44, 17, 1, 0),
            _merged(0, 17, 17, 3, 0, mask="ties"),
        ),
        # More than one group of segments, and more than one block of elements.
        large=(_merged(26, 60, 150, 3, 0, mask="ties"),),
        benchmarks=(_merged(16, 3072, 768, 7, 1, mask="ties"),),
        quick=(_merged(16, 1536, 384, 7, 0, mask="ties"),),
        cost=_cost_merge,
        baselines={"published": published_camex_merge},
    ),
)
