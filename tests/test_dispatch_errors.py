"""What the dispatch ops refuse, and sizes of 0."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from dispatch import SIZES, draw

from molex_kernels.ops.dispatch.api import grouped_gemm, moe_mlp
from molex_kernels.ops.dispatch.module import MoEMLP
from molex_kernels.ops.routing.api import route_plan

MOE_ERRORS = {
    "x-type": ({"x": [1.0]}, TypeError, "x: expected a tensor"),
    "x-dtype": ({"x": lambda v: v["x"].int()}, TypeError, "x: expected dtype"),
    "x-shape": ({"x": lambda v: v["x"][None]}, ValueError, "x: expected shape"),
    "index-dtype": (
        {"expert_index": lambda v: v["expert_index"].float()},
        TypeError,
        "expert_index: expected dtype",
    ),
    "index-shape": (
        {"expert_index": lambda v: v["expert_index"][:3]},
        ValueError,
        "expert_index: expected shape",
    ),
    "no-choice": (
        {"expert_index": lambda v: v["expert_index"][:, :0]},
        ValueError,
        "K at least 1",
    ),
    "weight-shape": (
        {"expert_weight": lambda v: v["expert_weight"][:, :1]},
        ValueError,
        "expert_weight: expected shape",
    ),
    "weight-dtype": (
        {"expert_weight": lambda v: v["expert_weight"].half()},
        TypeError,
        "expert_weight: expected dtype",
    ),
    "up-shape": ({"w_up": lambda v: v["w_up"][:, 1:]}, ValueError, "w_up: expected shape"),
    "up-dtype": ({"w_up": lambda v: v["w_up"].half()}, TypeError, "w_up: expected dtype"),
    "down-shape": ({"w_down": lambda v: v["w_down"][:, 1:]}, ValueError, "w_down: expected shape"),
    "down-type": ({"w_down": None}, TypeError, "w_down: expected a tensor"),
    "no-expert": ({"w_down": lambda v: v["w_down"][:0]}, ValueError, "E at least 1"),
    "up-bias": ({"b_up": lambda v: v["b_up"][:1]}, ValueError, "b_up: expected shape"),
    "down-bias": ({"b_down": lambda v: v["b_down"].double()}, TypeError, "b_down: expected dtype"),
    "activation": ({"activation": "tanh"}, ValueError, "activation: expected one of"),
    "gated-shape": ({"activation": "swiglu"}, ValueError, "w_up: expected shape"),
    "layout": ({"gate_layout": "split"}, ValueError, "gate_layout: expected one of"),
    "plan-type": ({"plan": "sorted"}, TypeError, "plan: expected a RoutePlan"),
    "plan-experts": (
        {"plan": lambda v: route_plan(v["expert_index"], 3)},
        ValueError,
        "plan.offsets: expected shape",
    ),
    "plan-rows": (
        {"plan": lambda v: route_plan(v["expert_index"][:3], 4)},
        ValueError,
        "plan.permutation: expected shape",
    ),
    "impl": ({"impl": "fast"}, ValueError, "impl: expected one of"),
    "no-cuda": ({"impl": "cuda"}, NotImplementedError, "moe_mlp: impl='cuda' cannot run"),
}


@pytest.mark.parametrize(("change", "error", "message"), MOE_ERRORS.values(), ids=MOE_ERRORS)
def test_moe_mlp_names_what_is_wrong(change, error, message, generator):
    inputs = draw(generator, **SIZES)
    changed = {name: value(inputs) if callable(value) else value for name, value in change.items()}
    with pytest.raises(error, match=message):
        moe_mlp(**{**inputs, **changed})


GEMM_ERRORS = {
    "x-shape": ({"x": torch.zeros(3)}, ValueError, "x: expected shape"),
    "x-type": ({"x": 1}, TypeError, "x: expected a tensor"),
    "weight-shape": ({"weight": torch.zeros(2, 5, 7)}, ValueError, "weight: expected shape"),
    "weight-dtype": ({"weight": torch.zeros(2, 5, 6).half()}, TypeError, "weight: expected dtype"),
    "no-expert": ({"weight": torch.zeros(0, 5, 6)}, ValueError, "E at least 1"),
    "offsets-dtype": ({"offsets": torch.tensor([1, 2])}, TypeError, "offsets: expected dtype"),
    "offsets-shape": ({"offsets": torch.tensor([1]).int()}, ValueError, "offsets: expected shape"),
    "bias-shape": ({"bias": torch.zeros(2, 6)}, ValueError, "bias: expected shape"),
    "impl": ({"impl": "cuda"}, NotImplementedError, "grouped_gemm: impl='cuda' cannot run"),
}


@pytest.mark.parametrize(("change", "error", "message"), GEMM_ERRORS.values(), ids=GEMM_ERRORS)
def test_grouped_gemm_names_what_is_wrong(change, error, message):
    inputs = {
        "x": torch.zeros(3, 6),
        "weight": torch.zeros(2, 5, 6),
        "offsets": torch.tensor([1, 2], dtype=torch.int32),
    }
    with pytest.raises(error, match=message):
        grouped_gemm(**{**inputs, **change})


def test_too_many_experts_for_the_kernels():
    many = torch.zeros(1025, 2, 2, device=DEVICE)
    ends = torch.zeros(1025, dtype=torch.int32, device=DEVICE)
    x = torch.zeros(3, 2, device=DEVICE)
    with pytest.raises(NotImplementedError, match="at most 1024 experts"):
        grouped_gemm(x, many, ends, impl="triton")
    assert not grouped_gemm(x, many, ends).any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"d_model": 0}, ValueError, "d_model"),
        ({"d_hidden": 1.5}, TypeError, "d_hidden"),
        ({"num_experts": 0}, ValueError, "num_experts"),
        ({"activation": "tanh"}, ValueError, "activation"),
        ({"gate_layout": "split"}, ValueError, "gate_layout"),
    ],
    ids=lambda a: next(iter(a)) if isinstance(a, dict) else "",
)
def test_module_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        MoEMLP(**{"d_model": 4, "d_hidden": 4, "num_experts": 2, **arguments})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("columns", "width"), [(0, 17), (5, 0), (0, 0)])
def test_matrices_without_elements(dtype: torch.dtype, columns: int, width: int):
    """A copy in fp32 has no memory then; whether there is one is not asked of its size."""
    x = torch.ones(4, width, dtype=dtype, requires_grad=True)
    weight = torch.ones(2, columns, width, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    y = grouped_gemm(x, weight, offsets, impl="cpu")
    assert y.shape == (4, columns)
    assert not y.any()
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not x.grad.any()
    assert weight.grad.shape == weight.shape
