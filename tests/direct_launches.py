"""Every op's launches on a GPU that there is not: replayed, straight to the driver, by Triton.

Run by test_launch.py in a process of its own, since here no kernel is interpreted. Prints what
differs, one line each.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import fake_gpu
from molex_kernels._triton import direct, replay
from molex_kernels._triton.arguments import blocks_of, strided
from molex_kernels._triton.tuning import Config
from molex_kernels.testing import Case, OpInfo, calls, load_ops

DRIVER = fake_gpu.install()
DRIVER.keeps = True
DTYPES = (torch.float32, torch.bfloat16)
FEW = 5  # cases of an op
Launches = list[tuple[Any, ...]]
Numbers = dict[int, int]  # of memory
Tensors = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # given to a call, and made by it


def launches_of(call: Callable[[], Tensors]) -> Launches:
    """(grid, specialisation, arguments) of each launch, and the tensors that the call hands out."""
    DRIVER.launches.clear()
    given, made = call()
    numbers: Numbers = {}
    described(given, numbers)
    launches = [
        (grid, compiled, described(args, numbers)) for grid, compiled, args in DRIVER.launches
    ]
    return [*launches, ((), "results", described(made, numbers))]


def through_triton(call: Callable[[], Tensors]) -> Launches:
    """The same with `kernel[grid]`, which specialises every launch anew."""
    given, direct.is_free = direct.is_free, lambda: False
    try:
        return launches_of(call)
    finally:
        direct.is_free = given


def described(arg: Any, numbers: Numbers) -> Any:
    """What the driver can tell of an argument; where its memory is, by the order of first sight."""
    if isinstance(arg, tuple):
        return tuple(described(part, numbers) for part in arg)
    if isinstance(arg, TensorDescriptor):
        return "blocks", described(arg.base, numbers), arg.shape, arg.strides, arg.block_shape
    if isinstance(arg, Tensor):
        place = numbers.setdefault(arg.data_ptr(), len(numbers)) if arg.numel() else None
        return arg.dtype, arg.shape, arg.stride(), arg.data_ptr() % 16, place
    return type(arg), arg


def differences(what: str, got: Launches, want: Launches) -> Iterator[str]:
    """Where one launch is not the other."""
    if len(got) != len(want):
        yield f"{what}: {len(got)} launches, expected {len(want)}"
    for number, (one, other) in enumerate(zip(got, want, strict=False)):
        for part, a, b in zip(("grid", "specialisation", "arguments"), one, other, strict=True):
            if a != b:
                yield f"{what}: launch {number}: {part} {a}, expected {b}"


def calls_of(info: OpInfo, case: Case) -> Iterator[tuple[str, Callable[[], Tensors]]]:
    """The case in both dtypes, aligned and not, with strides of 1 and without; of new tensors."""
    for dtype in DTYPES:
        made = info.make(case, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
        for layout in (dict, calls.misaligned, calls.strided):
            yield (
                f"{dtype} {layout.__name__}",
                lambda made=made, layout=layout: _call(info, layout(_cloned(made))),
            )


def _cloned(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def _call(info: OpInfo, inputs: dict[str, Any]) -> Tensors:
    results = calls.run(info, inputs, "triton", None).results
    upstream = {name: torch.zeros_like(result) for name, result in results.items()}
    made = [*results.values()]
    if info.differentiable:
        outcome = calls.run(info, inputs, "triton", upstream)
        made += [*outcome.results.values(), *outcome.gradients.values()]
    given = [v for v in (*inputs.values(), *upstream.values()) if isinstance(v, Tensor)]
    return tuple(given), tuple(made)


PLAYED: list[replay.Tape] = []


def _play(tape: replay.Tape, tensors: list[Any], play: Any = replay.Tape.play) -> Any:
    PLAYED.append(tape)
    return play(tape, tensors)


replay.Tape.play = _play  # type: ignore[method-assign]


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
        if not any(len(launches) > 1 for launches in wanted):
            yield f"{info.name}: no launch"
        given = [arg for launches in wanted for _, _, args in launches[:-1] for arg in args]
        with_blocks += sum(isinstance(arg, tuple) and arg[0] == "blocks" for arg in given)
        PLAYED.clear()
        for again in range(4):
            for (what, call), want in zip(made, wanted, strict=True):
                yield from differences(f"{what} {again}", launches_of(call), want)
        if not PLAYED:
            yield f"{info.name}: never replayed"
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

        def call(args: list[Any] = args) -> Tensors:
            config = Config({"BLOCK": args[6]}, 4, 3)
            direct.start(_toy, (3, 2), args[:5], {"IS_ODD": args[5]}, config)
            return (), ()

        yield from differences(f"toy {one} {again}", launches_of(call), through_triton(call))


def hits() -> Iterator[str]:
    """Of two equal launches the second does not pass through Triton, unless `run` was replaced."""
    config = Config({"BLOCK": 16}, 4, 3)
    through = []
    given = triton.JITFunction.run

    def watched(kernel: Any, *args: Any, **options: Any) -> Any:
        through.append(kernel)
        return given(kernel, *args, **options)

    def call() -> Tensors:
        direct.start(_toy, (7,), [None, None, TENSORS[0], 5, 6], {"IS_ODD": False}, config)
        return (), ()

    call()
    binder, _toy.device_caches[0] = _toy.device_caches[0], None
    if len(launches_of(call)) != 2:  # the results are the last
        yield "a launch that was kept did not reach the driver"
    _toy.device_caches[0] = binder
    triton.JITFunction.run = functools.wraps(given)(watched)
    call()
    if len(through) != 1:
        yield f"{len(through)} launches passed through the `run` that replaced Triton's, not 1"


def _start_toy(*tensors: Tensor) -> None:
    for tensor in tensors:
        args = [None, None, tensor, 5, 6]
        direct.start(_toy, (7,), args, {"IS_ODD": False}, Config({"BLOCK": 16}, 4, 3))


def _replayed(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """A launcher's calls after three of them, when all but the first two are replayed."""
    return replay.Replayed(lambda a: function(*a), namedtuple("arguments", names))


def tapes() -> Iterator[str]:
    """What is recorded of a call holds for the next one, or it is not recorded."""
    x, other = torch.zeros(64), torch.ones(64)

    def both(a: Tensor, b: Tensor) -> Tensor:
        _start_toy(a, b)
        return a.new_empty(3)

    call = _replayed(both, "a", "b")
    for _ in range(3):
        call(x, x)  # one tensor twice: the next time it may be two
    DRIVER.launches.clear()
    call(x, other)
    found = [args[2] for _, _, args in DRIVER.launches]
    if not (PLAYED and found[0] is x and found[1] is other):
        yield "an argument stood for another one"

    known = torch.zeros(64)
    reasons: dict[str, Callable[[Tensor], Any]] = {
        "a tensor from elsewhere": lambda a: _start_toy(known) or a.new_empty(3),
        "a number read from a tensor": lambda a: a.new_empty(int(a.sum()) + 3),
        "several results": lambda a: a.new_empty(8).split(4)[0],
    }
    for reason, function in reasons.items():
        PLAYED.clear()
        call = _replayed(function, "a")
        for _ in range(4):
            call(x)
        if PLAYED:
            yield f"{reason} was recorded"

    PLAYED.clear()
    call = _replayed(lambda a: _start_toy(a) or a.new_empty(3), "a")
    for _ in range(3):
        call(x)
    _toy.pre_run_hooks.append(lambda *_, **__: None)
    call(x)
    _toy.pre_run_hooks.clear()
    if len(PLAYED) != 1:
        yield "a kernel with a hook was replayed"
    PLAYED.clear()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    call(x)
    torch.set_float32_matmul_precision(precision)
    if PLAYED:
        yield "a call of another precision was replayed"


def memory() -> Iterator[str]:
    """A replay holds a tensor no longer than the launcher does."""
    lives: list[list[bool]] = []
    seen: list[weakref.ref[Tensor]] = []

    def start(*given: Any) -> None:
        seen.append(weakref.ref(given[11]))
        lives[-1] = [tensor() is not None for tensor in seen]

    def function(a: Tensor) -> Tensor:
        _start_toy(a.new_empty(1000))
        between = a.new_empty(2000).fill_(1.0)
        _start_toy(between)
        del between
        y = a.new_empty(10)
        _start_toy(y)
        return y

    _start_toy(torch.zeros(64))
    DRIVER.keeps = False
    (compiled, _), *_ = direct._kept[_toy.fn].values()
    compiled.run = start
    call = _replayed(function, "a")
    for _ in range(4):
        seen.clear()
        lives.append([])
        y = call(torch.zeros(64))
        if y.shape != (10,):
            yield f"a result of shape {list(y.shape)}"
    if not PLAYED or any(life != [False, False, True] for life in lives):
        yield f"alive at the last launch: {lives}"


if __name__ == "__main__":
    checks = {"ops": ops, "values": values, "hits": hits, "tapes": tapes, "memory": memory}
    for line in checks[sys.argv[1]]():
        print(line)
