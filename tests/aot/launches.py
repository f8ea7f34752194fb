"""Every launch of every op, recorded instead of run.

Inputs are meta tensors, which have no memory: a launcher reads shapes, strides and alignment only,
so the benchmarks' shapes cost nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

# What a grid may be: the second and third dimension are short.
GRID_LIMITS = (2**31 - 1, 65535, 65535)

_LENGTHS = ("BLOCK_B", "BLOCK_C", "BLOCK_E", "BLOCK_L", "TOP_K")
_DTYPES = ("bf16", "fp16", "fp32")  # narrow ones first
Items = tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as the just-in-time compiler would make it."""

    kernel: str
    dtype: str  # the narrowest of its tensors' floating dtypes
    signature: Items  # type by argument; of a tuple, a tuple of types
    constants: Items  # value by place: an argument's, or one inside a tuple
    attributes: Items  # what is known of arguments, by their places
    options: Items  # the backend's options, as given
    function: JITFunction = field(compare=False, repr=False)

    @property
    def nones(self) -> tuple[str, ...]:
        """The arguments that were left out."""
        return tuple(name for name, value in self._plain_constants if value is None)

    @property
    def flags(self) -> Items:
        """Boolean and string constants."""
        return tuple((n, v) for n, v in self._plain_constants if isinstance(v, (bool, str)))

    @property
    def tile(self) -> Items:
        """Block sizes and their kin: the integers among the kernel's compile-time arguments."""
        declared = {p.name for p in self.function.params if p.is_constexpr}
        return tuple(
            (n, v)
            for n, v in self._plain_constants
            if n in declared and isinstance(v, int) and not isinstance(v, bool)
        )

    @property
    def _plain_constants(self) -> Items:
        """Constants by argument, without those inside tuples, which are strides of 1."""
        names = [name for name, _ in self.signature]
        return tuple((names[place[0]], v) for place, v in self.constants if len(place) == 1)

    @property
    def leaves(self) -> list[tuple[str, str, bool]]:
        """Each argument's name and type, a tuple's members apart; whether it is a stride."""
        found = []
        for name, kind in self.signature:
            for place, leaf in enumerate(_flat(kind)):
                found.append((name, str(leaf), place > 0))
        return found

    @property
    def code_key(self) -> tuple[Any, ...]:
        """Launches with the same key go through the front end alike."""
        return self.kernel, self.dtype, self.nones, self.flags

    @property
    def tile_key(self) -> tuple[Any, ...]:
        """Launches with the same key are one configuration."""
        return self.kernel, self.dtype, self.tile, self.options

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the tables that a program reads whole, such as one entry for each expert; and K."""
        return tuple(value for name, value in self.tile if name in _LENGTHS)

    @property
    def tile_key_without_lengths(self) -> tuple[Any, ...]:
        tile = tuple(item for item in self.tile if item[0] not in _LENGTHS)
        return self.kernel, self.dtype, tile, self.options

    @property
    def fullness(self) -> tuple[int, int, int]:
        """Tensors passed, options switched on, the tensors' dimensions."""
        pointers = sum(kind.startswith("*") for _, kind, _ in self.leaves)
        return pointers, sum(v is True for _, v in self.flags), len(self.leaves)


@dataclass
class Recording:
    """Launches in the order of their first appearance, each with the ops that make it."""

    ops: dict[Launch, set[str]] = field(default_factory=dict)

    def by_code(self) -> list[Launch]:
        """One launch for each path through the kernels' sources."""
        return list({launch.code_key: launch for launch in self.ops}.values())

    def by_tile(self, *, all_lengths: bool = True) -> list[Launch]:
        """One launch for each configuration: the fullest, the first of equals.

        Without `all_lengths`, configurations that differ in the lengths of tables alone are one,
        with the longest.
        """
        chosen: dict[tuple[Any, ...], tuple[Any, Launch]] = {}
        for launch in self.ops:
            key = launch.tile_key if all_lengths else launch.tile_key_without_lengths
            rank = launch.lengths, launch.fullness
            if key not in chosen or rank > chosen[key][0]:
                chosen[key] = rank, launch
        return [launch for _, launch in chosen.values()]

    def counts(self) -> dict[str, dict[str, int]]:
        """By op, how many different keys its launches have."""
        names = sorted(set().union(*self.ops.values()))
        return {
            name: {
                "code": len({n.code_key for n, ops in self.ops.items() if name in ops}),
                "tiles": len({n.tile_key for n, ops in self.ops.items() if name in ops}),
            }
            for name in names
        }


def load_ops() -> dict[str, Any]:
    """The package's ops, whose operators launch for meta tensors as they would for a GPU's.

    Imports the package, which must not have been imported before.
    """
    assert "molex_kernels" not in sys.modules, "its operators have fake implementations already"
    given = torch.library.register_fake
    torch.library.register_fake = lambda *_, **__: None
    try:
        from molex_kernels import _backends, testing
    finally:
        torch.library.register_fake = given
    object.__setattr__(_backends.TRITON, "devices", ("meta",))
    torch.is_autocast_enabled = lambda device="": False  # which knows no meta
    return testing.load_ops()


def record(
    ops: dict[str, Any],
    chip: str,
    target: GPUTarget,
    dtypes: Sequence[torch.dtype],
    *,
    is_strided: bool = False,
) -> Recording:
    """What these ops launch on a chip, for the cases of tests and benchmarks.

    `chip` is its name, `target` what Triton compiles for.
    `is_strided`: the tests' cases alone, with no stride of 1 and nothing aligned.
    """
    recording = Recording()
    backend = make_backend(target)
    for info in ops.values():
        if "triton" not in info.implementations:
            continue
        for dtype in dtypes:
            measured = dtype == torch.bfloat16 and not is_strided  # as the benchmarks are on a GPU
            cases = {case.id: case for case in _cases(info, measured)}.values()
            with _recorded(recording, info.name, backend, chip):
                for case in cases:
                    _call(info, case, dtype, is_strided)
    return recording


def _cases(info: Any, measured: bool) -> Iterator[Any]:
    """Those of the tests and, where they are measured in this dtype, of the benchmarks."""
    yield from (*info.tests, *info.compiled, *info.large)
    if measured:
        yield from (*info.benchmarks, *info.quick)
        for sweep in (*info.sweeps, *info.quick_sweeps):
            yield from sweep.cases


def _call(info: Any, case: Any, dtype: torch.dtype, is_strided: bool) -> None:
    from molex_kernels.testing.calls import strided

    def laid_out(tensors: dict[str, Any]) -> dict[str, Any]:
        return strided(tensors) if is_strided else tensors

    inputs = laid_out(info.make(case, dtype, torch.device("meta"), None))
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in info.differentiable
        if isinstance(inputs.get(name), torch.Tensor)
    }
    for arguments in (inputs, {**inputs, **leaves}):
        results = info.results(info.function(**arguments, impl="triton")).values()
        outputs = {str(place): r for place, r in enumerate(results) if r.requires_grad}
        if outputs:
            upstream = laid_out({name: torch.empty_like(r) for name, r in outputs.items()})
            torch.autograd.grad(
                list(outputs.values()),
                list(leaves.values()),
                list(upstream.values()),
                allow_unused=True,
            )


@contextmanager
def _recorded(recording: Recording, op: str, backend: Any, chip: str) -> Iterator[None]:
    """Launches inside are those for the chip; they are kept and do nothing."""
    from molex_kernels._triton import chips

    given = JITFunction.run, chips.of

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        name = kernel.fn.__name__
        for size, limit in zip(grid, GRID_LIMITS, strict=False):
            assert 0 < size <= limit, f"{name}: a grid of {tuple(grid)}"
        launch = _specialised(kernel, backend, args, kwargs)
        recording.ops.setdefault(launch, set()).add(op)

    JITFunction.run = run
    chips.of = lambda device: chips.CHIPS[chip]
    try:
        yield
    finally:
        JITFunction.run, chips.of = given


def _specialised(kernel: JITFunction, backend: Any, args: Any, kwargs: dict[str, Any]) -> Launch:
    """By Triton's own binder: what it would compile and look up in its cache."""
    bound, specialization, given = _binder(kernel, backend)(*args, **kwargs)
    _, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, given
    )
    types = [leaf for kind in signature.values() for leaf in _flat(kind)]
    return Launch(
        kernel.fn.__name__,
        next((name for name in _DTYPES if f"*{name}" in types), "int"),
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((place, tuple(map(tuple, known))) for place, known in attributes.items()),
        tuple(sorted(given.items())),
        kernel,
    )


def _flat(kind: Any) -> tuple[Any, ...]:
    """The types of a tuple's members, or of the one argument."""
    return kind if isinstance(kind, tuple) else (kind,)


@functools.cache
def _binder(kernel: JITFunction, backend: Any) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, backend)
