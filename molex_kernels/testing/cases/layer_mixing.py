"""What tests and benchmarks need to know of layer mixing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molex_kernels.ops.layer_mixing.api import layer_linear, layer_mix, layer_vote
from molex_kernels.ops.layer_mixing.types import MODES, LoRA
from molex_kernels.testing.baselines.layer_mixing import (
    library_layer_linear,
    published_layer_linear,
    published_layer_mix,
    published_layer_vote,
)
from molex_kernels.testing.opinfo import Case, Cost, Draw, Inputs, OpInfo, Sweep


def _linear(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    *,
    biases: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    table: bool = False,
    **options: Any,
) -> Tensor:
    """Takes the adapters out of the keyword arguments; `table` passes the layers one by one."""

    def layers(value: Tensor | None) -> Any:
        return value.unbind(0) if table and value is not None else value

    lora = None if a is None else LoRA(layers(a), layers(b), scaling)
    return layer_linear(x, layers(weights), index, biases=layers(biases), lora=lora, **options)


def _mix(
    outputs: Tensor,
    coeff: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    **options: Any,
) -> Any:
    norm = None if eps is None else (norm_weight, norm_bias, eps)
    return layer_mix(outputs, coeff, norm=norm, **options)


def _make_vote(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    tokens, layers = case.sizes["T"], case.sizes["L"]
    logits = draw.normal(tokens, layers)
    # One layer ahead of the others, so that no rounding of the sums decides.
    logits += (torch.arange(layers, device=device) == draw.integers(layers)).to(dtype)
    inputs: Inputs = {"logits": logits, "mode": case.options["mode"]}
    if case.options.get("mask"):
        counted = draw.normal(tokens, dtype=torch.float32) < 0.8  # four in five
        counted[:1] = False
        inputs["mask"] = counted
    return inputs


def _make_linear(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    branches, tokens, features, columns, layers, rank = (case.sizes[n] for n in "GTDNLr")
    shared, same = case.options.get("shared", False), case.options.get("same", False)
    index = draw.integers(layers, branches)
    inputs: Inputs = {
        "x": draw.normal(*(() if shared else (branches,)), tokens, features),
        "weights": draw.normal(layers, columns, features, scale=features**-0.5),
        "index": index[:1].expand(branches).clone() if same else index,
        "shared": shared,
        "table": case.options.get("table", False),
    }
    if case.options.get("bias", True):
        inputs["biases"] = draw.normal(layers, columns)
    if rank:
        # PEFT keeps adapters in fp32 on weights in 16 bits.
        wide = torch.float32 if case.options.get("adapters") == "fp32" else None
        wide = None if dtype == torch.float64 else wide
        inputs["a"] = draw.normal(layers, rank, features, scale=features**-0.5, dtype=wide)
        inputs["b"] = draw.normal(layers, columns, rank, scale=rank**-0.5, dtype=wide)
        inputs["scaling"] = 2.0
    return inputs


def _make_mix(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    branches, tokens, features = (case.sizes[n] for n in "GTD")
    single = torch.float64 if dtype == torch.float64 else torch.float32
    inputs: Inputs = {"outputs": draw.normal(branches, tokens, features)}
    given = draw.normal(branches, scale=0.5, dtype=single)
    if case.options.get("logits"):
        inputs["logits"] = given
    else:
        inputs["coeff"] = 0.2 + torch.softmax(given, 0)
    if case.options.get("residual"):
        inputs["residual"] = draw.normal(branches, tokens, features)
    if case.options.get("norm"):
        inputs["norm_weight"] = 1 + draw.normal(features, scale=0.2)
        inputs["norm_bias"] = draw.normal(features)
        inputs["eps"] = 1e-5
    return inputs


def _left_out_of_vote(inputs: Inputs) -> dict[str, Tensor]:
    """Tokens that the mask does not count."""
    return {"logits": ~inputs["mask"][:, None]}


def _left_out_of_linear(inputs: Inputs) -> dict[str, Tensor]:
    """Layers that no branch chose."""
    layers = torch.arange(inputs["weights"].shape[0], device=inputs["index"].device)
    idle = ~(inputs["index"] == layers[:, None]).any(1)
    names = [name for name in ("weights", "biases", "a", "b") if name in inputs]
    return {name: idle[(...,) + (None,) * (inputs[name].dim() - 1)] for name in names}


def _cost_vote(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    elements = case.sizes["T"] * case.sizes["L"]
    return Cost(elements * dtype.itemsize, 4 * elements)


def _cost_linear(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    branches, tokens, features, columns, layers, rank = (case.sizes[n] for n in "GTDNLr")
    read = (1 if case.options.get("shared") else branches) * tokens * features
    rows = read + branches * tokens * columns
    weights = min(branches, layers) * (features * columns + rank * (features + columns))
    flops = 2 * branches * tokens * (features * columns + rank * (features + columns))
    passes = 3 if backward else 1
    return Cost(passes * (rows + weights) * dtype.itemsize, passes * flops)


def _cost_mix(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    branches, tokens, features = (case.sizes[n] for n in "GTD")
    blocks = 2 if case.options.get("residual") else 1
    out = 2 if case.options.get("norm") else 1
    elements = tokens * features
    moved = blocks * branches + out
    if backward:
        moved += blocks * branches + out + branches
    return Cost(moved * elements * dtype.itemsize, 4 * moved * elements)


def _vote(t: int, layers: int, **options: Any) -> Case:
    return Case({"T": t, "L": layers}, options)


def _product(g: int, t: int, d: int, n: int, layers: int, r: int, **options: Any) -> Case:
    return Case({"G": g, "T": t, "D": d, "N": n, "L": layers, "r": r}, options)


def _mixture(g: int, t: int, d: int, **options: Any) -> Case:
    return Case({"G": g, "T": t, "D": d}, options)


# RoBERTa-base, 16 sequences of 512; GPT-2 medium, 8 of 512. The first product reads one input.
_PAPER = (
    _product(2, 8192, 768, 768, 12, 8, shared=True),
    _product(2, 8192, 768, 3072, 12, 0),
    _product(2, 8192, 3072, 768, 12, 0),
    _product(2, 4096, 1024, 3072, 24, 4, shared=True),
    _product(2, 4096, 1024, 4096, 24, 0),
    _product(2, 2048, 768, 3072, 12, 0),
)

OPINFOS = (
    OpInfo(
        name="layer_vote",
        function=layer_vote,
        make=_make_vote,
        results=lambda j: {"j": j},
        differentiable=(),
        tests=(
            _vote(37, 5, mode="mode"),
            _vote(65, 12, mode="mean_softmax", mask=True),
            _vote(40, 3, mode="mean_sigmoid", mask=True),
            _vote(0, 4, mode="mode"),
            _vote(9, 1, mode="mean_softmax"),
            _vote(200, 63, mode="mean_softmax", mask=True),
            _vote(300, 1000, mode="mode"),
        ),
        benchmarks=(_vote(8192, 12, mode="mode"), _vote(4096, 24, mode="mean_softmax")),
        quick=(_vote(8192, 12, mode="mode"),),
        cost=_cost_vote,
        baselines={"published": published_layer_vote},
        left_out=_left_out_of_vote,
        masked=tuple(_vote(9, 5, mode=mode, mask=True) for mode in MODES),
    ),
    OpInfo(
        name="layer_linear",
        function=_linear,
        make=_make_linear,
        results=lambda y: {"y": y},
        differentiable=("x", "weights", "biases", "a", "b"),
        tests=(
            _product(2, 37, 17, 44, 5, 3),
            _product(2, 33, 44, 17, 4, 5, shared=True, table=True),
            _product(3, 40, 32, 48, 2, 16, same=True),
            _product(2, 17, 16, 32, 3, 40, table=True),
            _product(1, 21, 18, 9, 1, 0, bias=False),
            _product(2, 0, 16, 17, 3, 2),
            _product(2, 65, 48, 32, 3, 0, shared=True, same=True),
            _product(2, 1100, 16, 16, 3, 0),  # gradients in two pieces of the rows
        ),
        benchmarks=_PAPER,
        quick=(_product(2, 1024, 384, 1536, 6, 0), _product(2, 1024, 384, 384, 6, 8, shared=True)),
        cost=_cost_linear,
        baselines={"published": published_layer_linear, "library": library_layer_linear},
        left_out=_left_out_of_linear,
        masked=(
            _product(2, 7, 6, 5, 4, 2),
            _product(2, 7, 6, 5, 4, 2, shared=True, table=True, same=True),
        ),
        sweeps=(
            Sweep("T", tuple(_product(2, t, 768, 3072, 12, 0) for t in (1024, 4096, 16384))),
            Sweep("L", tuple(_product(2, 2048, 768, 768, layers, 0) for layers in (2, 8, 32))),
        ),
        quick_sweeps=(
            Sweep("T", tuple(_product(2, t, 384, 384, 6, 0) for t in (256, 512, 1024, 2048))),
            Sweep("L", tuple(_product(2, 256, 384, 384, layers, 0) for layers in (2, 6, 12, 24))),
        ),
        compiled=tuple(
            _product(2, tokens, 128, 256, 3, rank, **options)
            for tokens in (64, 256)
            for rank in (0, 8, 40)
            for options in ({}, {"shared": True, "table": True})
        ),
    ),
    OpInfo(
        name="layer_mix",
        function=_mix,
        make=_make_mix,
        results=lambda y: (
            dict(zip(("y", "normed"), y, strict=True)) if isinstance(y, tuple) else {"y": y}
        ),
        differentiable=("outputs", "residual", "coeff", "logits", "norm_weight", "norm_bias"),
        tests=(
            _mixture(2, 37, 44, residual=True, norm=True),
            _mixture(2, 33, 17),
            _mixture(3, 20, 65, logits=True, residual=True),
            _mixture(1, 9, 32, norm=True),
            _mixture(2, 0, 16, norm=True),
        ),
        benchmarks=(
            _mixture(2, 8192, 768, residual=True, norm=True),
            _mixture(2, 4096, 1024, residual=True),
        ),
        quick=(_mixture(2, 2048, 384, residual=True, norm=True),),
        cost=_cost_mix,
        baselines={"published": published_layer_mix},
        compiled=(
            _mixture(2, 64, 768, residual=True, norm=True),
            _mixture(2, 64, 1024, residual=True, norm=True),
            _mixture(2, 64, 1024, residual=True),
        ),
    ),
)
