"""Every op's launches on a GPU that there is not: straight to the driver, and through Triton.

Run by test_launch.py in a process of its own, since here no kernel is interpreted. Prints what
differs, one line each.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import fake_gpu
from molex_kernels._triton import direct
from molex_kernels._triton.arguments import blocks_of, strided
from molex_kernels._triton.tuning import Config
from molex_kernels.testing import Case, OpInfo, calls, load_ops

DRIVER = fake_gpu.install()
DRIVER.keeps = True
DTYPES = (torch.float32, torch.bfloat16)
FEW = 5  # cases of an op
Launches = list[tuple[Any, ...]]


def launches_of(call: Callable[[], object]) -> Launches:
    """(grid, specialisation, arguments) of each launch."""
    DRIVER.launches.clear()
    call()
    return [(grid, compiled, described(args)) for grid, compiled, args in DRIVER.launches]


def through_triton(call: Callable[[], object]) -> Launches:
    """The same with `kernel[grid]`, which specialises every launch anew."""
    given, direct.is_free = direct.is_free, lambda: False
    try:
        return launches_of(call)
    finally:
        direct.is_free = given


def described(arg: Any) -> Any:
    """What the driver can tell of an argument; memory that was allocated anew is elsewhere."""
    if isinstance(arg, tuple):
        return tuple(map(described, arg))
    if isinstance(arg, TensorDescriptor):
        return "blocks", described(arg.base), arg.shape, arg.strides, arg.block_shape
    if isinstance(arg, Tensor):
        return arg.dtype, arg.shape, arg.stride(), arg.data_ptr() % 16
    return type(arg), arg


def differences(what: str, got: Launches, want: Launches) -> Iterator[str]:
    """Where one launch is not the other."""
    if len(got) != len(want):
        yield f"{what}: {len(got)} launches, expected {len(want)}"
    for number, (one, other) in enumerate(zip(got, want, strict=False)):
        for part, a, b in zip(("grid", "specialisation", "arguments"), one, other, strict=True):
            if a != b:
                yield f"{what}: launch {number}: {part} {a}, expected {b}"


def calls_of(info: OpInfo, case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """The case in both dtypes, aligned and not, with strides of 1 and without."""
    for dtype in DTYPES:
        made = info.make(case, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
        for layout in (dict, calls.misaligned, calls.strided):
            inputs = layout(made)
            yield f"{dtype} {layout.__name__}", lambda inputs=inputs: _call(info, inputs)


def _call(info: OpInfo, inputs: dict[str, Any]) -> None:
    results = calls.run(info, inputs, "triton", None).results
    upstream = {name: torch.zeros_like(result) for name, result in results.items()}
    if info.differentiable:
        calls.run(info, inputs, "triton", upstream)


def ops() -> Iterator[str]:
    """After any of its neighbours, each call launches what it would launch alone."""
    with_blocks = 0
    for info in load_ops().values():
        if "triton" not in info.implementations:
            continue
        made = [
            (f"{info.name} {case.id} {what}", call)
            for case in (*info.tests[:: max(len(info.tests) // FEW, 1)], *info.compiled[:FEW])
            for what, call in calls_of(info, case)
        ]
        wanted = [through_triton(call) for _, call in made]
        if not any(wanted):
            yield f"{info.name}: no launch"
        given = [arg for launches in wanted for _, _, args in launches for arg in args]
        with_blocks += sum(isinstance(arg, tuple) and arg[0] == "blocks" for arg in given)
        for again in range(4):
            for (what, call), want in zip(made, wanted, strict=True):
                yield from differences(f"{what} {again}", launches_of(call), want)
    if not with_blocks:
        yield "no launch with a descriptor"


@triton.jit
def _toy(
    table,
    blocks,
    x_ptr,
    number,
    other,
    IS_ODD: triton.language.constexpr,
    BLOCK: triton.language.constexpr,
):
    pass


NUMBERS = (0, 1, 2, 16, 17, 32, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -1, True, False, 0.5, 1.0, None)
TENSORS = (
    torch.zeros(64),
    torch.zeros(65)[1:],
    torch.zeros(64, dtype=torch.float16),
    torch.zeros(64, dtype=torch.int32),
)


def values() -> Iterator[str]:
    """One argument after another takes each value, behind a hit of all the others."""
    all_blocks = [
        blocks_of(x, (2, 2, 8), (16, 8, 1), block)
        for x in (TENSORS[0], TENSORS[0][4:], TENSORS[2])
        for block in ((1, 2, 8), (2, 1, 8), (1, 2, 16))
    ]
    tables = [strided(t) for t in (TENSORS[0], TENSORS[1], TENSORS[0][::2], TENSORS[0].view(8, 8))]
    places = (tables, [*all_blocks, None], TENSORS, NUMBERS, NUMBERS, (True, False), (16, 32))
    good = [values[0] for values in places]
    made = [
        [*good[:place], value, *good[place + 1 :]]
        for place, values in enumerate(places)
        for value in values
    ]
    for (one, args), again in itertools.product(enumerate(made), range(2)):

        def call(args: list[Any] = args) -> None:
            config = Config({"BLOCK": args[6]}, 4, 3)
            direct.start(_toy, (3, 2), args[:5], {"IS_ODD": args[5]}, config)

        yield from differences(f"toy {one} {again}", launches_of(call), through_triton(call))


def hits() -> Iterator[str]:
    """Of two equal launches the second does not pass through Triton, unless `run` was replaced."""
    config = Config({"BLOCK": 16}, 4, 3)
    through = []
    given = triton.JITFunction.run

    def watched(kernel: Any, *args: Any, **options: Any) -> Any:
        through.append(kernel)
        return given(kernel, *args, **options)

    def call() -> None:
        direct.start(_toy, (7,), [None, None, TENSORS[0], 5, 6], {"IS_ODD": False}, config)

    call()
    binder, _toy.device_caches[0] = _toy.device_caches[0], None
    if len(launches_of(call)) != 1:
        yield "a launch that was kept did not reach the driver"
    _toy.device_caches[0] = binder
    triton.JITFunction.run = functools.wraps(given)(watched)
    call()
    if len(through) != 1:
        yield f"{len(through)} launches passed through the `run` that replaced Triton's, not 1"


if __name__ == "__main__":
    for line in {"ops": ops, "values": values, "hits": hits}[sys.argv[1]]():
        print(line)
