"""What every op keeps, whatever it computes: OPS x cases x dtype x implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, also_for_a_gpu, calls_of, dtypes_of, is_slow, runs_here

from molex_kernels.testing import contract, load_ops
from molex_kernels.testing.calls import recorded
from molex_kernels.testing.opinfo import Case, OpInfo

OPS = load_ops()
# On an H200 a gradient was off by 6.0e-7 of its largest number, where 3.5e-7 are allowed.
THEIRS = pytest.mark.xfail(reason="PyTorch's own attention in fp32, on a GPU", strict=False)


def _matrix() -> list:
    # The launch configurations that `tests` do not reach take a GPU: an interpreter is too slow.
    on_gpu = DEVICE.type == "cuda"
    return [
        pytest.param(
            *(info, case, dtype, impl),
            id=f"{info.name}-{case.id}-{str(dtype)[6:]}-{impl}",
            marks=THEIRS if on_gpu and (impl, dtype) == ("sdpa", torch.float32) else (),
        )
        for info in OPS.values()
        for case in (*info.tests, *info.large, *(info.compiled if on_gpu else ()))
        for impl in info.implementations
        if runs_here(impl)
        if case in info.tests or impl != "triton" or on_gpu
        for dtype in dtypes_of(impl)
    ]


def _per_implementation(cases: slice) -> list:
    return [
        pytest.param(info, case, impl, id=f"{info.name}-{case.id}-{impl}")
        for info in OPS.values()
        for case in info.tests[cases]
        for impl in info.implementations
        if runs_here(impl)
    ]


@also_for_a_gpu  # the error budget in bf16 is proven only there
@pytest.mark.parametrize(("info", "case", "dtype", "impl"), _matrix())
def test_within_budget_and_repeatable(
    info: OpInfo, case: Case, dtype: torch.dtype, impl: str, seed: int
):
    contract.check_budget(info, case, dtype, impl, DEVICE, seed, calls=calls_of(impl))


@pytest.mark.parametrize(("info", "case", "impl"), _per_implementation(slice(None)))
def test_strided_inputs_and_expanded_gradients(info: OpInfo, case: Case, impl: str, seed: int):
    contract.check_strided(info, case, torch.float32, impl, DEVICE, seed, calls=calls_of(impl))


@pytest.mark.parametrize(
    ("info", "case", "impl"),
    [
        parameters
        for parameters in _per_implementation(slice(None))
        # Alignment is nothing to the interpreter, which would take minutes.
        if DEVICE.type == "cuda" or parameters.values[-1] != "triton"
    ],
)
def test_misaligned_inputs_and_gradients(info: OpInfo, case: Case, impl: str, seed: int):
    contract.check_misaligned(info, case, torch.bfloat16, impl, DEVICE, seed, calls=calls_of(impl))


@pytest.mark.parametrize(
    ("info", "case", "dtype", "impl"),
    [
        pytest.param(info, case, dtype, impl, id=f"{info.name}-{case.id}-{str(dtype)[6:]}-{impl}")
        for info in OPS.values()
        for case in info.masked
        for impl in info.implementations
        if runs_here(impl)
        for dtype in (torch.float32, torch.float16)
        if dtype == torch.float32 or not is_slow(impl)
    ],
)
def test_what_is_left_out_may_hold_anything(
    info: OpInfo, case: Case, dtype: torch.dtype, impl: str, seed: int
):
    contract.check_left_out(info, case, dtype, impl, DEVICE, seed)


@pytest.mark.parametrize(
    ("info", "case", "name"),
    [
        pytest.param(info, case, name, id=f"{op}-{case.id}-{name}")
        for op in ("grouped_gemm", "moe_mlp", "moe_mlp_momentum", "layer_linear")
        for info in (OPS[op],)
        for case in info.masked
        if case.options.get("routing") != "elsewhere"  # which is not theirs
        for name in info.baselines
    ],
)
def test_baselines_leave_out_as_much(info: OpInfo, case: Case, name: str, seed: int):
    def baseline(*arguments: Any, impl: str, **options: Any) -> Any:
        return info.baselines[name](*arguments, **options)

    try:
        contract.check_left_out(
            info, case, torch.float32, "reference", DEVICE, seed, function=baseline
        )
    except NotImplementedError as error:
        pytest.skip(str(error))


# Every expert, layer or token counts there: what is weighed by 0 is read, and a NaN spreads.
NOTHING_LEFT_OUT = {
    *("route_from_logits", "route_from_index"),
    *("topk_route", "route_plan", "momentum_update", "layer_mix", "scaled_attention"),
    *("camex_linear", "camex_deltas", "camex_merge"),
}


def test_every_op_says_what_it_leaves_out():
    silent = {name for name, info in OPS.items() if info.left_out is None or not info.masked}
    assert silent == NOTHING_LEFT_OUT


@pytest.mark.parametrize(("info", "case", "impl"), _per_implementation(slice(0, 3)))
def test_operators_pass_opcheck(info: OpInfo, case: Case, impl: str, seed: int):
    # Implementations share the operators: an interpreted one, which is slow, shows its kernels.
    tests = contract.OPCHECKS_OF_A_KERNEL if is_slow(impl) else contract.OPCHECKS
    contract.check_opcheck(info, case, torch.float32, impl, DEVICE, seed, tests=tests)


@pytest.mark.parametrize(("info", "case", "impl"), _per_implementation(slice(None)))
def test_traces_without_a_graph_break(info: OpInfo, case: Case, impl: str, seed: int):
    contract.check_traces(info, case, torch.float32, impl, DEVICE, seed)


@pytest.mark.parametrize(("info", "case", "impl"), _per_implementation(slice(0, 1)))
def test_compiles_with_inductor(info: OpInfo, case: Case, impl: str, seed: int):
    contract.check_traces(info, case, torch.float32, impl, DEVICE, seed, backend="inductor")


@pytest.mark.parametrize(
    ("info", "case"),
    [
        pytest.param(info, case, id=f"{info.name}-{case.id}")
        for info in OPS.values()
        if info.differentiable
        for case in info.tests
    ],
)
def test_reference_gradients_against_differences(info: OpInfo, case: Case, seed: int):
    contract.check_reference_gradients(info, case, DEVICE, seed)


def test_fp64_runs_the_reference(generator: torch.Generator):
    for info in OPS.values():
        inputs = info.make(info.tests[0], torch.float64, DEVICE, generator)
        with recorded() as calls:
            info.function(**inputs)
        # A plan is of integers, so it has its kernels whatever the dtype.
        names = {operator.name() for operator, _, _ in calls}
        assert all("route_plan" in name for name in names), f"{info.name} ran {names}"
