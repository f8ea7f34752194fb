"""Tensors without memory, and devices that only the reference knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import molex_kernels as mk
from molex_kernels import _backends
from molex_kernels.testing import load_ops
from molex_kernels.testing.calls import run
from molex_kernels.testing.opinfo import Case

OPS = load_ops()


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.id}")
        for name, info in OPS.items()
        for case in info.tests
    ],
)
def test_results_and_gradients_have_their_shapes(generator, name: str, case: Case, impl):
    info = OPS[name]
    inputs = info.make(case, torch.float32, torch.device("cpu"), generator)
    upstream = {
        n: torch.ones_like(r)
        for n, r in run(info, inputs, impl, None).results.items()
        if r.is_floating_point()
    }
    want = run(info, inputs, impl, upstream)
    given = {n: tree_map(_meta, v) for n, v in inputs.items()}
    got = run(info, given, impl, {n: _meta(u) for n, u in upstream.items()})
    for ours, theirs in ((got.results, want.results), (got.gradients, want.gradients)):
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].device.type == "meta", key
            assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key


MODULES = {
    "TopKRouter": lambda: mk.TopKRouter(8, 4, 2, bias=True, device="meta"),
    "ACRouter": lambda: mk.ACRouter(8, 4, 2, device="meta"),
    "MomentumMoE": lambda: mk.MomentumMoE(8, 6, 4, 2, mk.HeavyBall(0.7), device="meta"),
    "MomentumMoE-shared": lambda: mk.MomentumMoE(
        8, 6, 4, 2, mk.HeavyBall(0.7), shared_width=5, shared_gate=True, device="meta"
    ),
    "SoftMoE": lambda: mk.SoftMoE(8, 6, 4, 2, top_k=3, device="meta"),
    "CAMExLinear": lambda: mk.CAMExLinear(8, 6, 3, bias=True, device="meta"),
    "CAMExMLP": lambda: mk.CAMExMLP(8, 6, 3, device="meta"),
    "RPCAttention": lambda: mk.RPCAttention(8, 2, num_iters=2, device="meta"),
    "ScaledAttention": lambda: mk.ScaledAttention(8, 2, device="meta"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_run_without_memory(name: str):
    module = MODULES[name]()
    found = module(torch.empty(2, 5, 8, device="meta", requires_grad=True))
    floating = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.requires_grad]
    assert floating
    torch.autograd.backward(floating, [torch.empty_like(t) for t in floating])
    assert all(p.grad is None or p.grad.shape == p.shape for p in module.parameters())


@pytest.mark.parametrize("device", ["mps", "xpu", "privateuseone"])
@pytest.mark.parametrize("op", OPS)
def test_the_reference_runs_wherever_pytorch_does(op: str, device: str):
    assert _backends.reasons(op, device)["reference"] is None
    others = {n for n, why in _backends.reasons(op, device).items() if why is None}
    assert others <= {"reference", "sdpa"}
