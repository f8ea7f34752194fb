"""The benchmark suite itself: what it makes of a run, on small made-up runs. Nothing is timed."""

# ruff: noqa: E402 - the suite needs packages that the tests of the ops do not

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(needed)

from benchmarks import __main__ as main
from benchmarks import (
    ceilings,
    check,
    compare,
    cuda_graph,
    expert_parallel,
    goals,
    markdown,
    measure,
    plots,
    presets,
    readme,
    record,
    report,
    results,
    rows,
    scaling,
    spread,
    terminal,
    timing,
    truths,
)
from molex_kernels.testing import load_ops
from molex_kernels.testing.opinfo import Case, Cost, OpInfo, Sweep

CPU = torch.device("cpu")
FACTS = {
    "date": "2026-01-02 03:04 UTC", "commit": "0123456789", "device": "cpu", "chip": "Some Chip",
    "cpu": "Some Chip", "cores": 2, "threads": 2, "load": 0.0, "memory_gib": 8, "python": "3.11",
    "torch": "2", "triton": "3", "system": "Linux",
}  # fmt: skip


def _row(impl: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    kind = rows.BASELINE if impl in rows.BASELINES else rows.OURS
    found: dict[str, Any] = {
        "op": "momentum_update", "shape": "T3072-D352-adam", "sizes": {"T": 3072, "D": 352},
        "sweep": "", "dtype": "fp32", "device": "cpu", "impl": impl, "kind": kind,
        "mode": "forward", "bytes": 1000, "flops": 500, "status": "ok", "reason": "",
    }  # fmt: skip
    if seconds is None:
        return found | {"status": "wrong", "reason": "y: error 3 > 1"} | more
    rates = {"gb_per_s": 1e-6 / seconds, "gflop_per_s": 5e-7 / seconds}
    timed = {"median_s": seconds, "ceiling": "copy", "share": 0.5, "peak_bytes": 4096}
    return found | timed | rates | more


def _run(*found: dict[str, Any], sweeps: tuple[dict[str, Any], ...] = (), **more: Any) -> Any:
    run = {
        "preset": "quick", "environment": dict(FACTS), "rows": list(found), "sweeps": list(sweeps),
        "ceilings": {"fp32": {"copy": 1e10, "matmul": 1e11}},
        "text": None, "images": None, "finetune": None,
    }  # fmt: skip
    # As it comes back from a file.
    return json.loads(json.dumps(run | more))


def _against(gains: dict[str, tuple[float, float, float]], **more: Any) -> dict[str, Any]:
    return _row("cpu", 1e-3, versus=gains, **more)


def _pair(published: float, width: float = 0.02, **more: Any) -> list[dict[str, Any]]:
    interval = (published, published * (1 - width), published * (1 + width))
    ours = _against({"published": interval, "compiled": interval}, **more)
    return [ours, *(_row(n, 1e-3 * published, **more) for n in ("published", "compiled"))]


# Ratios and their intervals


def test_a_ratio_is_paired_by_round():
    """The machine slows down tenfold half way: pairs do not see it, medians of times do."""
    slow = {r: 10.0 if r > 5 else 1.0 for r in range(1, 11)}
    ours = {r: 2.0 * s for r, s in slow.items()}
    others = {r: 6.0 * slow[r] for r in (4, 6, 8, 10)}
    assert spread.ratio(others, ours) == (3.0, 3.0, 3.0)
    assert spread.ratio(ours, others) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert spread.ratio({}, ours) is None


def test_the_interval_holds_the_median_nine_times_in_ten():
    draw = random.Random(0)
    for count in (5, 8, 20, 101):
        held = sum(
            low <= 0 <= high
            for low, high in (
                spread.median_interval([draw.gauss(0, 1) for _ in range(count)])
                for _ in range(2000)
            )
        )
        assert 0.88 <= held / 2000 <= 0.985, count
    assert spread.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_samples_of_one_round_are_taken_together():
    ticks = itertools.count()

    class Clock:
        def sample(self, call: Any, repeats: int) -> float:
            call()
            return {"fast": 0.01, "slow": 0.04}[called.pop()] + 0 * next(ticks)

    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in ("fast", "slow")}
    samples = timing.round_robin(calls, Clock(), seconds=1.0, min_rounds=3)
    assert len(samples["fast"]) > 2 * len(samples["slow"]) >= 6
    assert set(samples["slow"]) <= set(samples["fast"])


# Correctness before speed


def _scale(x: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    if impl not in (None, "reference"):
        raise ValueError(impl)
    return 2 * x


def _op(**baselines: Any) -> OpInfo:
    case = Case({"T": 64, "D": 8})
    return OpInfo(
        name="scale",
        function=_scale,
        make=lambda case, dtype, device, generator: {
            "x": torch.randn(*case.sizes.values(), generator=generator).to(dtype)
        },
        results=lambda y: {"y": y},
        differentiable=("x",),
        tests=(),
        benchmarks=(case,),
        quick=(case,),
        cost=lambda case, dtype, backward: Cost(case.sizes["T"] * 64, case.sizes["T"]),
        baselines=baselines,
        yardsticks={"copy": lambda x: x.clone()},
        quick_sweeps=(Sweep("T", tuple(Case({"T": t, "D": 8}) for t in (16, 32))),),
    )


@pytest.fixture(autouse=True)
def ceiling(monkeypatch: Any) -> None:
    """No ceiling is measured."""
    fixed = ceilings.Ceilings(copy=1e10, matmul=1e11)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: fixed)


QUICK = dataclasses.replace(
    presets.PRESETS["quick"], mode_seconds=0.01, sweep_mode_seconds=0.01, compile_seconds=-1
)


def test_a_wrong_result_gets_no_time():
    info = _op(published=lambda x: 2 * x, library=lambda x: 2.01 * x)
    group = rows.Group(info, info.quick[0], torch.float32, CPU)
    outcomes = measure.Meter(QUICK).group(group)
    assert outcomes["reference", "forward"].status == measure.OK
    for mode in rows.MODES:
        wrong = outcomes["library", mode]
        assert wrong.status == measure.WRONG
        assert "error" in wrong.reason
        assert not wrong.samples
        assert "median_s" not in wrong.facts
        ours = outcomes["reference", mode]
        assert set(ours.facts["versus"]) == {"published", "copy"}
        assert ours.facts["error"] <= 1
        assert outcomes["copy", mode].samples
        assert "error" not in outcomes["copy", mode].facts
        assert outcomes["compiled", mode].reason == "the preset's compile time is spent"


def test_a_wrong_row_is_shown_as_wrong():
    gains = {"published": (2.0, 1.9, 2.1)}
    found = _run(_row("cpu", None), _row("triton", 1e-3, versus=gains), _row("published", 2e-3))
    text = markdown.report(found, [])
    assert "| **cpu** | wrong | - |" in text
    assert "- cpu: wrong: y: error 3 > 1" in text
    assert "2.00x ±5%" in text
    assert (
        results.best(results.members(found, "momentum_update", "forward", "T3072-D352-adam/fp32"))[
            "impl"
        ]
        == "triton"
    )


def test_a_missing_peer_has_a_line_and_no_column():
    skipped = _row("liger", None, kind=rows.BASELINE, status="skipped", reason="it is missing")
    text = markdown.report(_run(*_pair(2.0), skipped), [])
    assert "- liger: skipped: it is missing" in text
    assert "vs liger" not in text


def _dense_op(stand_in: Any) -> OpInfo:
    return dataclasses.replace(_op(published=stand_in), stand_in="published")


def test_a_stand_in_gives_the_truth_where_the_reference_takes_long():
    large = Case({"T": 2 * truths.PROBE, "D": 8})
    group = rows.Group(_dense_op(lambda x: x + x), large, torch.float32, CPU)

    def make(case: Case) -> Any:
        return measure._make(group, "step", case)

    dense = truths.probe(group, make)
    assert dense is not None
    known = truths.find(group, make, dense, seconds=0.0)
    assert known.note == "checked against `published` in fp64"
    assert known.truth.expected["y"].equal(2 * known.inputs["x"].double())
    assert truths.find(group, make, dense, seconds=1e9).note == ""
    off = rows.Group(_dense_op(lambda x: 2.0001 * x), large, torch.float32, CPU)
    with pytest.raises(AssertionError, match="published is not the reference in fp64"):
        truths.probe(off, make)


def test_a_smaller_case_is_checked_where_memory_does_not_suffice(monkeypatch: Any):
    info = _op()
    group = rows.Group(info, Case({"B": 8, "H": 2, "D": 4}), torch.float32, CPU)
    whole = check.truth
    asked = []

    def scarce(info: OpInfo, inputs: Any, *more: Any, **options: Any) -> Any:
        asked.append(inputs["x"].shape[0])
        if inputs["x"].shape[0] > 2:
            raise torch.OutOfMemoryError("no")
        return whole(info, inputs, *more, **options)

    monkeypatch.setattr(check, "truth", scarce)
    known = truths.find(group, lambda case: measure._make(group, "forward", case), None, 1.0)
    assert asked == [8, 2]
    assert known.note == "checked at B2-H2-D4"
    assert truths.shrink(Case({"B": 1, "H": 1, "N": 4096})) is None


def test_what_is_kept_for_backward_is_counted():
    info = _op()
    x = torch.randn(16, 8, requires_grad=True)
    work = check.Pass(info, lambda x: (x * x).exp().relu(), {"x": x})
    # exp keeps its result and relu keeps its own; the product keeps x, which is there anyway.
    assert work.saved_bytes() == 2 * x.nbytes


def test_a_failed_capture_leaves_the_current_stream_as_it_was(monkeypatch: Any):
    """torch's does not: where the end of a capture raises, its stream stays the current one."""

    class Stream:
        def wait_stream(self, other: Any) -> None:
            assert isinstance(other, Stream)

    default = current = Stream()

    def set_stream(stream: Any) -> None:
        nonlocal current
        current = stream

    @contextlib.contextmanager
    def on(stream: Any) -> Any:
        before = current
        set_stream(stream)
        yield
        set_stream(before)

    @contextlib.contextmanager
    def graph(_: Any) -> Any:
        set_stream(Stream())
        yield

    fakes = {
        "current_stream": lambda: current, "set_stream": set_stream, "stream": on, "graph": graph,
        "Stream": Stream, "CUDAGraph": object, "synchronize": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    outcomes = iter([1, 2])  # those of the warm-up and of the look-out for waits

    def call() -> int:
        for outcome in outcomes:
            return outcome
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    failed = cuda_graph.capture(call)
    assert failed == "no CUDA graph: operation not permitted when stream is capturing"
    assert current is default


# A run that is cut


def _outcome(row: dict[str, Any], samples: tuple[float, ...]) -> measure.Outcome:
    facts = {k: v for k, v in row.items() if k not in ("status", "median_s")}
    return measure.Outcome(row["status"], row["reason"], dict(enumerate(samples)), facts)


def test_rows_are_there_as_soon_as_they_are_measured(tmp_path: Path):
    file = tmp_path / "ops.jsonl"
    written = record.Record(file, "quick", CPU)
    written.add(_outcome(_row("reference", 1.0), ()))
    assert not file.exists(), "it ran and was not timed"
    written.add(_outcome(_row("cpu", 1.0), (1.0, 2.0, 3.0, 4.0, 10.0)))
    written.add(_outcome(_row("published", None), ()))
    with file.open("a") as torn:
        torn.write('{"op": "momentum_upda')
    found = results.collect(file, None, None, None)
    assert found["preset"] == "quick"
    assert found["ceilings"] == {"fp32": {"copy": 1e10, "matmul": 1e11}}
    ours, wrong = found["rows"]
    shown = {name: ours[name] for name in ("status", "median_s", "min_s", "q1_s", "q3_s", "rounds")}
    assert list(shown.values()) == ["ok", 3.0, 1.0, 2.0, 4.0, 5]
    assert (wrong["status"], wrong["reason"]) == ("wrong", "y: error 3 > 1")


def test_a_run_that_is_told_to_end_reports_what_it_has(monkeypatch: Any, tmp_path: Path):
    begun = []

    def ops(chosen: list[str], target: Path, select: str | None) -> int:
        begun.append("ops")
        record.Record(target, "quick", CPU).add(_outcome(_row("cpu", 1.0), (0.25, 0.5)))
        for _ in range(2):  # `timeout` tells twice
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(main, "_ops", ops)
    monkeypatch.setattr(main, "_trained", lambda part, *_: begun.append(part))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", "--out", str(tmp_path)])
    (tmp_path / "text.json").write_text('{"of": "an earlier run"}')
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main.main() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert begun == ["ops"]
    assert "momentum_update" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["median_s"] == 0.375


# The order and the time of a run


def test_every_op_has_its_first_shape_before_any_has_its_second():
    ops = load_ops()
    for preset in presets.PRESETS.values():
        device = torch.device("cuda" if preset.needs_cuda else "cpu")
        found = rows.groups(ops, preset, device, torch.float32)
        plain = [g for g in found if not g.sweep]
        assert found[: len(plain)] == plain, "sweeps come last"
        assert {g.info.name for g in plain[: len(ops)]} == set(ops)
        assert len({g.name for g in found}) == len(found)


def test_of_second_shapes_those_of_a_goal_come_first():
    def wanted(op: str, shape: str) -> bool:
        return goals.speaks_of("cpu", op, shape)

    ops = load_ops()
    found = [g for g in rows.groups(ops, QUICK, CPU, torch.float32, wanted) if not g.sweep]
    assert {g.info.name for g in found[: len(ops)]} == set(ops)
    seconds = [(g.info.name, g.case.id) for g in found[len(ops) :]]
    speaks = [wanted(*second) for second in seconds]
    assert speaks == sorted(speaks, reverse=True)
    assert not all(speaks[: len(ops)])
    assert ("momentum_update", "T8192-D1024-adam") in seconds[:3]


def test_a_spent_limit_skips_what_is_left(monkeypatch: Any):
    """By a clock that stands still but for the shapes: each takes 40 s of a limit of 100 s."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    info = dataclasses.replace(_op(), differentiable=())
    preset = dataclasses.replace(QUICK, ops_seconds=100, sweep_seconds=50)
    meter = measure.Meter(preset, timed=False, started=0.0)
    statuses = []
    for number in range(6):
        sweep = "T" if number >= 4 else ""
        group = rows.Group(info, Case({"T": 16 + number, "D": 8}), torch.float32, CPU, sweep)
        statuses.append(meter.group(group)["reference", "forward"].status)
        now[0] += 40
    assert statuses == ["ok", "ok", "ok", "skipped", "ok", "ok"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_goals_speak_of_shapes_that_are_measured(device: str):
    """Every goal finds rows among the shapes of the preset, also where nothing has a time."""
    preset = presets.PRESETS["quick" if device == "cpu" else "gpu"]
    groups = rows.groups(load_ops(), preset, torch.device(device), presets.default_dtype(CPU))
    every = [
        measure._facts(r) | {"status": "skipped", "reason": ""}
        for g in groups
        for r in rows.rows(g)
    ]
    run = _run(
        *(r for r in every if not r["sweep"]),
        sweeps=tuple(r for r in every if r["sweep"]),
        environment=FACTS | {"device": device},
    )
    known = {(r["op"], r["impl"]) for r in every}
    found = goals.standings(run)
    assert len(found) > 10
    for standing in found:
        assert standing.status == goals.UNMEASURED
        assert standing.expected >= 1, standing.goal
    counts = {s.goal.subject: s.expected for s in found}
    if device == "cuda":
        assert counts["expert MLP, the field's 12 shapes"] == 12
        assert counts["expert MLP, Qwen3-30B"] == 5
        assert counts["bare grouped GEMM, uniform"] == counts["RPC attention, N >= 1024"] == 2
        assert counts["momentum update"] == 9
        assert counts["adaptive-clustering router"] == 3
    else:
        assert counts["RPC attention, 197 x 64, 4 iterations"] == 1
    for name in ("library", "published", "liger"):
        assert ("moe_mlp", name) in known
    assert ("grouped_gemm", "bmm") in known


# Goals


@pytest.mark.parametrize(
    ("published", "status"), [(9.0, goals.MET), (7.0, goals.MISSED), (None, goals.UNMEASURED)]
)
def test_a_goal_is_met_missed_or_not_measured(published: float | None, status: str):
    run = _run(*(_pair(published) if published else [_row("cpu", None)]))
    goal = next(
        s for s in goals.standings(run) if s.goal.subject.startswith("momentum, Adam, 3072")
    )
    assert (goal.mode, goal.status) == ("forward", status)
    assert goal.bound == ("50% of copy" if published else "-")
    table = list(markdown.goals_table(run))
    assert any("at least 8.00x" in line and status in line for line in table)


def test_the_worst_shape_counts_and_a_part_is_not_the_whole():
    def standing(least: float, over: str, *gains: float | None) -> goals.Standing:
        goal = goals.Goal("cpu", "s", "w", least, lambda found, mode: [], over=over)
        return goals._standing(goal, "forward", [(f"T{i}", g) for i, g in enumerate(gains)])

    each = standing(1.0, goals.EACH, 3.0, 0.9, 2.0)
    assert (each.measured, each.shape, each.status) == (0.9, "T1", goals.MISSED)
    assert standing(1.4, goals.MEAN, 1.0, 4.0).status == goals.MET
    assert standing(1.4, goals.MEAN, 1.0, None).status == goals.PARTLY
    assert standing(1.0, goals.EACH, 2.0, None).status == goals.PARTLY
    assert standing(1.0, goals.EACH, 0.5, None).status == goals.MISSED


# Growth


def _swept(impl: str, power: float, overhead: float = 0.0) -> list[dict[str, Any]]:
    return [
        _row(impl, overhead + 1e-6 * t**power, sweep="T", sizes={"T": t, "D": 8}, shape=f"T{t}-D8",
             peak_bytes=100 * t)
        for t in (4096, 512, 1024, 2048)
    ]  # fmt: skip


def test_exponents_are_recovered():
    run = _run(sweeps=(*_swept("published", 2.0), *_swept("cpu", 1.0, overhead=1e-3)))
    ours, published = scaling.fits(run, "momentum_update", "T", "forward")
    assert (ours.impl, published.impl) == ("cpu", "published")
    assert published.time == pytest.approx(2.0)
    assert published.memory == pytest.approx(1.0)
    assert ours.time is not None
    assert ours.last is not None
    assert ours.time < ours.last < 1.0
    assert scaling.exponent([(2.0, 1.0), (2.0, 3.0)]) is None
    noisy = random.Random(1)
    points = [(x, x**1.5 * math.exp(noisy.gauss(0, 0.02))) for x in (1, 2, 4, 8, 16)]
    assert scaling.exponent(points) == pytest.approx(1.5, abs=0.05)
    text = markdown.report(run, [])
    assert (
        "| `momentum_update` | tokens | 512 | 4096 | forward | published | 2.00 | 2.00 | 1.00 |"
        in text
    )


def test_a_sweep_says_where_something_has_no_time():
    refused = _row(
        "published", None, sweep="T", sizes={"T": 8192}, status="skipped", reason="53 GB"
    )
    run = _run(sweeps=(*_swept("cpu", 1.0), refused))
    assert "- momentum_update, forward, published at T = 8192: skipped: 53 GB" in markdown.report(
        run, []
    )


# Past one card


def test_expert_parallelism_on_paper():
    layer = expert_parallel.Layer("x", 2, 8, 2048, 768, True, 600e12)
    assert layer.sent(8, merged=False) == 2 * 8 * 7 / 8 * 2048 * 2
    assert layer.copies(8, merged=True) < layer.copies(8, merged=False)
    assert layer.copies(10**6, merged=True) == pytest.approx(8, rel=1e-4)
    # Alone, K and D cancel: bytes * rate * 2 (P - 1) / P against 6 I link.
    link = 450e9
    expected = 2 * 2 * (7 / 8) * 600e12 / (6 * 768 * link)
    assert layer.dominated(8, link, merged=False) == pytest.approx(expected)
    wide = dataclasses.replace(layer, hidden=round(layer.break_even(8, link, merged=False)))
    assert wide.dominated(8, link, merged=False) == pytest.approx(1, rel=1e-3)


# Against a stored run


def test_noise_is_no_regression_and_a_slowdown_is():
    base = _run(*_pair(4.0))
    assert [c.status for c in compare.changes(base, _run(*_pair(3.8)))] == [compare.SAME]
    assert [c.status for c in compare.changes(base, _run(*_pair(2.0)))] == [compare.SLOWER]
    assert [c.status for c in compare.changes(base, _run(*_pair(8.0)))] == [compare.FASTER]
    loud = _run(*_pair(2.6, width=0.5))
    assert [c.status for c in compare.changes(_run(*_pair(4.0, width=0.5)), loud)] == [compare.SAME]


def test_one_faster_baseline_is_no_regression():
    gains = {"published": (4.0, 3.9, 4.1), "library": (4.0, 3.9, 4.1), "compiled": (2.0, 1.9, 2.1)}
    old = _run(_against(gains))
    new = _run(_against(gains | {"compiled": (0.5, 0.49, 0.51)}))
    assert not compare.regressions(compare.changes(old, new))


def test_a_result_gone_wrong_is_a_regression():
    old, new = _run(*_pair(4.0)), _run(_row("cpu", None), _row("published", 1e-3))
    assert [c.status for c in compare.regressions(compare.changes(old, new))] == [compare.BROKEN]


def test_compare_exits_with_1_on_a_regression(tmp_path: Path, monkeypatch: Any, capsys: Any):
    machine = tmp_path / "some-chip-2-cores"
    machine.mkdir()
    for name, gain, day in (("a", 9.0, "01"), ("b", 4.0, "02")):
        run = _run(*_pair(gain), environment=FACTS | {"date": f"2026-01-{day} 00:00 UTC"})
        (machine / f"{name}.json").write_text(json.dumps(run))
    monkeypatch.setattr(compare, "SAVED", tmp_path)
    new = tmp_path / "new.json"
    for gain, code in ((4.0, 0), (2.0, 1)):
        new.write_text(json.dumps(_run(*_pair(gain))))
        monkeypatch.setattr("sys.argv", ["compare", str(new)])
        assert compare.main() == code
        assert "compared with b.json" in capsys.readouterr().out
    new.write_text(json.dumps(_run(*_pair(4.0), environment=FACTS | {"chip": "Other"})))
    assert compare.main() == 2


# What is written


def test_the_report_is_whole_and_its_images_exist(tmp_path: Path):
    run = _run(*_pair(4.0), *_pair(2.0, mode="step"), sweeps=tuple(_swept("cpu", 1.0)))
    folder = report.write(run, tmp_path / "out")
    text = (folder / "report.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"overview.png", "roofline.png", "time-tokens.png", "memory.png"} < set(linked)
    for name in linked:
        assert (folder / name).stat().st_size > 1000
    for value in ("Some Chip", "0123456789", "4.00x ±2%"):
        assert value in text
    assert json.loads((folder / "results.json").read_text()) == run
    header, *lines = (folder / "results.csv").read_text().splitlines()
    assert header.startswith("op,sweep,shape")
    assert len(lines) == len(run["rows"]) + len(run["sweeps"])
    _tables_are_even(text)
    console = terminal.console()
    with console.capture() as shown:
        report.show(run, console)
    assert "4.00x ±2%" in shown.get()
    assert "at least 8.00x" in shown.get()


def test_the_same_run_gives_the_same_images(tmp_path: Path):
    run = _run(*_pair(4.0), sweeps=tuple(_swept("cpu", 1.0)))
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        plots.draw_whole(run, folder, "svg")
    names = sorted(p.name for p in folders[0].iterdir())
    assert "overview.svg" in names
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_the_readme_is_generated():
    """`python -m benchmarks.readme` leaves everything as it is."""
    runs = readme.latest()
    text = readme.README.read_text()
    assert readme.replaced(text, readme.section(runs)) == text, "run python -m benchmarks.readme"
    for path, found in runs:
        assert (path.parent / "README.md").read_text() == readme.report(path, found)
        _tables_are_even(readme.report(path, found))
    for link in re.findall(r"\((benchmarks/results/[^)]*)\)", text):
        assert (readme.ROOT / link).exists(), link


def test_the_readme_shows_the_latest_run_of_each_machine(tmp_path: Path):
    for machine, day, gain in (("a", "01", 2.75), ("a", "02", 3.0), ("gpu", "01", 5.0)):
        folder = tmp_path / machine
        folder.mkdir(exist_ok=True)
        device = "cuda" if machine == "gpu" else "cpu"
        facts = FACTS | {"date": f"2026-01-{day} 00:00 UTC", "device": device}
        run = _run(*_pair(gain), environment=facts)
        (folder / f"{day}.json").write_text(json.dumps(run))
    runs = readme.latest(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path, _ in runs] == [
        "gpu/01.json",
        "a/02.json",
    ]
    part = readme.section(runs, tmp_path)
    assert "5.00x" in part
    assert "3.00x" in part
    assert "2.75x" not in part
    whole = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert (
        readme.replaced(whole, part) == f"before\n{readme.BEGIN}\n\n{part}\n{readme.END}\nafter\n"
    )


def _tables_are_even(text: str) -> None:
    """Every line of a table has as many cells as its head."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1, table


def test_liger_is_left_out_where_it_cannot_run():
    from molex_kernels.testing.baselines.dispatch import liger_moe_mlp

    x, index = torch.zeros(4, 8), torch.zeros(4, 1, dtype=torch.int64)
    given = (x, index, torch.ones(4, 1), torch.zeros(2, 16, 8), torch.zeros(2, 8, 8))
    with pytest.raises(NotImplementedError, match="SwiGLU"):
        liger_moe_mlp(*given)
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        liger_moe_mlp(*given, activation="swiglu")
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        moved = [t.cuda() for t in given]
        assert liger_moe_mlp(*moved, activation="swiglu").shape == x.shape
