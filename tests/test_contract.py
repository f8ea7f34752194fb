"""What every op keeps, whatever it computes: OPS x cases x dtype x implementation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import DEVICE, also_for_a_gpu

from molex_kernels._backends import CUDA
from molex_kernels._dtypes import KERNEL_DTYPES
from molex_kernels.testing import load_ops
from molex_kernels.testing.budget import Errors, judge, measure
from molex_kernels.testing.contract import (
    Outcome,
    cast,
    misaligned,
    recorded,
    run,
    strided,
    upstream_for,
)
from molex_kernels.testing.opinfo import Case, Inputs, OpInfo

OPS = load_ops()


def _dtypes(impl: str) -> tuple[torch.dtype, ...]:
    if impl == "triton" and DEVICE.type == "cpu":
        return (torch.float32, torch.float16)  # the interpreter gets bf16 wrong
    return KERNEL_DTYPES


def _runs_here(impl: str) -> bool:
    if DEVICE.type == "cuda":
        return impl != "cpu" and (impl != "cuda" or CUDA.why_not() is None)
    return impl != "cuda"


def _matrix() -> list:
    # The launch configurations that `tests` do not reach take a GPU: an interpreter is too slow.
    on_gpu = DEVICE.type == "cuda"
    return [
        pytest.param(info, case, dtype, impl, id=f"{info.name}-{case.id}-{str(dtype)[6:]}-{impl}")
        for info in OPS.values()
        for case in (*info.tests, *info.large, *(info.compiled if on_gpu else ()))
        for impl in info.implementations
        if _runs_here(impl)
        if case in info.tests or impl != "triton" or on_gpu
        for dtype in _dtypes(impl)
    ]


def _per_implementation(cases: slice) -> list:
    return [
        pytest.param(info, case, impl, id=f"{info.name}-{case.id}-{impl}")
        for info in OPS.values()
        for case in info.tests[cases]
        for impl in info.implementations
        if _runs_here(impl)
    ]


@dataclass
class Expected:
    """The fp64 outcome, and what the reference makes of the same inputs in the dtype."""

    fp64: Outcome
    reference: Outcome


def _expect(info: OpInfo, inputs: Inputs, upstream: dict[str, torch.Tensor]) -> Expected:
    doubles = {name: gradient.double() for name, gradient in upstream.items()}
    return Expected(
        run(info, cast(inputs, torch.float64), "reference", doubles),
        run(info, inputs, "reference", upstream),
    )


def _errors(got: Outcome, expected: Expected, dtype: torch.dtype) -> dict[str, Errors]:
    """Of every floating result and gradient; everything else has to be equal."""
    errors = {}
    for name, result in got.results.items():
        want = expected.fp64.results[name]
        if result.is_floating_point():
            errors[name] = measure(name, result, want, expected.reference.results[name], dtype)
        else:
            assert torch.equal(result, want), f"{name}: differs"
    assert got.gradients.keys() == expected.fp64.gradients.keys()
    for name, gradient in got.gradients.items():
        reference = expected.reference.gradients[name]
        assert gradient.dtype == reference.dtype
        shown = f"gradient of {name}"
        truth = expected.fp64.gradients[name]
        errors[shown] = measure(shown, gradient, truth, reference, dtype)
    return errors


def _upstream(info, inputs, impl, generator, *, expanded=False):
    results = run(info, inputs, impl, None).results
    return upstream_for(results, generator, expanded=expanded)


@also_for_a_gpu  # the error budget in bf16 is proven only there
@pytest.mark.parametrize(("info", "case", "dtype", "impl"), _matrix())
def test_within_budget_and_repeatable(
    info: OpInfo, case: Case, dtype: torch.dtype, impl: str, generator: torch.Generator
):
    def draw() -> dict[str, Errors]:
        inputs = info.make(case, dtype, DEVICE, generator)
        upstream = _upstream(info, inputs, impl, generator)
        before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        first = run(info, inputs, impl, upstream)
        for name, value in before.items():
            assert torch.equal(inputs[name], value), f"{name} was modified"
        second = run(info, inputs, impl, upstream)
        for name in first.results:
            assert torch.equal(first.results[name], second.results[name]), (
                f"{name} differs when repeated"
            )
        for name in first.gradients:
            assert torch.equal(first.gradients[name], second.gradients[name]), f"gradient of {name}"
        return _errors(first, _expect(info, inputs, upstream), dtype)

    judge(draw)


@pytest.mark.parametrize(("info", "case", "impl"), _per_implementation(slice(None)))
def test_strided_inputs_and_expanded_gradients(
    info: OpInfo, case: Case, impl: str, generator: torch.Generator
):
    def draw() -> dict[str, Errors]:
        inputs = strided(info.make(case, torch.float32, DEVICE, generator))
        upstream = _upstream(info, inputs, impl, generator, expanded=True)
        got = run(info, inputs, impl, upstream)
        return _errors(got, _expect(info, inputs, upstream), torch.float32)

    judge(draw)


@pytest.mark.parametrize(
    ("info", "case", "impl"),
    [
        parameters
        for parameters in _per_implementation(slice(None))
        # Alignment is nothing to the interpreter, which would take minutes.
        if DEVICE.type == "cuda" or parameters.values[-1] != "triton"
    ],
)
def test_misaligned_inputs_and_gradients(
    info: OpInfo, case: Case, impl: str, generator: torch.Generator
):
    def draw() -> dict[str, Errors]:
        inputs = misaligned(info.make(case, torch.bfloat16, DEVICE, generator))
        upstream = misaligned(_upstream(info, inputs, impl, generator))
        got = run(info, inputs, impl, upstream)
        return _errors(got, _expect(info, inputs, upstream), torch.bfloat16)

    judge(draw)


@pytest.mark.parametrize(("info", "case", "impl"), _per_implementation(slice(0, 3)))
def test_operators_pass_opcheck(info: OpInfo, case: Case, impl: str, generator: torch.Generator):
    for layout in (lambda inputs: inputs, strided):
        inputs = layout(info.make(case, torch.float32, DEVICE, generator))
        upstream = _upstream(info, inputs, impl, generator)
        with recorded() as calls:
            run(info, inputs, impl, upstream)
        if impl not in ("reference", "sdpa"):
            assert calls, "no operator was called"
        for operator, args, kwargs in {call[0]: call for call in calls}.values():
            # Autograd stands outside the operators, so they are never given a tensor that wants it.
            torch.library.opcheck(operator, tuple(map(_detached, args)), kwargs)


def _detached(value):
    if isinstance(value, (list, tuple)):
        return [_detached(v) for v in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


def _compiled(info, case, impl, generator, backend):
    torch._dynamo.reset()
    function = torch.compile(info.function, fullgraph=True, backend=backend)

    def draw() -> dict[str, Errors]:
        inputs = info.make(case, torch.float32, DEVICE, generator)
        upstream = _upstream(info, inputs, impl, generator)
        got = run(info, inputs, impl, upstream, function)
        return _errors(got, _expect(info, inputs, upstream), torch.float32)

    judge(draw)


@pytest.mark.parametrize(("info", "case", "impl"), _per_implementation(slice(None)))
def test_traces_without_a_graph_break(
    info: OpInfo, case: Case, impl: str, generator: torch.Generator
):
    _compiled(info, case, impl, generator, "aot_eager")


@pytest.mark.parametrize(("info", "case", "impl"), _per_implementation(slice(0, 1)))
def test_compiles_with_inductor(info: OpInfo, case: Case, impl: str, generator: torch.Generator):
    _compiled(info, case, impl, generator, "inductor")


@pytest.mark.parametrize(
    ("info", "case"),
    [
        pytest.param(info, case, id=f"{info.name}-{case.id}")
        for info in OPS.values()
        if info.differentiable
        for case in info.tests
    ],
)
def test_reference_gradients_against_differences(
    info: OpInfo, case: Case, generator: torch.Generator
):
    """Autograd through the fp64 reference against central differences along a random direction."""
    inputs = cast(info.make(case, torch.float64, DEVICE, generator), torch.float64)
    names = [n for n in info.differentiable if isinstance(inputs.get(n), torch.Tensor)]
    upstream = _upstream(info, inputs, "reference", generator)
    gradients = run(info, inputs, "reference", upstream).gradients
    for name in names:
        if name not in gradients or not gradients[name].numel():
            continue
        direction = torch.randn(inputs[name].shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        ends = []
        for sign in (1, -1):
            moved = {**inputs, name: inputs[name] + sign * step * direction.to(DEVICE)}
            results = run(info, moved, "reference", None).results
            ends.append(sum((results[n] * g).sum() for n, g in upstream.items()))
        slope = (ends[0] - ends[1]) / (2 * step)
        along = (gradients[name] * direction.to(DEVICE)).sum()
        assert (slope - along).abs() <= 1e-6 * (1 + slope.abs()), f"gradient of {name}"


def test_fp64_runs_the_reference(generator: torch.Generator):
    for info in OPS.values():
        inputs = info.make(info.tests[0], torch.float64, DEVICE, generator)
        with recorded() as calls:
            info.function(**inputs)
        # A plan is of integers, so it has its kernels whatever the dtype.
        names = {operator.name() for operator, _, _ in calls}
        assert all("route_plan" in name for name in names), f"{info.name} ran {names}"
