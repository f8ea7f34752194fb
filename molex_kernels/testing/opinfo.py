"""How an op describes itself to the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from molex_kernels._backends import IMPLEMENTATIONS

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One set of sizes (by letter) and options. `id` reads like "T17-D65-E5-K2-swiglu".

    `inference` is for benchmarks: the case has no backward pass.
    """

    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    inference: bool = False

    @property
    def id(self) -> str:
        """The readable name, as in test ids and reports."""
        parts = [f"{letter}{size}" for letter, size in self.sizes.items()]
        parts += [_option(name, value) for name, value in self.options.items()]
        return "-".join([*parts, self.note] if self.note else parts)


@dataclass(frozen=True)
class Draw:
    """Random tensors whose values the dtype holds exactly, drawn alike for every dtype.

    Without a generator nothing is drawn: the values are what the memory happens to hold (integers
    are 0), for who reads only shapes, strides and dtypes. Memory that is never touched costs
    nothing, so that tensors larger than the machine can be had.
    """

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator | None

    def normal(self, *sizes: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers with this standard deviation."""
        if self.generator is None:
            return torch.empty(sizes, device=self.device, dtype=dtype or self.dtype)
        drawn = torch.randn(sizes, generator=self.generator, device=self.generator.device)
        return (drawn * scale).to(self.device, dtype or self.dtype)

    def integers(self, below: int, *sizes: int) -> Tensor:
        """Integers from 0 to `below`, which is not one of them."""
        if self.generator is None:
            return torch.zeros(sizes, device=self.device, dtype=torch.int64)
        place = self.generator.device
        return torch.randint(below, sizes, generator=self.generator, device=place).to(self.device)


@dataclass(frozen=True)
class Cost:
    """What one pass must do: bytes that have to cross memory, floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Sweep:
    """Cases in which the size `letter` grows, to see what time and memory do."""

    letter: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class OpInfo:
    """A public function with everything that tests and benchmarks need to know of it.

    Attributes:
        name: The function's.
        function: Takes the keyword arguments of `make` and `impl`, of which "reference" is plain
            PyTorch.
        make: Gives the keyword arguments for a case, dtype, device and generator, fresh random at
            unit scale; see `Draw` for a generator of None.
        results: Turns what the function returns into named tensors: floating ones are compared
            within the error budget, integer ones exactly.
        differentiable: Names of the floating arguments that receive gradients.
        tests: Cases of the contract.
        benchmarks: Cases that a GPU is measured at.
        quick: Cases that take seconds on a CPU.
        half: Further cases for a CPU, where all are measured in 16 bits.
        cost: Counts a forward pass, or a forward and backward pass.
        baselines: Other code for the same; takes the same keyword arguments and returns the same.
        oracle: The baseline that gives the fp64 results where the reference does much more work
            than is asked for.
        proxies: As much work in a vendor's kernel, for something else; the same keyword arguments.
        large: Tests that fill more than one piece of a native kernel, and would take Triton's
            interpreter minutes.
        compiled: Sizes that reach launch configurations which `tests` do not, for ahead-of-time
            compilation.
        sweeps: Cases in which a size grows, for a GPU.
        quick_sweeps: The same, in seconds on a CPU.
        left_out: Where of these inputs nothing counts, as masks by name that fit the dimensions of
            an argument, or of a result whose gradient does not count. None for an op that leaves
            nothing out.
        masked: Small cases in which something is left out.
        implementations: Names in the order of preference; this package's own where none are given.
    """

    name: str
    function: Callable[..., Any]
    make: Callable[[Case, torch.dtype, torch.device, torch.Generator | None], Inputs]
    results: Callable[[Any], dict[str, Tensor]]
    differentiable: tuple[str, ...]
    tests: tuple[Case, ...]
    benchmarks: tuple[Case, ...] = ()
    quick: tuple[Case, ...] = ()
    half: tuple[Case, ...] = ()
    cost: Callable[[Case, torch.dtype, bool], Cost] = lambda case, dtype, backward: Cost(0, 0)
    baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    oracle: str | None = None
    proxies: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    large: tuple[Case, ...] = ()
    compiled: tuple[Case, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    quick_sweeps: tuple[Sweep, ...] = ()
    left_out: Callable[[Inputs], Mapping[str, Tensor]] | None = None
    masked: tuple[Case, ...] = ()
    implementations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Takes the implementations that the package declares for a function of this name."""
        declared = tuple(i.name for i in IMPLEMENTATIONS.get(self.name, ()))
        object.__setattr__(self, "implementations", self.implementations or declared)


def _option(name: str, value: Any) -> str:
    if value is True:
        return name
    return f"{name}_{value}" if isinstance(value, (int, float)) else str(value)
