"""PyTorch's FlopCounterMode counts the operators' products, forward and backward."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import molex_kernels as mk
from molex_kernels import _flops, _operators
from molex_kernels.testing import load_ops
from molex_kernels.testing.opinfo import Case, OpInfo

# What these do is done once for each element.
WITHOUT_PRODUCTS = {
    *("route_plan", "cluster_statistics", "feature_weights", "cluster_weights", "layer_vote"),
    *(f"{name}_{part}" for part in ("fwd", "bwd") for name in
      ("choice", "load_balance", "router_z", "layer_mix", "momentum", "permute", "unpermute")),
}  # fmt: skip
COUNTED = ("topk_route", "grouped_gemm", "moe_mlp", "camex_deltas", "layer_linear", "rpc_attention")
CASES = [
    pytest.param(info, case, id=f"{name}-{case.id}")
    for name, info in load_ops().items()
    if name in COUNTED
    for case in info.tests
    if all(case.sizes.values())
]


def _step(module: torch.nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x).square().sum().backward()
    return counter.get_total_flops()


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = mk.TopKRouter(32, 4, 2), mk.MoEMLP(32, 48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x))


class Plain(Layer):
    """The same parameters, an expert after the other."""

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.router.weight.mT
        weight, index = logits.topk(2)
        weight = weight.softmax(1)
        y = torch.zeros_like(x)
        for e in range(4):
            token, slot = (index == e).nonzero(as_tuple=True)
            hidden = F.relu(x[token] @ self.experts.w_up[e].mT)
            y = y.index_add(
                0, token, (hidden @ self.experts.w_down[e].mT) * weight[token, slot, None]
            )
        return y


def test_a_layer_counts_as_its_arithmetic_does(seed: int):
    torch.manual_seed(seed)
    ours, plain = Layer().to(DEVICE), Plain().to(DEVICE)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(37, 32, device=DEVICE)
    for given in (x, x.clone().requires_grad_()):
        got, want = _step(ours, given), _step(plain, given)
        assert abs(got - want) <= 0.01 * want


@pytest.mark.parametrize(("info", "case"), CASES)
def test_a_forward_pass_costs_what_the_op_says(generator, info: OpInfo, case: Case):
    inputs = info.make(case, torch.float32, DEVICE, generator)
    with FlopCounterMode(display=False) as counter:
        info.function(**inputs)
    want = info.cost(case, torch.float32, False).flops
    if info.name == "rpc_attention" and case.options.get("causal"):
        want *= 2  # PyTorch's attention counts whole, too
    assert counter.get_total_flops() == want


def test_every_operator_is_counted_or_has_no_products():
    names = {o.name for o in _operators.OPERATORS if not o.name.startswith("toy")}
    assert names == _flops.FORMULAS.keys() | WITHOUT_PRODUCTS
    assert not _flops.FORMULAS.keys() & WITHOUT_PRODUCTS


@pytest.mark.parametrize("first", ["molex_kernels", "torch.utils.flop_counter"])
def test_it_is_counted_whichever_is_imported_first(first: str):
    """The counter imports Triton, so the package does not import it."""
    second = {"molex_kernels": "torch.utils.flop_counter"}.get(first, "molex_kernels")
    code = f"""
import sys, torch, {first}
assert {first == "torch.utils.flop_counter"} or "triton" not in sys.modules
import {second}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    molex_kernels.topk_route(torch.zeros(5, 4), torch.zeros(3, 4), top_k=2)
assert counter.get_total_flops() == 2 * 5 * 4 * 3
counter = sys.modules["torch.utils.flop_counter"]
assert counter.__loader__ is counter.__spec__.loader
assert type(counter.__loader__).__name__ == "SourceFileLoader"
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
