"""Models that contain the package's modules are traced by torch.fx and torch.jit.trace."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from conftest import DEVICE
from modules import MODULES, D, agree, changed, inputs, make
from torch import fx, nn

import molex_kernels as mk
from molex_kernels.testing import OPS
from molex_kernels.testing.calls import cast


class _Net(nn.Module):
    """A model around a module."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(D, D).to(DEVICE)
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.before(x)))


class _NetOfTwo(_Net):
    def forward(self, x, more):
        return self.layer(torch.tanh(self.before(x)), more)


def _net(name: str, seed: int) -> tuple[nn.Module, tuple[Any, ...]]:
    given = inputs(name, seed)
    return (_Net, _NetOfTwo)[len(given) - 1](make(name, seed)), given


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_one_node_of_torch_fx(name, seed):
    model, given = _net(name, seed)
    traced = fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["before", "layer"]
    assert agree(traced(*given), model(*given))
    with torch.no_grad():  # the module itself is there, not what it was when it was traced
        for parameter in model.layer.parameters():
            parameter.copy_(changed(parameter))
    assert agree(traced(*given), model(*given))
    assert agree(copy.deepcopy(traced)(*given), model(*given))
    file = io.BytesIO()
    torch.save(traced, file)
    file.seek(0)
    assert agree(torch.load(file, weights_only=False)(*given), model(*given))


@pytest.mark.parametrize("name", MODULES)
def test_hooks_of_a_traced_module_run_once(name, seed):
    """Hooks of what is no leaf are recorded in the graph: they may not run inside of it again."""
    model, given = _net(name, seed)
    model.layer.register_forward_pre_hook(lambda _module, given: (2 * given[0], *given[1:]))
    want = model(*given)
    assert agree(fx.symbolic_trace(model)(*given), want)


FUNCTIONS = {name: info for name, info in OPS.items() if info.function is getattr(mk, name, None)}


def test_functions_are_swept():
    assert len(FUNCTIONS) >= 8


class _Call(nn.Module):
    """A public function by its name in the package, with one symbolic argument."""

    def __init__(self, name: str, rest: dict[str, Any], symbolic: str) -> None:
        super().__init__()
        self.call = name, rest, symbolic

    def forward(self, value):
        name, rest, symbolic = self.call
        return getattr(mk, name)(**rest, **{symbolic: value})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_one_node_of_torch_fx(name, generator):
    info = FUNCTIONS[name]
    given = cast(info.make(info.tests[0], torch.float32, DEVICE, generator), torch.float32)
    symbolic = next(key for key, value in given.items() if isinstance(value, torch.Tensor))
    value = given.pop(symbolic)
    model = _Call(name, given, symbolic)
    traced = fx.symbolic_trace(model)
    nodes = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert nodes[-1].target is getattr(mk, name)
    assert agree(traced(value), model(value))


def test_a_module_alone_says_that_it_is_one_node():
    with pytest.raises(NotImplementedError, match=r"torch\.fx: ScaledAttention .* Trace a module"):
        fx.symbolic_trace(mk.ScaledAttention(D, 2))


@pytest.mark.parametrize("sizes", [(2, 6), (3, 4)], ids=["as traced", "other sizes"])
@pytest.mark.parametrize("name", MODULES)
def test_torch_jit_trace(name, sizes, seed):
    model, given = _net(name, seed)
    with torch.no_grad():
        traced = torch.jit.trace(model, given, check_trace=False)
        given = inputs(name, seed + 1, sizes)
        assert agree(traced(*given), model(*given))


@pytest.mark.parametrize("name", MODULES)
def test_torch_jit_script_is_refused(name, seed):
    model, _ = _net(name, seed)
    kind = type(model.layer).__name__
    with pytest.raises(NotImplementedError, match=rf"torch\.jit\.script: {kind} cannot"):
        torch.jit.script(model)
