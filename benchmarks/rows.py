"""Which implementations and baselines stand side by side, and which shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.presets import Preset, dtype_name
from molex_kernels.testing.opinfo import Case, OpInfo

OURS, BASELINE, YARDSTICK = "ours", "baseline", "yardstick"
BASELINES = ("published", "reference", "compiled", "library")
MODES = ("forward", "step")

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
        return MODES if self.info.differentiable else MODES[:1]

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
        yield from ((name, YARDSTICK) for name in self.info.yardsticks)

    def function(self, label: str) -> Callable[..., Any]:
        """What the row calls, with the op's keyword arguments."""
        for other in (self.info.baselines, self.info.yardsticks):
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
    dtype: torch.dtype,
    wanted: Callable[[str, str], bool] = lambda op, shape: False,
) -> list[Group]:
    """Every op's first shape, then every op's second, ...: a time limit cuts all ops alike.

    Of first shapes, of second ones, ..., those that are `wanted` come first, then those of ops that
    have kernels of their own for this device. The sweeps follow in the same way, so that a time
    limit cuts the largest sizes of all.
    """

    def has_kernels(name: str) -> bool:
        found = ops[name].implementations
        return any(device.type in DEVICES.get(implementation, ()) for implementation in found)

    names = sorted(ops, key=lambda name: not has_kernels(name))
    shapes = _by_rank(
        (
            [Group(ops[name], case, dtype, device) for case in getattr(ops[name], preset.cases)]
            for name in names
        ),
        lambda group: wanted(group.info.name, group.case.id),
    )
    sweeps = _by_rank(
        [Group(ops[name], case, dtype, device, sweep.letter) for case in sweep.cases]
        for name in names
        for sweep in getattr(ops[name], preset.sweeps)
    )
    return shapes + sweeps


def _by_rank(
    series: Iterable[list[Group]], wanted: Callable[[Group], bool] = lambda group: False
) -> list[Group]:
    """The first of every series, then the second of every series, ...; of each the wanted first."""
    ranks = ([g for g in rank if g is not None] for rank in itertools.zip_longest(*series))
    return [group for rank in ranks for group in sorted(rank, key=lambda g: not wanted(g))]


def rows(group: Group) -> list[Row]:
    """All rows of a group."""
    return [Row(group, label, kind, mode) for mode in group.modes for label, kind in group.labels()]
