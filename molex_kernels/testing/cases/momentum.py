"""What tests and benchmarks need to know of the momentum ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molex_kernels._dtypes import accumulate_dtype
from molex_kernels.ops.momentum.api import moe_mlp_momentum, momentum_update
from molex_kernels.ops.momentum.state import num_averages
from molex_kernels.ops.momentum.types import (
    Adam,
    AdEMAMix,
    HeavyBall,
    Mars,
    Nesterov,
    RobustMomentum,
    Rule,
    Signum,
)
from molex_kernels.testing.baselines.momentum import (
    library_moe_mlp_momentum,
    published_moe_mlp_momentum,
    published_momentum_update,
    three_clones,
)
from molex_kernels.testing.cases.dispatch import (
    cost_moe_mlp,
    left_out_of_moe_mlp,
    make_moe_mlp,
)
from molex_kernels.testing.opinfo import Case, Cost, Draw, Inputs, OpInfo, Sweep

STATES = ("s0", "s1", "s2")
LEARNED = ("mu", "gamma")
NORM = ("norm_weight", "norm_bias")
# Signs and roots bend at 0: tests keep f this far from it.
KINK = 1e-2


def _rule(name: str, mu: Tensor | None, gamma: Tensor | None) -> Rule:
    m = 0.7 if mu is None else mu
    g = 1.1 if gamma is None else gamma
    makers: dict[str, Callable[[], Rule]] = {
        "heavy_ball": lambda: HeavyBall(m, g),
        "nesterov": lambda: Nesterov(m, g),
        "robust": lambda: RobustMomentum(10.0, 1.0, 0.8),
        "signum": lambda: Signum(0.6),
        "adam": lambda: Adam(g, decay=0.1),
        "adam_published": lambda: Adam(g, decay=1.0),
        # Where states start at 0, the default eps makes steps of nearly constant size.
        "adam_smooth": lambda: Adam(g, eps=0.01),
        "ademamix": lambda: AdEMAMix(g, alpha_warmup=9, beta3_warmup=7, decay=0.2),
        "mars": lambda: Mars(g, decay=0.1, correction=0.5),
    }
    return makers[name]()


def _adapted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with rule, state and norm in pieces: what gets a gradient is an argument."""

    def call(
        *, rule: str, step: int | None = None, norm_eps: float | None = None, **given: Any
    ) -> Any:
        learned = [given.pop(name, None) for name in LEARNED]
        state = tuple(given.pop(name) for name in STATES if name in given)
        weight, bias = (given.pop(name, None) for name in NORM)
        made = _rule(rule, *learned)
        y, new = function(
            **given,
            state=(state if step is None else (*state, step)) or None,
            rule=made,
            norm=None if norm_eps is None else (weight, bias, norm_eps),
        )
        # What else a state carries is x or f.
        return y, *new[: num_averages(made)]

    return call


def _results(result: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("y", *STATES), result, strict=False))


def _away_from_kinks(f: Tensor) -> Tensor:
    return torch.where(f.abs() < KINK, torch.where(f < 0, f - KINK, f + KINK), f)


def _shift(case: Case) -> float:
    """A mean, so that sums over all tokens, the gradients of mu and gamma, do not cancel."""
    return 1.0 if case.options.get("learned") else 0.0


def _rule_inputs(case: Case, draw: Draw, x: Tensor) -> Inputs:
    """Everything of an update but x and f."""
    sizes = x.shape
    name = case.options["rule"]
    wide = accumulate_dtype(draw.dtype)
    state_dtype = draw.dtype if case.options.get("narrow") else wide
    inputs: Inputs = {"rule": name}
    if case.options.get("state", True):
        rule = _rule(name, None, None)
        for key, of in zip(STATES, rule.states, strict=False):
            carried = of in ("x_prev", "f_prev")
            drawn = draw.normal(*sizes, dtype=x.dtype if carried else state_dtype)
            # Away from 0, where the root is steep.
            inputs[key] = drawn.square() + 0.5 if of == "v" else drawn + _shift(case)
        if name == "ademamix":
            inputs["step"] = 2
    if case.options.get("learned"):
        inputs["mu"] = torch.full((), 0.6, dtype=wide, device=draw.device)
        inputs["gamma"] = torch.full((1,), 0.9, dtype=wide, device=draw.device)
    if case.options.get("norm"):
        inputs["norm_eps"] = 1e-5
        if case.options["norm"] == "affine":
            inputs["norm_weight"] = draw.normal(sizes[-1], dtype=x.dtype)
            inputs["norm_bias"] = draw.normal(sizes[-1], dtype=wide)
    return inputs


def _make_update(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    sizes = tuple(case.sizes.values())
    draw = Draw(dtype, device, generator)
    stream = accumulate_dtype(dtype) if case.options.get("autocast") else dtype
    x = draw.normal(*sizes, dtype=stream)
    f = _away_from_kinks(draw.normal(*sizes) + _shift(case))
    return {"x": x, "f": f, **_rule_inputs(case, draw, x)}


def _make_moe(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    tokens, width = case.sizes["T"], case.sizes["D"]
    inputs = make_moe_mlp(case, dtype, device, generator)
    if "b_down" in inputs:
        inputs["b_down"] += _shift(case)
    if case.options.get("inner"):
        inputs["expert_input"] = inputs["x"]
        inputs["x"] = draw.normal(tokens, width, dtype=accumulate_dtype(dtype))
    if case.options.get("dropout"):
        inputs["dropout_p"] = case.options["dropout"]
        inputs["dropout_seed"] = draw.integers(2**62)
    return {**inputs, **_rule_inputs(case, draw, inputs["x"])}


def _left_out_of_moe(inputs: Inputs) -> dict[str, Tensor]:
    """As of the experts alone, but for the stream: the update moves every token of it."""
    left = left_out_of_moe_mlp(inputs)
    left["expert_input"] = left.pop("x")
    del left["y"]
    return left


def _elements(case: Case) -> int:
    total = 1
    for name, size in case.sizes.items():
        total *= size if name in ("B", "T", "D") else 1
    return total


def _cost_update(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    narrow = dtype.itemsize
    rule = _rule(case.options["rule"], None, None)
    states = len([name for name in rule.states if not name.endswith("prev")])
    norm = case.options.get("norm")
    held = states if case.options.get("state", True) else 0
    per_element = 3 * narrow + 4 * (held + states)  # x, f and y; the old and the new states
    if held and "f_prev" in rule.states:
        per_element += narrow
    flops = 6 * states + (8 if norm else 0)
    if backward:
        per_element += 2 * narrow + 4 * (held + states)  # dy and df; the states' gradients
        if states > 1 or norm:
            per_element += narrow + 4 * held  # f, or the new state, and the old ones
        if norm:
            per_element += 2 * narrow  # x and dx
        flops *= 4
    elements = _elements(case)
    return Cost(elements * per_element, elements * flops)


def _cost_moe(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    """The experts', and the update's without f: it goes from the sum to the step in registers."""
    experts = cost_moe_mlp(case, dtype, backward)
    update = _cost_update(case, dtype, backward)
    passing = 2 * _elements(case) * dtype.itemsize  # f, written and read
    return Cost(experts.bytes + update.bytes - passing, experts.flops + update.flops)


def _update(t: int, d: int, rule: str, note: str = "", **options: Any) -> Case:
    return Case({"T": t, "D": d}, {"rule": rule, **options}, note)


def _moe(t: int, d: int, i: int, e: int, k: int, rule: str, **options: Any) -> Case:
    return Case({"T": t, "D": d, "I": i, "E": e, "K": k}, {"rule": rule, **options})


_LARGE = ((3072, 352), (6144, 352), (24576, 352), (32768, 4096))

OPINFOS = (
    OpInfo(
        name="momentum_update",
        function=_adapted(momentum_update),
        make=_make_update,
        results=_results,
        differentiable=("x", "f", *STATES, *LEARNED, *NORM),
        tests=(
            _update(37, 44, "heavy_ball", norm="affine"),
            _update(17, 17, "adam", norm="affine"),
            _update(0, 17, "nesterov", norm="affine", learned=True),
            _update(37, 17, "nesterov"),
            _update(17, 44, "nesterov", norm="plain", state=False),
            _update(37, 44, "heavy_ball", learned=True),
            _update(17, 44, "nesterov", learned=True, norm="affine"),
            _update(17, 17, "robust"),
            _update(17, 44, "signum", norm="affine"),
            _update(37, 44, "adam_smooth", state=False, norm="affine"),
            _update(37, 17, "adam_published", learned=True),
            _update(17, 44, "ademamix", norm="affine"),
            _update(17, 17, "ademamix", learned=True),
            _update(17, 44, "mars"),
            _update(37, 17, "heavy_ball", state=False),
            _update(17, 44, "adam", autocast=True, norm="affine"),
            _update(17, 44, "heavy_ball", narrow=True),
            Case({"B": 3, "T": 5, "D": 44}, {"rule": "mars", "norm": "affine"}),
            Case({"D": 352}, {"rule": "adam", "norm": "affine"}),
        ),
        benchmarks=(
            *(_update(*size, "heavy_ball") for size in _LARGE),
            *(_update(*size, "adam") for size in _LARGE),
            _update(24576, 352, "heavy_ball", norm="affine"),
            _update(32768, 4096, "heavy_ball", norm="affine"),
            _update(32768, 4096, "adam", norm="affine"),
            _update(24576, 352, "ademamix"),
            _update(24576, 352, "mars"),
        ),
        quick=(
            _update(3072, 352, "adam"),
            _update(8192, 1024, "adam"),
            _update(3072, 352, "heavy_ball", norm="affine"),
        ),
        cost=_cost_update,
        baselines={"published": _adapted(published_momentum_update)},
        proxies={"three_clones": three_clones},
        sweeps=(Sweep("T", tuple(_update(t, 4096, "adam") for t in (1024, 4096, 16384, 65536))),),
        quick_sweeps=(
            Sweep("T", tuple(_update(t, 352, "adam") for t in (1024, 2048, 4096, 8192))),
        ),
        compiled=(
            _update(64, 1024, "heavy_ball", norm="affine", learned=True),
            _update(64, 4096, "heavy_ball", norm="affine", learned=True),
            _update(64, 4096, "adam", norm="affine", learned=True),
            _update(64, 4096, "mars", norm="affine", learned=True),
            _update(64, 4096, "ademamix", norm="affine", learned=True),
            _update(64, 2048, "ademamix", learned=True),
            _update(64, 2048, "ademamix", norm="affine", learned=True),
            _update(8, 8192, "adam", norm="affine"),
        ),
    ),
    OpInfo(
        name="moe_mlp_momentum",
        function=_adapted(moe_mlp_momentum),
        make=_make_moe,
        results=_results,
        differentiable=(
            *("x", "expert_input", "expert_weight", "w_up", "w_down", "b_up", "b_down"),
            *(*STATES, *LEARNED, *NORM),
        ),
        tests=(
            _moe(17, 44, 17, 5, 2, "heavy_ball", norm="affine", bias=True, inner=True),
            _moe(17, 17, 44, 3, 2, "adam", activation="swiglu", routing="elsewhere", inner=True),
            _moe(0, 17, 44, 3, 2, "nesterov", bias=True, norm="affine"),
            _moe(17, 44, 17, 5, 2, "heavy_ball", routing="empty", state=False, dropout=0.3),
            _moe(17, 17, 17, 3, 1, "nesterov", routing="one", norm="affine", dropout=0.5),
            _moe(17, 44, 17, 5, 2, "adam", dropout=0.3, norm="affine", bias=True),
            _moe(
                17,
                44,
                17,
                5,
                2,
                "nesterov",
                learned=True,
                norm="affine",
                routing="twice",
                bias=True,
            ),
            _moe(17, 44, 17, 5, 2, "mars", dropout=0.3, norm="affine"),
            _moe(17, 17, 44, 5, 2, "ademamix", activation="gelu"),
            _moe(17, 17, 44, 5, 2, "robust", activation="silu", inner=True),
        ),
        benchmarks=(
            *(_moe(3072, d, d, 16, 2, "heavy_ball", bias=True) for d in (128, 352, 512)),
            _moe(3072, 352, 352, 16, 2, "heavy_ball", bias=True, norm="affine"),
            _moe(3072, 352, 352, 16, 2, "adam", bias=True, norm="affine"),
            _moe(24576, 352, 352, 16, 2, "heavy_ball", bias=True, norm="affine"),
            _moe(32768, 4096, 512, 128, 8, "heavy_ball", norm="affine"),
        ),
        quick=(_moe(3072, 352, 352, 16, 2, "adam", bias=True, norm="affine"),),
        cost=_cost_moe,
        baselines={
            "published": _adapted(published_moe_mlp_momentum),
            "library": _adapted(library_moe_mlp_momentum),
        },
        oracle="published",
        left_out=_left_out_of_moe,
        masked=(
            _moe(7, 6, 5, 4, 2, "adam", bias=True, norm="affine", inner=True, routing="elsewhere"),
            _moe(7, 6, 5, 4, 2, "heavy_ball", bias=True, routing="empty"),
        ),
        compiled=(
            _moe(64, 128, 128, 4, 2, "heavy_ball", norm="affine", dropout=0.1),
            _moe(64, 1024, 128, 4, 2, "adam", norm="affine", dropout=0.1),
            _moe(64, 4096, 128, 4, 2, "adam", norm="affine", dropout=0.1),
            _moe(64, 4096, 128, 4, 2, "ademamix", norm="affine", dropout=0.1),
            _moe(64, 128, 128, 4, 2, "ademamix", dropout=0.1),
        ),
    ),
)
