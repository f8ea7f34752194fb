"""The fp64 results that a group's rows are held against, and at which size.

The reference of a mixture sends every token through every expert: at a large shape that takes
minutes. There a baseline is the oracle, in fp64, after it has agreed with the reference at a few
tokens. Where memory does not suffice, a smaller case is checked.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import check, rows
from benchmarks.rows import Group
from molex_kernels.testing import budget
from molex_kernels.testing.opinfo import Case, Inputs

# Tokens at which the reference's time is taken.
PROBE = {"cpu": 64, "cuda": 512}
AGREE = 1e-9  # relatively, between two fp64 results

Made = tuple[Inputs, "check.Tensors | None"]


@dataclass(frozen=True)
class Checked:
    """The expected results, the inputs they belong to, and what a reader should know of them."""

    expected: check.Expected
    case: Case
    inputs: Inputs
    upstream: check.Tensors | None
    note: str = ""


@dataclass(frozen=True)
class ReferenceTime:
    """Seconds that the reference of one group takes, from a few tokens: a call, and a check."""

    call: float
    check: float


def find(
    group: Group,
    make: Callable[[Case], Made],
    reference_time: ReferenceTime | None,
    seconds: float,
) -> Checked:
    """The expected results of the group at the largest size that the machine can check.

    `reference_time` is known where the op has an oracle, which is used if the reference takes more
    than `seconds`.
    """
    oracle = reference_time is not None and reference_time.check > seconds
    note = f"checked against `{group.info.oracle}` in fp64" if oracle else ""
    case = group.case
    while True:
        inputs, upstream = make(case)
        try:
            found = check.expect(group.info, inputs, upstream, group.dtype, oracle=oracle)
        except torch.OutOfMemoryError:
            smaller = rows.shrink(case)
            if smaller is case:
                raise
            case = smaller
        else:
            if case is not group.case:
                note = f"{note or 'checked'} at {case.id}"
            return Checked(found, case, inputs, upstream, note)
        if group.device.type == "cuda":
            torch.cuda.empty_cache()


def probe(group: Group, make: Callable[[Case], Made]) -> ReferenceTime | None:
    """Times the reference at a few tokens where the op has an oracle, and tries it.

    Raises where the two do not agree in fp64.
    """
    info, tokens = group.info, group.case.sizes.get("T", 0)
    few_tokens = PROBE[group.device.type]
    if info.oracle is None or tokens <= few_tokens:
        return None
    few = dataclasses.replace(group.case, sizes={**group.case.sizes, "T": few_tokens})
    inputs, upstream = make(few)
    exact = check.double(inputs), upstream and check.double(upstream)
    started = _now(group)
    wanted = check.Workload(info, check.exact_function(info, oracle=False), *exact).tensors()
    in_double = _now(group) - started
    own = check.Workload(info, check.exact_function(info, oracle=False), inputs, upstream)
    own.tensors()
    started = _now(group)
    own.tensors()
    in_own = _now(group) - started
    for name, got in check.Workload(info, check.exact_function(info), *exact).tensors().items():
        error = budget.error(got, wanted[name])
        if not error <= AGREE * budget.largest(wanted[name]):
            raise AssertionError(f"{info.oracle} is not the reference in fp64: {name}, {error}")
    growth = tokens / few_tokens
    return ReferenceTime(in_own * growth, (in_own + in_double) * growth)


def _now(group: Group) -> float:
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    return time.perf_counter()
