"""Which implementations and baselines stand side by side, and which shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.presets import Preset, dtype_name
from molex_kernels._opinfo import Case, OpInfo

OURS, BASELINE = "ours", "baseline"
BASELINES = ("published", "reference", "compiled", "library")
MODES = ("forward", "step")

# `triton` on a CPU would be Triton's interpreter, which is for tests.
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "sdpa": ("cpu", "cuda")}


@dataclass(frozen=True)
class Group:
    """One shape of one op: everything in it is measured side by side."""

    info: OpInfo
    case: Case
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        """`<op>/<shape>/<dtype>`."""
        return f"{self.info.name}/{self.case.id}/{dtype_name(self.dtype)}"

    @property
    def modes(self) -> tuple[str, ...]:
        """`forward`, and `step` (forward and backward) where there is a gradient."""
        return MODES if self.info.differentiable else MODES[:1]

    def labels(self) -> Iterator[tuple[str, str]]:
        """Name and kind of each row: our implementations for this device, then the baselines.

        Where the reference is all that runs on the device, it is what a user gets: one of ours.
        """
        kernels = [n for n in self.info.implementations if self.device.type in DEVICES.get(n, ())]
        ours = kernels or ["reference"]
        yield from ((name, OURS) for name in ours)
        for name in (*BASELINES, *(n for n in self.info.baselines if n not in BASELINES)):
            known = name in ("reference", "compiled") or name in self.info.baselines
            if known and name not in ours:
                yield name, BASELINE

    def function(self, label: str) -> Callable[..., Any]:
        """What the row calls, with the op's keyword arguments."""
        if label in self.info.baselines:
            return self.info.baselines[label]
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
    ops: dict[str, OpInfo], preset: Preset, device: torch.device, dtype: torch.dtype
) -> list[Group]:
    """Every op's first shape, then every op's second, ...: a time limit cuts all ops alike.

    Ops that have kernels of their own for this device come before those that have not.
    """

    def has_kernels(name: str) -> bool:
        found = ops[name].implementations
        return any(device.type in DEVICES.get(implementation, ()) for implementation in found)

    names = sorted(ops, key=lambda name: not has_kernels(name))
    cases = {name: getattr(info, preset.cases) for name, info in ops.items()}
    longest = max((len(c) for c in cases.values()), default=0)
    return [
        Group(ops[name], cases[name][rank], dtype, device)
        for rank in range(longest)
        for name in names
        if rank < len(cases[name])
    ]


def rows(group: Group) -> list[Row]:
    """All rows of a group."""
    return [Row(group, label, kind, mode) for mode in group.modes for label, kind in group.labels()]
