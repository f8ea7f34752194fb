"""Which implementations and baselines stand side by side, and which shapes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import products
from benchmarks.presets import Preset, dtype_name
from molex_kernels.testing.opinfo import Case, OpInfo

OURS, BASELINE, PROXY = "ours", "baseline", "proxy"
BASELINES = ("published", "reference", "compiled", "library")
MODES = ("forward", "step")
SHRINK = ("T", "B", "S", "H")  # sizes that only repeat the work, in the order in which they shrink

# `triton` on a CPU would be Triton's interpreter, which is for tests.
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "sdpa": ("cpu", "cuda")}


@dataclass(frozen=True)
class Group:
    """One shape of one op: everything in it is measured side by side.

    `sweep` is the letter of the size that grows, where the shape is one of a sweep.
    """

    info: OpInfo
    case: Case
    dtype: torch.dtype
    device: torch.device
    sweep: str = ""

    @property
    def name(self) -> str:
        """`<op>/<shape>/<dtype>`, with `/over-<letter>` in a sweep."""
        over = f"/over-{self.sweep}" if self.sweep else ""
        return f"{self.info.name}/{self.case.id}/{dtype_name(self.dtype)}{over}"

    @property
    def modes(self) -> tuple[str, ...]:
        """`forward`, and `step` (forward and backward) where there is a gradient."""
        trained = self.info.differentiable and not self.case.inference
        return MODES if trained else MODES[:1]

    def labels(self) -> Iterator[tuple[str, str]]:
        """Name and kind of each row: our implementations for this device, then the baselines.

        Where the reference is all that runs on the device, it is what a user gets: one of ours. A
        sweep has the first of ours and one baseline.
        """
        kernels = [n for n in self.info.implementations if self.device.type in DEVICES.get(n, ())]
        ours = kernels or ["reference"]
        if self.sweep:
            yield ours[0], OURS
            beside = [n for n in ("published", "library") if n in self.info.baselines]
            yield from ((name, BASELINE) for name in beside[:1])
            return
        yield from ((name, OURS) for name in ours)
        for name in (*BASELINES, *(n for n in self.info.baselines if n not in BASELINES)):
            known = name in ("reference", "compiled") or name in self.info.baselines
            if known and name not in ours:
                yield name, BASELINE
        yield from ((name, PROXY) for name in self.info.proxies)

    def function(self, label: str) -> Callable[..., Any]:
        """What the row calls, with the op's keyword arguments."""
        for other in (self.info.baselines, self.info.proxies):
            if label in other:
                return other[label]
        if label == "compiled":
            return torch.compile(partial(self.info.function, impl="reference"), dynamic=False)
        return partial(self.info.function, impl=label)


@dataclass(frozen=True)
class Row:
    """One line of the results: a group, what is called, and in which mode."""

    group: Group
    label: str
    kind: str
    mode: str

    @property
    def name(self) -> str:
        """`<op>-<shape>-<dtype>-<impl>-<mode>`."""
        return f"{self.group.name.replace('/', '-')}-{self.label}-{self.mode}"


def groups(
    ops: dict[str, OpInfo],
    preset: Preset,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> list[Group]:
    """Every op's first shape in each dtype, then every op's second in the first dtype, ...

    On a CPU a second dtype that it has no instructions for has a smaller shape, and a first of 16
    bits the op's further cases. So a time limit cuts all ops alike. Of first
    shapes, of second ones, ..., those of ops that have kernels of their own for this device come
    first. The sweeps follow in the same way.
    """

    def has_kernels(name: str) -> bool:
        found = ops[name].implementations
        return any(device.type in DEVICES.get(implementation, ()) for implementation in found)

    def other(case: Case, dtype: torch.dtype) -> Case:
        # A CPU without products in the dtype would take minutes for the baselines.
        slow = device.type == "cpu" and dtype.itemsize == 2 and not products.native(dtype)
        return shrink(shrink(case)) if slow else case

    def shapes(name: str) -> list[Group]:
        (first, *others), main = getattr(ops[name], preset.cases), dtypes[0]
        if device.type == "cpu" and main.itemsize == 2:
            others = [*ops[name].half, *others]
        return [
            Group(ops[name], first, main, device),
            *(Group(ops[name], other(first, dtype), dtype, device) for dtype in dtypes[1:]),
            *(Group(ops[name], case, main, device) for case in others),
        ]

    names = sorted(ops, key=lambda name: not has_kernels(name))
    sweeps = (
        [Group(ops[name], case, dtypes[0], device, sweep.letter) for case in sweep.cases]
        for name in names
        for sweep in getattr(ops[name], preset.sweeps)
    )
    return [*_by_rank(map(shapes, names)), *_by_rank(sweeps)]


def shrink(case: Case) -> Case:
    """A quarter of the tokens, or of what else only repeats the work; the smallest stays."""
    for letter in SHRINK:
        size = case.sizes.get(letter, 1)
        if size > (64 if letter == "T" else 1):
            return dataclasses.replace(case, sizes={**case.sizes, letter: max(size // 4, 1)})
    return case


def _by_rank(series: Iterable[list[Group]]) -> Iterator[Group]:
    """The first of every series, then the second of every series, ..."""
    for rank in itertools.zip_longest(*series):
        yield from (group for group in rank if group is not None)


def rows(group: Group) -> list[Row]:
    """All rows of a group."""
    return [Row(group, label, kind, mode) for mode in group.modes for label, kind in group.labels()]
