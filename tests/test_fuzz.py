"""Good calls with one argument spoilt: an error of ours that names it, or a right-shaped result.

Sizes of 0 are for all arguments at once, forward and backward; everything else is for one argument
at a time, of every op and of every module's constructor and forward.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import modules
import pytest
import torch
from conftest import DEVICE, is_slow, runs_here
from torch import Tensor
from torch.utils import _pytree as pytree

import molex_kernels as mk
from molex_kernels._dtypes import KERNEL_DTYPES
from molex_kernels.testing import Case, OpInfo, calls, load_ops
from molex_kernels.testing.cases import rpc_attention as cases_of_rpc_attention

OPS = load_ops()


def _balance(expert_index: Any, logits: Any, **options: Any) -> Tensor:
    """The loss of a routing whose weights, which it does not read, are not there."""
    return mk.load_balance_loss(mk.Routing(expert_index, None, logits), **options)


OPS["load_balance_loss"] = dataclasses.replace(OPS["load_balance_loss"], function=_balance)
OURS = (TypeError, ValueError, NotImplementedError)
RARE = 29  # a size that nothing else has, so that it can be told where it went

# Arguments of the cases that are parts of an argument, or other names for it, in the function.
PUBLIC = {
    "s0": "state",
    "s1": "state",
    "s2": "state",
    "step": "state",
    "norm_weight": "norm",
    "norm_bias": "norm",
    "norm_eps": "norm",
    "eps": "norm",
    "a": "lora",
    "b": "lora",
    "scaling": "lora",
    "mu": "mu",
    "gamma": "gamma",
    **dict.fromkeys(("out1", "out2", "in1", "in2"), "curvature"),
    **dict.fromkeys(("bias_out1", "bias_out2"), "bias_curvature"),
}
# Switches of the cases' own, which the function does not have.
NOT_PUBLIC = {"rule", "table", "shared", "step"}

Change = Callable[[Any], Any]


def _nested(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([t.detach(), t.detach()])


# What is never a tensor that the argument may be: the error names just this argument.
NO_SUCH_TENSOR: dict[str, Change] = {
    "int": lambda t: 3,
    "str": lambda t: "x",
    "list": lambda t: [1.0],
    "sparse": lambda t: t.to_sparse(),
    "nested": _nested,
    "complex": lambda t: t.to(torch.complex64),
}
# What does not fit the others: the error names this one or another.
DOES_NOT_FIT: dict[str, Change] = {
    "none": lambda t: None,
    "rank": lambda t: t[None, None, None],
    "first": lambda t: t[0] if t.dim() and t.shape[0] else t[None, None],
    "empty": lambda t: t.narrow(-1, 0, 0) if t.dim() else t,
    "longer": lambda t: torch.cat((t, t), -1) if t.dim() else t.expand(2),
    "double": lambda t: t.double(),
    "bool": lambda t: t.bool(),
    "meta": lambda t: t.to("meta"),
}
NUMBERS = (2**70, -(2**70), 10**400, -(10**400), math.nan, math.inf, -math.inf, "x", None, [], 1j)
NOT_NUMBERS = ("x", [], 1j)
NOT_FLAGS = (0, 1, "no", None, [])


def _cases(info: OpInfo, count: int, seed: int) -> list[Case]:
    """Some of the op's cases, others in every run."""
    return random.Random(seed).sample(info.tests, min(count, len(info.tests)))


def _shapes(results: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(result.shape) for name, result in results.items()}


def _without(size: int) -> int:
    """0 in the place of the rare size and of what is made of it, as 2I of gated experts."""
    return size if size % RARE else 0


def _cut(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[tuple(slice(_without(size)) for size in value.shape)]
    if isinstance(value, int) and not isinstance(value, bool):
        return _without(value)
    return value


def _sizes_of_zero(info: OpInfo, seed: int) -> Iterator[Case]:
    for case in _cases(info, 4, seed):
        for letter in case.sizes:
            yield dataclasses.replace(case, sizes={**case.sizes, letter: RARE})


IMPLEMENTATIONS = [
    (name, impl)
    for name, info in OPS.items()
    for impl in info.implementations
    if runs_here(impl) and not is_slow(impl)
]


@pytest.mark.parametrize(("name", "impl"), IMPLEMENTATIONS)
def test_sizes_of_zero(name: str, impl: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # No gradient is compared, so that inputs may be anywhere.
    monkeypatch.setattr(cases_of_rpc_attention, "_clear_kinks", lambda *_: None)
    info = OPS[name]
    ran = 0
    for case, dtype in itertools.product(_sizes_of_zero(info, seed), KERNEL_DTYPES):
        generator = torch.Generator().manual_seed(seed)
        try:
            inputs = info.make(case, dtype, DEVICE, generator)
            shapes = _shapes(calls.run(info, inputs, "reference", None).results)
        except (*OURS, RuntimeError):
            continue  # as many chosen experts, say, as there are not
        inputs = {key: _cut(value) for key, value in inputs.items()}
        try:
            found = calls.run(info, inputs, impl, None).results
            upstream = {key: torch.ones_like(r) for key, r in found.items()}
            outcome = calls.run(info, inputs, impl, upstream)
        except (TypeError, ValueError) as error:
            if not _names(error, _arguments(info, inputs)):
                pytest.fail(f"{case.id}: {error}")
            continue
        ran += 1
        want = {key: tuple(map(_without, shape)) for key, shape in shapes.items()}
        assert _shapes(outcome.results) == want, case.id
        for key, value in (*outcome.results.items(), *outcome.gradients.items()):
            assert value.isfinite().all(), f"{case.id}-{dtype}: {key}"
    assert ran


# "sdpa" is PyTorch's.
OURS_ALONE = [(n, i) for n, i in IMPLEMENTATIONS if i not in ("reference", "sdpa")]


@pytest.mark.parametrize("factor", [1e3, 1e5])
@pytest.mark.parametrize(("name", "impl"), OURS_ALONE)
def test_large_numbers(name: str, impl: str, factor: float, seed: int) -> None:
    """What is finite in fp32 with PyTorch's operators is finite here, forward and backward."""
    info = OPS[name]
    ran = 0
    for case in _cases(info, 6, seed):
        generator = torch.Generator().manual_seed(seed)
        inputs = info.make(case, torch.float32, DEVICE, generator)
        for key in info.differentiable:
            if isinstance(inputs.get(key), Tensor):
                inputs[key] = inputs[key] * factor
        if "scale" in inspect.signature(info.function).parameters:
            inputs["scale"] = 0.1  # no power of two, so that scores are rounded
        results = calls.run(info, inputs, "reference", None).results
        upstream = {key: torch.ones_like(r) for key, r in results.items()}
        want, got = (calls.run(info, inputs, i, upstream) for i in ("reference", impl))
        expected, found = ({**o.results, **o.gradients} for o in (want, got))
        # Near the largest number the order of a sum decides.
        if not all((value.abs() < 1e30).all() for value in expected.values()):
            continue
        ran += 1
        for key in expected:
            assert found[key].isfinite().all(), f"{case.id}: {key}"
    assert ran


def _arguments(info: OpInfo, inputs: dict[str, Any]) -> set[str]:
    """Every name that an error may begin with."""
    names = {PUBLIC.get(key, key) for key in inputs} | set(inputs)
    # The losses of a routing take it whole; what is missing may be what is named.
    return names | {"routing", "coeff", "logits", "experts", "deltas", "bias", "base_bias"}


def _names(error: Exception, names: set[str]) -> bool:
    """Whether the error begins with one of the names, or tells where the op can run."""
    text = str(error)
    return any(re.match(rf"(rule\.)?{re.escape(name)}\b", text) for name in names) or (
        isinstance(error, NotImplementedError) and "meta" in text
    )


def _spoilt(inputs: dict[str, Any]) -> Iterator[tuple[str, str, Any, bool]]:
    """(argument, what was done to it, its new value, whether the error has to name just it)."""
    for key, value in inputs.items():
        if isinstance(value, Tensor):
            for kind, change in NO_SUCH_TENSOR.items():
                if kind != "int" or key not in ("threshold", "gamma"):  # which may be numbers
                    yield key, kind, change(value), True
            for kind, change in DOES_NOT_FIT.items():
                yield key, kind, change(value), False
        elif key in NOT_PUBLIC:
            continue
        elif isinstance(value, bool):
            for other in NOT_FLAGS if key != "causal" else ("x", None, [], 3):
                yield key, "flag", other, True
        elif isinstance(value, int | float):
            for number in NUMBERS:
                # Without this one, another may be too much.
                yield key, "number", number, number is not None
        elif isinstance(value, str):
            # A threshold may be a number, too.
            for other in ("no such", [], {}, *(() if key == "threshold" else (3,))):
                yield key, "option", other, True


@pytest.mark.parametrize("name", OPS)
def test_one_bad_argument(name: str, seed: int) -> None:
    info = OPS[name]
    wrong = []
    for case in _cases(info, 3, seed):
        generator = torch.Generator().manual_seed(seed)
        inputs = info.make(case, torch.float32, DEVICE, generator)
        inputs.pop("table", None)  # the cases' own switch
        if inputs.get("rule") not in ("heavy_ball", "nesterov"):
            inputs.pop("mu", None)  # which other rules do not have
        shapes = _shapes(calls.run(info, inputs, "reference", None).results)
        for (key, kind, value, alone), impl in itertools.product(
            _spoilt(inputs), (None, "reference")
        ):
            names = {key, PUBLIC.get(key, key)} if alone else _arguments(info, inputs)
            if name == "load_balance_loss" and key in ("expert_index", "logits"):
                names = {"routing"}
            what = f"{case.id} impl={impl}: {key} {kind} {_short(value)}"
            try:
                results = info.results(info.function(**{**inputs, key: value}, impl=impl))
            except OURS as error:
                if not _names(error, names):
                    wrong.append(f"{what}: {type(error).__name__}: {error}")
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                wrong.extend(
                    f"{what}: {reason}" for reason in _faults(kind, value, results, shapes)
                )
    assert not wrong, "\n".join(wrong[:40])


def _faults(
    kind: str, value: Any, results: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]
) -> Iterator[str]:
    """Why the result of a call with a spoilt argument may not be one."""
    if kind in ("option", "flag", *NO_SUCH_TENSOR) or (kind == "number" and value in NOT_NUMBERS):
        yield "no error"
    if kind == "number":
        for key, result in results.items():
            if tuple(result.shape) != shapes[key]:
                yield f"{key} has shape {list(result.shape)}"
            # Overflow from a huge factor is arithmetic; NaN is not.
            if result.isnan().any():
                yield f"{key} is NaN"


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 2**64:
        return "of many digits"
    return "" if isinstance(value, Tensor) else repr(value)


def _of_linear(**options: Any) -> Any:
    return mk.CAMExLinear.from_linear(**{"linear": torch.nn.Linear(4, 6), **options})


def _of_transformers(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2Model(config)
    return mk.LayerExpertStack.from_transformers(**{"model": model, **options})


# By name: what makes it, good arguments, and whose options are its own.
_EXPERTS = {"d_model": 4, "d_hidden": 5, "num_experts": 3}
_ROUTER = {"d_model": 4, "num_experts": 3, "top_k": 2}
_CURVED = {"in_features": 4, "out_features": 6, "num_experts": 3}
CONSTRUCTORS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[Any, ...]]] = {
    "TopKRouter": (mk.TopKRouter, _ROUTER, ()),
    "ACRouter": (mk.ACRouter, _ROUTER, ()),
    "MoEMLP": (mk.MoEMLP, _EXPERTS, ()),
    "MomentumMoE": (mk.MomentumMoE, {**_EXPERTS, "top_k": 2, "rule": mk.HeavyBall(0.7)}, ()),
    "CAMExLinear": (mk.CAMExLinear, _CURVED, ()),
    "CAMExLinear.from_linear": (
        _of_linear,
        {"num_experts": 3},
        (mk.CAMExLinear.from_linear, mk.CAMExLinear),
    ),
    "CAMExMLP": (mk.CAMExMLP, {"d_model": 4, "d_hidden": 6, "num_experts": 3}, (mk.CAMExLinear,)),
    "LayerExpertStack.from_transformers": (
        _of_transformers,
        {"individual_gates": True},
        (mk.LayerExpertStack.from_transformers,),
    ),
    "RPCAttention": (mk.RPCAttention, {"dim": 4, "num_heads": 2}, ()),
    "ScaledAttention": (
        mk.ScaledAttention,
        {"dim": 4, "num_heads": 2, "num_tokens": 5, "kind": "matrix"},
        (),
    ),
    "HeavyBall": (mk.HeavyBall, {"mu": 0.7}, ()),
    "Nesterov": (mk.Nesterov, {"mu": 0.7}, ()),
    "Adam": (mk.Adam, {}, ()),
    "RobustMomentum": (
        mk.RobustMomentum,
        {"smoothness": 10.0, "convexity": 0.5, "rho": 0.9},
        (),
    ),
    "AdEMAMix": (mk.AdEMAMix, {}, ()),
    "Signum": (mk.Signum, {"beta": 0.5}, ()),
    "Mars": (mk.Mars, {}, ()),
}
# torch's own, and what any value is right for.
OTHERS = {"device", "dtype", "process_group", "options", "self", "kwargs", "args"}
# What whoever hands options on to another constructor has from elsewhere.
_OF_THE_LAYER = {"in_features", "out_features", "bias"}


def _options(name: str) -> Iterator[tuple[str, str]]:
    """(option, its annotation) of a constructor."""
    make, _, more = CONSTRUCTORS[name]
    for source in more or (make,):
        for option, parameter in inspect.signature(source).parameters.items():
            if option not in (OTHERS | (_OF_THE_LAYER if more else set())):
                yield option, str(parameter.annotation)


def _bad(annotation: str) -> tuple[Any, ...]:
    if annotation == "bool":
        return (*NOT_FLAGS, object())
    if "int" in annotation or "float" in annotation or annotation == "Number":
        huge = (2**70, 10**400) if "int" in annotation else (10**400,)
        return ("no such", [], {}, math.nan, 1j, *huge)
    # There may be no names at all.
    return ("no such", 3, object(), *(() if "Sequence" in annotation else ([], {})))


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_one_bad_option_of_a_constructor(name: str) -> None:
    make, good, _ = CONSTRUCTORS[name]
    wrong = []
    for option, annotation in _options(name):
        for value in _bad(annotation):
            what = f"{option}={_short(value)}"
            try:
                with torch.device("meta"):
                    make(**{**good, option: value})
            except (TypeError, ValueError) as error:
                if not str(error).startswith(f"{option}: "):
                    wrong.append(f"{what}: {error}")
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                wrong.append(f"{what}: no error")
    assert not wrong, "\n".join(wrong)


LOADERS = [
    name for name in modules.MODULES if hasattr(getattr(mk, name.split("-")[0]), "load_published")
]


@pytest.mark.parametrize("name", LOADERS)
def test_a_bad_checkpoint(name: str, seed: int) -> None:
    module = modules.make(name, seed)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="state_dict: expected one name ending in") as missing:
        module.load_published({})
    for bad in (3, None, "x", [], torch.zeros(3)):
        with pytest.raises(TypeError, match=r"^state_dict: expected tensors by name, got "):
            module.load_published(bad)
    (first,) = re.findall("ending in '(.*)',", str(missing.value))
    for value in (3, None, torch.zeros(1, 2, 3, 4, 5), torch.zeros(2, dtype=torch.int8)):
        with pytest.raises((TypeError, ValueError), match=rf"^({re.escape(first)}|state_dict): "):
            module.load_published({first: value})
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", modules.MODULES)
def test_one_bad_argument_of_a_module(name: str, seed: int) -> None:
    module = modules.make(name, seed)
    good = modules.inputs(name, seed)
    arguments = list(inspect.signature(module.forward).parameters)
    # What a function calls the parts of a routing.
    parts = ("expert_index", "expert_weight", "prev_index", "prev_weight")
    names = {*arguments, *parts, "gate_weight"}
    shapes = [t.shape for t in modules.floats(module(*good))]
    wrong = []
    for place in range(len(good)):
        argument = good[place]
        changes = {**NO_SUCH_TENSOR, **DOES_NOT_FIT}
        if isinstance(argument, Tensor):
            spoilt = {kind: change(argument) for kind, change in changes.items()}
        else:
            spoilt = {"int": 3, "str": "xy", "pair": ("x", "y"), "empty tuple": ()}
            for part, (kind, change) in itertools.product(
                range(len(argument[:2])), changes.items()
            ):
                parts = list(argument)
                parts[part] = change(parts[part])
                spoilt[f"{kind} in {part}"] = tuple(parts)
        for kind, value in spoilt.items():
            what = f"{arguments[place]} {kind}"
            try:
                out = module(*good[:place], value, *good[place + 1 :])
            except OURS as error:
                if not _names(error, names):
                    wrong.append(f"{what}: {type(error).__name__}: {error}")
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                leaves = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
                if kind in NO_SUCH_TENSOR or not all(t.isfinite().all() for t in leaves):
                    wrong.append(f"{what}: no error")
                if kind == "double in 0" and [t.shape for t in modules.floats(out)] != shapes:
                    wrong.append(f"{what}: another shape")
    assert not wrong, "\n".join(wrong[:40])
