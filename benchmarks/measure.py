"""Measures one group: makes the inputs, checks every row, times the right ones side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import ceilings, check, cuda_graph, environment, memory, timing
from benchmarks.presets import Preset
from benchmarks.rows import BASELINE, OURS, Group, Row, rows
from molex_kernels._opinfo import Case, Inputs

GRAPH_BELOW = 5e-3  # seconds; in longer calls the launches do not show
LATE = "the preset's time is spent"
OK, WRONG, SKIPPED, FAILED = "ok", "wrong", "skipped", "failed"


@dataclass
class Outcome:
    """What became of a row. `samples` are seconds per call; `facts` go into the report."""

    status: str = OK
    reason: str = ""
    samples: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


Outcomes = dict[tuple[str, str], Outcome]  # (label, mode)


@dataclass
class Meter:
    """Measures groups within the preset's limits; one per run."""

    preset: Preset
    timed: bool = True
    started: float = field(default_factory=time.monotonic)
    compiling: float = 0.0

    def group(self, group: Group) -> Outcomes:
        """Every row of the group."""
        members = rows(group)
        reason = self._too_much(group)
        status = SKIPPED if reason else OK
        outcomes = {(r.label, r.mode): Outcome(status, reason, facts=_facts(r)) for r in members}
        if reason:
            return outcomes
        inputs = _make(group, group.case)
        for mode in group.modes:
            torch._dynamo.reset()
            of_mode = [row for row in members if row.mode == mode]
            if self._late():
                for row in of_mode:
                    outcomes[row.label, mode].status = SKIPPED
                    outcomes[row.label, mode].reason = LATE
                continue
            with torch.set_grad_enabled(mode == "step"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    self._mode(group, of_mode, outcomes, inputs)
                except Exception as error:
                    # Whatever breaks the group breaks all of its rows; the next group still runs.
                    reason = f"{type(error).__name__}: {_first_line(error)}"
                    for row in of_mode:
                        _fail(outcomes[row.label, mode], reason)
            _free(group)
        return outcomes

    def _mode(self, group: Group, members: list[Row], outcomes: Outcomes, inputs: Inputs) -> None:
        mode = members[0].mode
        functions = {row.label: group.function(row.label) for row in members}
        checked = self._check(group, members, functions, outcomes, inputs)
        inputs, upstream = _for_mode(group, inputs, mode)
        passes = {}
        for row in members:
            outcome = outcomes[row.label, mode]
            if outcome.status != OK:
                continue
            work = check.Pass(group.info, functions[row.label], inputs, upstream)
            if checked is not group.case:
                outcome.facts["checked_at"] = checked.id
                self._try(row, work, outcome)
            if outcome.status == OK:
                passes[row.label] = work
        if not self.timed:
            return
        calls = {label: work.call for label, work in passes.items()}
        clock = timing.clock_for(group.device)
        samples = timing.round_robin(
            calls, clock, seconds=self.preset.mode_seconds, min_rounds=self.preset.min_rounds
        )
        for label in passes:
            outcomes[label, mode].samples = samples[label]
        for label, work in passes.items():
            peak = memory.peak_bytes(work.call, group.device)
            outcomes[label, mode].facts["peak_bytes"] = peak
        if group.device.type == "cuda":
            self._as_graphs(passes, outcomes, mode, group.device)
        for label in passes:
            _rates(group, outcomes[label, mode])

    def _check(
        self,
        group: Group,
        members: list[Row],
        functions: dict[str, Callable[..., Any]],
        outcomes: Outcomes,
        inputs: Inputs,
    ) -> Case:
        """Checks all rows; where the reference needs too much memory, at fewer tokens.

        Returns the case they were checked at.
        """
        mode = members[0].mode
        case = group.case
        while True:
            chosen, upstream = _for_mode(group, inputs, mode)
            try:
                truth = check.truth(group.info, chosen, upstream, group.dtype)
                break
            except torch.OutOfMemoryError:
                if case.sizes.get("T", 0) < 64:
                    raise
            _free(group)
            case = dataclasses.replace(case, sizes={**case.sizes, "T": case.sizes["T"] // 4})
            inputs = _make(group, case)
        for row in members:
            work = check.Pass(group.info, functions[row.label], chosen, upstream)
            self._check_row(row, work, truth, outcomes[row.label, mode])
        return case

    def _check_row(self, row: Row, work: check.Pass, truth: check.Truth, outcome: Outcome) -> None:
        compiled = row.label == "compiled"
        if compiled and self.compiling > self.preset.compile_seconds:
            outcome.status, outcome.reason = SKIPPED, "the preset's compile time is spent"
            return
        slack = 1.0 if row.kind == OURS else check.BASELINE_SLACK
        start = time.monotonic()
        try:
            # Dynamo guards on the setting that poisons: a compiled row would be compiled twice.
            with contextlib.nullcontext() if compiled else check.poisoned_memory():
                wrong = truth.compare(work.tensors(), slack)
        except NotImplementedError as error:
            outcome.status, outcome.reason = SKIPPED, _first_line(error)
        except torch.OutOfMemoryError:
            outcome.status, outcome.reason = SKIPPED, "out of memory"
        except Exception as error:
            # torch.compile needs a compiler that a machine may lack: no fault of this project's.
            outcome.status = SKIPPED if compiled else FAILED
            outcome.reason = f"{type(error).__name__}: {_first_line(error)}"
        else:
            if wrong:
                outcome.status, outcome.reason = WRONG, wrong
        if compiled:
            self.compiling += time.monotonic() - start

    def _try(self, row: Row, work: check.Pass, outcome: Outcome) -> None:
        """Whether a row that was checked at fewer tokens runs at all of them."""
        try:
            work.call()
        except torch.OutOfMemoryError:
            outcome.status, outcome.reason = SKIPPED, "out of memory"
        except Exception as error:
            outcome.status = SKIPPED if row.kind == BASELINE else FAILED
            outcome.reason = f"{type(error).__name__}: {_first_line(error)}"

    def _as_graphs(
        self,
        passes: dict[str, check.Pass],
        outcomes: Outcomes,
        mode: str,
        device: torch.device,
    ) -> None:
        """The time of each row's CUDA graph where the call is short."""
        replays = {}
        for label, work in passes.items():
            facts = outcomes[label, mode].facts
            if statistics.median(outcomes[label, mode].samples) > GRAPH_BELOW:
                continue
            eager = {name: t.clone() for name, t in work.tensors().items()}
            captured = cuda_graph.capture(work.tensors)
            if isinstance(captured, str):
                facts["graph"] = captured
                continue
            check.poison(captured.result)
            captured.graph.replay()
            if wrong := _differs(captured.result, eager):
                outcomes[label, mode].status, outcomes[label, mode].reason = WRONG, wrong
                continue
            replays[label] = captured.graph.replay
        clock = timing.clock_for(device, launches=False)
        samples = timing.round_robin(
            replays, clock, seconds=self.preset.mode_seconds / 2, min_rounds=self.preset.min_rounds
        )
        for label in replays:
            outcomes[label, mode].facts["graph_s"] = statistics.median(samples[label])

    def _late(self) -> bool:
        return time.monotonic() - self.started > self.preset.ops_seconds

    def _too_much(self, group: Group) -> str:
        if self._late():
            return LATE
        cost = group.info.cost(group.case, group.dtype, bool(group.info.differentiable))
        best = ceilings.measure(group.device, group.dtype)
        seconds = best.bound(cost.bytes, cost.flops)[0]
        if seconds > self.preset.case_seconds:
            return f"too large: {seconds:.1f} s a step at this machine's ceiling"
        inputs = group.info.cost(group.case, group.dtype, False).bytes
        if 8 * inputs > environment.available_bytes(group.device):
            return f"too large: {inputs / 2**30:.1f} GiB of inputs and outputs"
        return ""


def _fail(outcome: Outcome, reason: str) -> None:
    outcome.status, outcome.reason, outcome.samples = FAILED, reason, []


def _make(group: Group, case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(_seed(group))
    with torch.no_grad():
        return group.info.make(case, group.dtype, group.device, generator)


def _for_mode(group: Group, inputs: Inputs, mode: str) -> tuple[Inputs, check.Tensors | None]:
    """The inputs, and for a step the upstream gradients."""
    if mode == "forward":
        return inputs, None
    inputs = check.require_grad(group.info, inputs)
    generator = torch.Generator(group.device).manual_seed(_seed(group))
    return inputs, check.random_upstream(group.info, inputs, generator)


def _seed(group: Group) -> int:
    return zlib.crc32(group.name.encode())


def _facts(row: Row) -> dict[str, Any]:
    cost = row.group.info.cost(row.group.case, row.group.dtype, row.mode == "step")
    shape, dtype = row.group.name.split("/")[1:]
    return {
        "op": row.group.info.name,
        "shape": shape,
        "dtype": dtype,
        "device": row.group.device.type,
        "impl": row.label,
        "kind": row.kind,
        "mode": row.mode,
        "bytes": cost.bytes,
        "flops": cost.flops,
    }


def _rates(group: Group, outcome: Outcome) -> None:
    """Adds achieved rates and the share of the ceiling that binds.

    The kernels' own time counts where a CUDA graph gives it.
    """
    if outcome.status != OK or not outcome.samples:
        return
    best = ceilings.measure(group.device, group.dtype)
    facts = outcome.facts
    facts["median_s"] = statistics.median(outcome.samples)
    seconds = facts.get("graph_s", facts["median_s"])
    bound, facts["ceiling"] = best.bound(facts["bytes"], facts["flops"])
    facts["share"] = bound / seconds
    facts["gb_per_s"] = facts["bytes"] / seconds * 1e-9
    facts["gflop_per_s"] = facts["flops"] / seconds * 1e-9


def _differs(replayed: check.Tensors, eager: check.Tensors) -> str:
    for name, want in eager.items():
        got, want = replayed[name].double(), want.double()
        close = 1e-2 * want.abs().max().item() if want.numel() else 0.0
        if not torch.allclose(got, want, rtol=0, atol=close):
            return f"{name} differs between a CUDA graph's replay and a plain call"
    return ""


def _free(group: Group) -> None:
    if group.device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]
