"""torch.compile in one graph: with sizes and options that change, and sizes that only data know."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import DEVICE, runs_here
from torch import Tensor

import molex_kernels as mk
from molex_kernels.testing import load_ops
from molex_kernels.testing.opinfo import Inputs, OpInfo

OPS = load_ops()
COMPILED = [
    (name, impl)
    for name, info in OPS.items()
    for impl in info.implementations
    if impl != "triton" and runs_here(impl)
]


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()


def _smallest(info: OpInfo) -> Any:
    cases = [c for c in info.tests if all(c.sizes.values())]
    return min(cases, key=lambda case: math.prod(case.sizes.values()))


def _results(info: OpInfo, inputs: Inputs, impl: str) -> dict[str, Tensor]:
    return info.results(info.function(**inputs, impl=impl))


def _compiled(info: OpInfo, impl: str, **options: Any) -> Any:
    def call(inputs: Inputs) -> dict[str, Tensor]:
        return _results(info, inputs, impl)

    return torch.compile(call, fullgraph=True, backend="aot_eager", **options)


def _same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, result in want.items():
        torch.testing.assert_close(got[name], result, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("name", "impl"), COMPILED)
def test_symbolic_sizes(generator, name: str, impl: str):
    """With dynamic=True every size and every number is a symbol."""
    info = OPS[name]
    inputs = info.make(_smallest(info), torch.float32, DEVICE, generator)
    leaves = {
        n: inputs[n].detach().requires_grad_()
        for n in info.differentiable
        if isinstance(inputs.get(n), Tensor)
    }
    given = {**inputs, **leaves}
    _same(_compiled(info, impl, dynamic=True)(given), _results(info, given, impl))


def _floats(inputs: Inputs) -> list[str]:
    return [n for n, v in inputs.items() if isinstance(v, float) and math.isfinite(v)]


FLOATS = [
    (name, impl, option)
    for name, impl in COMPILED
    if impl != "reference"  # numbers are checked before an implementation is chosen
    for option in sorted(
        {
            option
            for case in OPS[name].tests
            for option in _floats(OPS[name].make(case, torch.float32, torch.device("meta"), None))
        }
    )
]


@pytest.mark.parametrize(("name", "impl", "option"), FLOATS)
def test_a_number_that_changes(generator, name: str, impl: str, option: str):
    """The second value makes it a symbol."""
    info = OPS[name]
    case = next(
        case
        for case in info.tests
        if all(case.sizes.values())
        and option in _floats(info.make(case, torch.float32, torch.device("meta"), None))
    )
    inputs = info.make(case, torch.float32, DEVICE, generator)
    compiled = _compiled(info, impl)
    for value in (inputs[option], inputs[option] * 0.75):
        given = {**inputs, option: value}
        _same(compiled(given), _results(info, given, impl))


@pytest.mark.parametrize(("name", "impl"), COMPILED)
def test_tokens_that_a_mask_picks(generator, name: str, impl: str):
    """How many there are, no size tells."""
    info = OPS[name]
    case = next((c for c in info.tests if all(c.sizes.values()) and _is_unique(c.sizes, "T")), None)
    if case is None:
        pytest.skip("no tokens one by one")
    inputs = info.make(case, torch.float32, DEVICE, generator)
    mask = torch.rand(case.sizes["T"], generator=generator) < 0.7

    def picked(value: Any) -> Any:
        if not isinstance(value, Tensor) or case.sizes["T"] not in value.shape:
            return value
        dim = value.shape.index(case.sizes["T"])
        return value[(slice(None),) * dim + (mask,)]

    def call(inputs: Inputs, mask: Tensor) -> dict[str, Tensor]:
        given = {n: picked(v) for n, v in inputs.items()}
        if "offsets" in given:  # of rows that are still there
            given["offsets"] = given["offsets"].clamp(max=mask.sum())
        return _results(info, given, impl)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        _same(compiled(inputs, mask), call(inputs, mask))


def _is_unique(sizes: Any, letter: str) -> bool:
    return letter in sizes and list(sizes.values()).count(sizes[letter]) == 1


BLOCKS = {
    "RPCAttention": [mk.RPCAttention(32, 4, num_iters=2, lam=lam) for lam in (4.0, 2.0)],
    "CAMExLinear": [mk.CAMExLinear(32, 8, 3, alpha=alpha) for alpha in (1.0, 0.5)],
    "MomentumMoE": [mk.MomentumMoE(32, 24, 4, 2, mk.HeavyBall(mu)) for mu in (0.7, 0.5)],
    "MomentumMoE-shared": [
        mk.MomentumMoE(32, 24, 4, 2, mk.HeavyBall(0.7), shared_width=w, shared_gate=True)
        for w in (16, 8)
    ],
    "Adam": [mk.MomentumMoE(32, 24, 4, 2, mk.Adam(b)) for b in (0.7, 0.5)],
    "ACRouter": [mk.ACRouter(32, 4, 2, eps=eps) for eps in (0.1, 0.2)],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_with_options_of_their_own(seed: int, name: str):
    """Compiled block by block, they share the code, and so what it has seen."""
    torch.manual_seed(seed)
    for module in BLOCKS[name]:
        module = module.to(DEVICE).eval()
        x = torch.randn(6, 32) if name == "ACRouter" else torch.randn(2, 8, 32)
        given = [x]
        if name == "ACRouter":
            given.append(mk.TopKRouter(32, 4, 2)(x))
        want = module(*given)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got = compiled(*given)
        for a, b in zip(_tensors(got), _tensors(want), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]
