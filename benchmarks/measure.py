"""Measures one group: makes the inputs, checks every row, times the right ones side by side."""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import (
    ceilings,
    check,
    cuda_graph,
    environment,
    launches,
    memory,
    oracle,
    sdpa,
    spread,
    timing,
)
from benchmarks.limit import Ended, Limit
from benchmarks.presets import Preset, dtype_name
from benchmarks.rows import OURS, PROXY, Group, Row, rows
from molex_kernels.testing.opinfo import Case, Inputs

GRAPH_BELOW = 5e-3  # seconds; in longer calls the launches do not show
IMPORTS = 5  # times as long as a call may take: after that no import is the reason
LATE = "the preset's time is spent"
COMPILED = ("compiled", "compiled_library")
TUNED = (*COMPILED, "liger")  # what compiles or tunes itself for every shape
OK, WRONG, SKIPPED, FAILED = "ok", "wrong", "skipped", "failed"


@dataclass
class Outcome:
    """What became of a row. `samples` are seconds per call, by round; `facts` for the report."""

    status: str = OK
    reason: str = ""
    samples: dict[int, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


Outcomes = dict[tuple[str, str], Outcome]  # (label, mode)


@dataclass
class Meter:
    """Measures groups within the preset's limits; one per run."""

    preset: Preset
    timed: bool = True
    limit: Limit = field(default_factory=Limit)
    started: float = field(default_factory=time.monotonic)
    sweeping: float = 0.0  # when the first sweep began
    tuning: Counter[str] = field(default_factory=Counter)  # seconds, by label

    def group(self, group: Group) -> Outcomes:
        """Every row of the group."""
        if group.sweep and not self.sweeping:
            self.sweeping = time.monotonic()
        members = rows(group)
        outcomes = {(r.label, r.mode): Outcome(facts=_facts(r)) for r in members}
        for mode in group.modes:
            of_mode = [row for row in members if row.mode == mode]
            if reason := self._too_much(group, mode):
                _skip(of_mode, outcomes, reason)
                continue
            try:
                with self.limit.running():
                    self._mode_within_time(group, of_mode, outcomes)
            except Ended:
                _skip(of_mode, outcomes, self.limit.reason)
            _free(group)
        return outcomes

    def _mode_within_time(self, group: Group, members: list[Row], outcomes: Outcomes) -> None:
        mode = members[0].mode
        torch._dynamo.reset()
        if reason := self._late(group):
            _skip(members, outcomes, reason)
            return
        with torch.set_grad_enabled(mode == "step"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._mode(group, members, outcomes)
            except Exception as error:
                # Whatever breaks the group breaks all of its rows; the next group still runs.
                reason = f"{type(error).__name__}: {_first_line(error)}"
                for row in members:
                    _fail(outcomes[row.label, mode], reason)

    def _mode(self, group: Group, members: list[Row], outcomes: Outcomes) -> None:
        mode = members[0].mode
        functions = {row.label: group.function(row.label) for row in members}
        make_case = functools.partial(make, group, mode)
        reference_time = oracle.probe(group, make_case)
        checked = oracle.find(group, make_case, reference_time, self.preset.check_seconds)
        for row in members:
            outcome = outcomes[row.label, mode]
            self._check_row(row, functions[row.label], checked, reference_time, outcome)
        inputs, upstream = checked.inputs, checked.upstream
        smaller = checked.case is not group.case
        del checked
        if smaller:
            inputs, upstream = make_case(group.case)
        passes = {}
        for row in members:
            outcome = outcomes[row.label, mode]
            if outcome.status != OK:
                continue
            kind = check.ProxyWorkload if row.kind == PROXY else check.Workload
            work = kind(group.info, functions[row.label], inputs, upstream)
            if smaller or row.kind == PROXY:
                self._try(row, work, outcome)
            if outcome.status == OK:
                passes[row.label] = work
        if self.timed:
            self._time(group, members, passes, outcomes)

    def _time(
        self,
        group: Group,
        members: list[Row],
        passes: dict[str, check.Workload],
        outcomes: Outcomes,
    ) -> None:
        """Times the passes side by side and adds everything else that a pass can tell."""
        mode = members[0].mode
        calls = {label: work.call for label, work in passes.items()}
        seconds, rounds = self.preset.mode_seconds, self.preset.min_rounds
        if group.sweep:
            seconds, rounds = self.preset.sweep_mode_seconds, timing.FEWEST_ROUNDS
        clock = timing.clock_for(group.device)
        samples = timing.round_robin(calls, clock, seconds=seconds, min_rounds=rounds)
        for label, work in passes.items():
            outcome = outcomes[label, mode]
            outcome.samples = samples[label]
            outcome.facts["peak_bytes"] = memory.peak_bytes(work.call, group.device)
            if mode == "step" and not isinstance(work, check.ProxyWorkload):
                outcome.facts["saved_bytes"] = work.saved_bytes()
            if not group.sweep and (names := sdpa.backends(work.call)):
                outcome.facts["sdpa"] = names
            ours = any(row.label == label and row.kind == OURS for row in members)
            if group.device.type == "cuda" and (ours or label == "library"):
                outcome.facts["launches"] = launches.launches(work.call)
                outcome.facts["waits"] = launches.waits(work.call)
        if group.device.type == "cuda" and not group.sweep:
            self._as_graphs(passes, outcomes, mode, group.device)
        for row in members:
            if row.kind == OURS:
                _compare(outcomes[row.label, mode], samples, row.label)
        for label in passes:
            _rates(group, outcomes[label, mode])

    def _check_row(
        self,
        row: Row,
        function: Callable[..., Any],
        checked: oracle.Checked,
        reference_time: oracle.ReferenceTime | None,
        outcome: Outcome,
    ) -> None:
        if row.kind == PROXY:
            return
        dense = row.label in ("reference", "compiled")
        if dense and reference_time and reference_time.call > self._longest(row):
            outcome.status = SKIPPED
            outcome.reason = _long(reference_time.call)
            return
        compiled = row.label in COMPILED
        if row.label in TUNED and self.tuning[row.label] > self.preset.compile_seconds:
            outcome.status, outcome.reason = SKIPPED, "the preset's compile time is spent"
            return
        if checked.note:
            outcome.facts["checked"] = checked.note
        work = check.Workload(row.group.info, function, checked.inputs, checked.upstream)
        slack = 1.0 if row.kind == OURS else check.BASELINE_SLACK
        start = time.monotonic()
        try:
            # Dynamo guards on the setting that poisons: a compiled row would be compiled twice.
            with contextlib.nullcontext() if compiled else check.poisoned_memory():
                found = work.tensors()
                took = self._seconds(row, work, time.monotonic() - start)
                wrong = checked.expected.compare(found, slack)
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
            elif took > self.preset.call_seconds:
                outcome.status, outcome.reason = SKIPPED, _long(took)
            else:
                outcome.facts["error"] = checked.expected.accuracy(found)
        if row.label in TUNED:
            self.tuning[row.label] += time.monotonic() - start

    def _seconds(self, row: Row, work: check.Workload, first: float) -> float:
        """Of a call of a baseline on a CPU, whose first call may import a library; else 0."""
        if row.kind == OURS or row.label in TUNED or row.group.device.type != "cpu":
            return 0.0
        if not self.preset.call_seconds < first < IMPORTS * self.preset.call_seconds:
            return first
        start = time.monotonic()
        work.call()
        return time.monotonic() - start

    def _longest(self, row: Row) -> float:
        """Seconds that one call may take. Compiled code may be a few times faster than eager."""
        return self.preset.call_seconds * (3 if row.label == "compiled" else 1)

    def _try(self, row: Row, work: check.Workload, outcome: Outcome) -> None:
        """Whether a row that was not checked at the full size runs there at all."""
        try:
            work.call()
        except NotImplementedError as error:
            outcome.status, outcome.reason = SKIPPED, _first_line(error)
        except torch.OutOfMemoryError:
            outcome.status, outcome.reason = SKIPPED, "out of memory"
        except Exception as error:
            outcome.status = FAILED if row.kind == OURS else SKIPPED
            outcome.reason = f"{type(error).__name__}: {_first_line(error)}"

    def _as_graphs(
        self,
        passes: dict[str, check.Workload],
        outcomes: Outcomes,
        mode: str,
        device: torch.device,
    ) -> None:
        """The time of each row's CUDA graph where the call is short."""
        replays = {}
        for label, work in passes.items():
            facts = outcomes[label, mode].facts
            if isinstance(work, check.ProxyWorkload):
                continue
            if statistics.median(outcomes[label, mode].samples.values()) > GRAPH_BELOW:
                continue
            eager = {name: t.clone() for name, t in work.tensors().items()}
            alone = work if mode == "forward" else work.on_new_leaves()
            captured = cuda_graph.capture(alone.tensors)
            if isinstance(captured, str):
                facts["graph"] = captured
                continue
            check.poison(alone, captured.result)
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
            outcomes[label, mode].facts["graph_s"] = statistics.median(samples[label].values())

    def _late(self, group: Group) -> str:
        """Why nothing more of this kind is started; empty where it is."""
        now = time.monotonic()
        if group.sweep:
            late = now - self.sweeping > self.preset.sweep_seconds
        else:
            late = now - self.started > self.preset.ops_seconds
        return self.limit.reason or (LATE if late else "")

    def _too_much(self, group: Group, mode: str) -> str:
        if late := self._late(group):
            return late
        cost = group.info.cost(group.case, group.dtype, mode == "step")
        best = ceilings.measure(group.device, group.dtype)
        seconds = best.bound(cost.bytes, cost.flops)[0]
        if seconds > self.preset.case_seconds:
            return f"too large: {seconds:.1f} s a pass at this machine's ceiling"
        inputs = group.info.cost(group.case, group.dtype, False).bytes
        if 8 * inputs > (free := environment.available_bytes(group.device)):
            needs = f"{inputs / 2**30:.1f} GiB of inputs and outputs"
            return f"too large: {needs}, {free / 2**30:.1f} GiB are free"
        return ""


def _long(seconds: float) -> str:
    return f"would take about {seconds:.2g} s a call"


def _fail(outcome: Outcome, reason: str) -> None:
    outcome.status, outcome.reason, outcome.samples = FAILED, reason, {}


def _skip(members: list[Row], outcomes: Outcomes, reason: str) -> None:
    """What has been found wrong or impossible stays that; the rest is not measured."""
    for row in members:
        outcome = outcomes[row.label, row.mode]
        if outcome.status == OK:
            outcome.status, outcome.reason, outcome.samples = SKIPPED, reason, {}
            outcome.facts.pop("median_s", None)
            outcome.facts.pop("versus", None)


def make(group: Group, mode: str, case: Case) -> tuple[Inputs, check.Tensors | None]:
    """The inputs of the case, and for a step the upstream gradients."""
    # On the device itself: billions of random weights take minutes on one core.
    generator = torch.Generator(group.device).manual_seed(_seed(group))
    with torch.no_grad():
        inputs = group.info.make(case, group.dtype, group.device, generator)
    if mode == "forward":
        return inputs, None
    inputs = check.require_grad(group.info, inputs)
    generator.manual_seed(_seed(group) + 1)
    return inputs, check.random_upstream(group.info, inputs, generator)


def _seed(group: Group) -> int:
    return zlib.crc32(group.name.encode())


def _facts(row: Row) -> dict[str, Any]:
    cost = row.group.info.cost(row.group.case, row.group.dtype, row.mode == "step")
    return {
        "op": row.group.info.name,
        "shape": row.group.case.id,
        "sizes": dict(row.group.case.sizes),
        "sweep": row.group.sweep,
        "dtype": dtype_name(row.group.dtype),
        "device": row.group.device.type,
        "impl": row.label,
        "kind": row.kind,
        "mode": row.mode,
        "bytes": cost.bytes,
        "flops": cost.flops,
    }


def _compare(ours: Outcome, samples: dict[str, dict[int, float]], label: str) -> None:
    """Adds how many times longer every other row takes, from samples taken in turn."""
    mine = samples.get(label, {})
    gains = {n: spread.ratio(taken, mine) for n, taken in samples.items() if n != label}
    ours.facts["versus"] = {name: gain for name, gain in gains.items() if gain}


def _rates(group: Group, outcome: Outcome) -> None:
    """Adds achieved rates and the share of the ceiling that binds.

    The kernels' own time counts where a CUDA graph gives it.
    """
    if outcome.status != OK or not outcome.samples:
        return
    best = ceilings.measure(group.device, group.dtype)
    facts = outcome.facts
    facts["median_s"] = statistics.median(outcome.samples.values())
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
        gc.collect()  # graphs and failed calls are held in cycles
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]
