"""The benchmark suite itself: what is checked, timed and written down, on small made-up ops."""

# ruff: noqa: E402 - the suite needs packages that the tests of the ops do not

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

for needed in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(needed)

import benchmark_runs as runs

from benchmarks import __main__ as main
from benchmarks import (
    ceilings,
    check,
    cuda_graph,
    measure,
    oracle,
    presets,
    products,
    record,
    results,
    rows,
    spread,
    terminal,
    timing,
)
from molex_kernels.testing import load_ops
from molex_kernels.testing.opinfo import Case, Cost, OpInfo

CPU = torch.device("cpu")
F32_CPU = torch.float32, CPU


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


_op = runs.scale_op


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


@pytest.mark.parametrize(
    ("backend", "name"),
    [(SDPBackend.MATH, "math"), (SDPBackend.FLASH_ATTENTION, "flash for CPUs")],
)
def test_a_row_names_the_attention_that_pytorch_took(backend: SDPBackend, name: str):
    def attend(x: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x[None, None],) * 3)

    info = dataclasses.replace(_op(), proxies={"attention": attend})
    outcomes = measure.Meter(QUICK).group(rows.Group(info, info.quick[0], torch.float32, CPU))
    for mode in rows.MODES:
        assert outcomes["attention", mode].facts["sdpa"] == name
        assert "sdpa" not in outcomes["reference", mode].facts


def _dense_op(published: Any) -> OpInfo:
    return dataclasses.replace(_op(published=published), oracle="published")


def test_the_oracle_is_expected_where_the_reference_takes_long():
    large = Case({"T": 2 * oracle.PROBE["cpu"], "D": 8})
    group = rows.Group(_dense_op(lambda x: x + x), large, torch.float32, CPU)

    def make(case: Case) -> Any:
        return measure.make(group, "step", case)

    times = oracle.probe(group, make)
    assert times is not None
    checked = oracle.find(group, make, times, seconds=0.0)
    assert checked.note == "checked against `published` in fp64"
    assert checked.expected.fp64["y"].equal(2 * checked.inputs["x"].double())
    assert oracle.find(group, make, times, seconds=1e9).note == ""
    off = rows.Group(_dense_op(lambda x: 2.0001 * x), large, torch.float32, CPU)
    with pytest.raises(AssertionError, match="published is not the reference in fp64"):
        oracle.probe(off, make)


def test_a_slow_baseline_on_a_cpu_is_left_out(monkeypatch: Any):
    now = [0.0]
    calls: dict[str, int] = {"slow": 0, "importing": 0}

    def taking(name: str, first: float, later: float) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            now[0] += later if calls[name] else first
            calls[name] += 1
            return 2 * x

        return call

    # The reference of fp64 and fp32 is `scale` itself, which takes no time.
    info = _op(published=taking("slow", 3.0, 3.0), library=taking("importing", 3.0, 0.0))
    group = rows.Group(dataclasses.replace(info, differentiable=()), info.quick[0], *F32_CPU)
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    outcomes = measure.Meter(QUICK, timed=False, started=0.0).group(group)
    slow = outcomes["published", "forward"]
    assert (slow.status, slow.reason) == (measure.SKIPPED, "would take about 3 s a call")
    assert outcomes["library", "forward"].status == measure.OK
    assert outcomes["reference", "forward"].status == measure.OK


def test_a_step_that_is_too_large_leaves_the_forward_pass():
    def cost(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
        return Cost(1, int(3e11) if backward else 1)  # at 1e11 a second

    info = dataclasses.replace(_op(), cost=cost)
    outcomes = measure.Meter(QUICK).group(rows.Group(info, info.quick[0], *F32_CPU))
    assert outcomes["reference", "forward"].status == measure.OK
    assert outcomes["reference", "step"].reason.startswith("too large: 3.0 s a pass")


def test_a_smaller_case_is_checked_where_memory_does_not_suffice(monkeypatch: Any):
    info = _op()
    group = rows.Group(info, Case({"B": 8, "H": 2, "D": 4}), torch.float32, CPU)
    whole = check.expect
    asked = []

    def scarce(info: OpInfo, inputs: Any, *more: Any, **options: Any) -> Any:
        asked.append(inputs["x"].shape[0])
        if inputs["x"].shape[0] > 2:
            raise torch.OutOfMemoryError("no")
        return whole(info, inputs, *more, **options)

    monkeypatch.setattr(check, "expect", scarce)
    checked = oracle.find(group, lambda case: measure.make(group, "forward", case), None, 1.0)
    assert asked == [8, 2]
    assert checked.note == "checked at B2-H2-D4"
    smallest = Case({"B": 1, "H": 1, "N": 4096})
    assert rows.shrink(smallest) is smallest


def test_what_is_kept_for_backward_is_counted():
    info = _op()
    x = torch.randn(16, 8, requires_grad=True)
    work = check.Workload(info, lambda x: (x * x).exp().relu(), {"x": x})
    # exp keeps its result and relu keeps its own; the product keeps x, which is there anyway.
    assert work.saved_bytes() == 2 * x.nbytes


def test_what_is_given_is_not_poisoned():
    """The gradient of x in x + f is the upstream gradient itself, which the next call needs."""
    info = OpInfo(**{**vars(load_ops()["router_z_loss"]), "differentiable": ("x",),
                     "results": lambda y: {"y": y}})  # fmt: skip
    x, upstream = torch.randn(3, requires_grad=True), torch.randn(3)
    work = check.Workload(info, lambda x: x + 1, {"x": x}, {"y": upstream})
    results = work.tensors()
    assert results["d x"].data_ptr() == upstream.data_ptr()
    check.poison(work, results)
    assert upstream.isfinite().all()
    assert results["y"].isnan().all()


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
    def graph(_: Any, *, stream: Any, capture_error_mode: str) -> Any:
        assert stream is not default
        set_stream(stream)
        yield

    class Generator:
        state = "waits for the end of a capture"

        def clone_state(self) -> str:
            return "fresh"

        def graphsafe_set_state(self, state: str) -> None:
            self.state = state

    fakes = {
        "current_stream": lambda: current, "set_stream": set_stream, "stream": on, "graph": graph,
        "Stream": Stream, "CUDAGraph": object, "synchronize": lambda: None,
        "set_sync_debug_mode": lambda mode: None, "current_device": lambda: 0,
        "default_generators": (Generator(),),
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
    assert torch.cuda.default_generators[0].state == "fresh"


def test_a_step_is_captured_on_leaves_that_no_stream_has_seen():
    info = runs.scale_op()
    group = rows.groups({info.name: info}, presets.PRESETS["quick"], CPU, (torch.float32,))[0]
    inputs, upstream = measure.make(group, "step", group.case)
    work = check.Workload(info, group.function("reference"), inputs, upstream)
    work.call()
    alone = work.on_new_leaves()
    for name in info.differentiable:
        leaf, new = work.inputs[name], alone.inputs[name]
        assert new is not leaf
        assert new.requires_grad
        assert new.data_ptr() == leaf.data_ptr()
    for name, t in work.tensors().items():
        assert torch.equal(alone.tensors()[name], t)


# A run that is cut


def _outcome(row: dict[str, Any], samples: tuple[float, ...]) -> measure.Outcome:
    facts = {k: v for k, v in row.items() if k not in ("status", "median_s")}
    return measure.Outcome(row["status"], row["reason"], dict(enumerate(samples)), facts)


def test_rows_are_there_as_soon_as_they_are_measured(tmp_path: Path):
    file = tmp_path / "ops.jsonl"
    written = record.Record(file, "quick", CPU)
    written.add(_outcome(runs.row("reference", 1.0), ()))
    assert not file.exists(), "it ran and was not timed"
    written.add(_outcome(runs.row("cpu", 1.0), (1.0, 2.0, 3.0, 4.0, 10.0)))
    written.add(_outcome(runs.row("published", None), ()))
    with file.open("a") as torn:
        torn.write('{"op": "momentum_upda')
    found = results.read(file)
    assert found["preset"] == "quick"
    both = {"copy": 1e10, "matmul": 1e11, "matmuls": {}}
    assert found["ceilings"] == {"fp32": both, "bf16": both}
    ours, wrong = found["rows"]
    shown = {name: ours[name] for name in ("status", "median_s", "min_s", "q1_s", "q3_s", "rounds")}
    assert list(shown.values()) == ["ok", 3.0, 1.0, 2.0, 4.0, 5]
    assert (wrong["status"], wrong["reason"]) == ("wrong", "y: error 3 > 1")


def test_a_run_that_is_told_to_end_reports_what_it_has(monkeypatch: Any, tmp_path: Path):
    def told(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16:
            for _ in range(2):  # `timeout` tells twice
                os.kill(os.getpid(), signal.SIGTERM)
        return 2 * x

    info = _op(published=told)
    monkeypatch.setattr(main, "load_ops", lambda: {"scale": info})
    monkeypatch.setitem(presets.PRESETS, "quick", QUICK)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", "--out", str(tmp_path)])
    (tmp_path / "rows.jsonl").write_text('{"of": "an earlier run"}')
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main.main() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "`scale`" in (tmp_path / "report.md").read_text()
    found = json.loads((tmp_path / "results.json").read_text())
    timed = {row["dtype"] for row in found["rows"] if "median_s" in row}
    assert timed == {"fp32"}
    left = [
        row for row in found["rows"] + found["sweeps"] if "told to end" in row.get("reason", "")
    ]
    assert {row["dtype"] for row in left if not row["sweep"]} == {"bf16"}
    assert {row["sizes"]["T"] for row in left if row["sweep"]} == {16, 32}


def test_only_what_is_right_passes(tmp_path: Path):
    group = rows.Group(_op(library=lambda x: 3 * x), Case({"T": 64, "D": 8}), torch.float32, CPU)
    written = record.Record(tmp_path / "rows.jsonl", "quick", CPU)
    assert main.measure([group], measure.Meter(QUICK), written, terminal.console())
    broken = dataclasses.replace(
        group.info, results=lambda y: {"y": y / 0 if y.dtype != torch.float64 else y}
    )
    group = dataclasses.replace(group, info=broken)
    assert not main.measure([group], measure.Meter(QUICK), written, terminal.console())


# The order and the time of a run


def test_every_op_has_its_first_shape_in_both_dtypes_before_any_has_its_second():
    ops = load_ops()
    for preset in presets.PRESETS.values():
        device = torch.device("cuda" if preset.needs_cuda else "cpu")
        dtypes = presets.dtypes(device)
        found = rows.groups(ops, preset, device, dtypes)
        plain = [g for g in found if not g.sweep]
        assert found[: len(plain)] == plain, "sweeps come last"
        for number, dtype in enumerate(dtypes):
            first = plain[number * len(ops) : (number + 1) * len(ops)]
            assert {g.info.name for g in first} == set(ops)
            assert {g.dtype for g in first} == {dtype}
        assert {g.dtype for g in found[2 * len(ops) :]} == {dtypes[0]}
        assert len({g.name for g in found}) == len(found)


@pytest.mark.parametrize(("native", "tokens"), [(False, 32 * 48), (True, 16 * 32 * 48)])
def test_a_cpu_with_16_bit_products_has_whole_shapes(monkeypatch: Any, native: bool, tokens: int):
    monkeypatch.setattr(products, "native", lambda dtype: native)
    case = Case({"T": 16 * 32 * 48, "D": 8})
    info = dataclasses.replace(_op(), quick=(case,), quick_sweeps=())
    both = torch.float32, torch.bfloat16
    first, second = rows.groups({"scale": info}, QUICK, CPU, both)
    assert (first.dtype, first.case.sizes["T"]) == (torch.float32, 16 * 32 * 48)
    assert (second.dtype, second.case.sizes["T"]) == (torch.bfloat16, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_run_in_16_bits_on_a_cpu_decodes_and_fills(dtype: torch.dtype):
    ops = {"moe_mlp": load_ops()["moe_mlp"]}

    def modes(*dtypes: torch.dtype, device: str = "cpu") -> dict[int, tuple[str, ...]]:
        found = rows.groups(ops, QUICK, torch.device(device), dtypes)
        return {
            group.case.sizes["T"]: group.modes
            for group in found
            if group.case.sizes["E"] == 32 and not group.sweep
        }

    served = {1: ("forward",), 16: ("forward",), 512: rows.MODES, 4096: rows.MODES}
    assert modes(dtype) == modes(dtype, torch.float32) == served
    assert modes(torch.float32, dtype) == modes(dtype, device="cuda") == {}


def test_products_of_16_bits_are_named(monkeypatch: Any):
    cpus = {
        ("AMX", "AVX-512 FP16"): "avx2 amx_tile amx_bf16 avx512_bf16 avx512_fp16",
        ("AVX-512 BF16", "none"): "avx2 avx512f avx512_bf16",
        ("none", "none"): "avx2 fma",
        ("Arm BF16", "Arm FP16"): "fp asimd asimdhp bf16",
        ("unknown", "unknown"): "",
    }
    for names, flags in cpus.items():
        monkeypatch.setattr(products, "_flags", lambda flags=flags: frozenset(flags.split()))
        products.instructions.cache_clear()
        dtypes = torch.bfloat16, torch.float16
        assert tuple(map(products.instructions, dtypes)) == names
        usable = tuple(name not in ("none", "unknown") for name in names)
        assert tuple(map(products.native, dtypes)) == usable
    products.instructions.cache_clear()


def test_the_extensions_products_are_read_where_they_are_said():
    assert products.path({"extension": {"operators": "cpu:x"}}) is None
    assert products.path({"extension": {"tiles": "amx"}}) == "tiles amx"
    assert products.path({"extension": {"tiles": ""}}) is None


def test_ceilings_are_said_by_dtype():
    found = {
        "bf16": {"copy": 2e10, "matmul": 1e11, "matmuls": {"bf16": 4e9, "fp32": 1e11}},
        "fp32": {"copy": 2e10, "matmul": 1e11, "matmuls": {"fp32": 1e11}},
    }
    facts = {"fp32_instructions": "AVX2", "bf16_instructions": "none"}
    assert ceilings.sentence(found, facts) == (
        "ceilings: copy 20.0 GB/s; products fp32 100 GFLOP/s (AVX2), bf16 4.00 GFLOP/s (no "
        "instructions); bf16 held against fp32"
    )
    fast = {"bf16": {"copy": 2e10, "matmul": 2e12, "matmuls": {"bf16": 2e12, "fp32": 1e11}}}
    assert ceilings.sentence(fast, {"bf16_instructions": "AMX"}) == (
        "ceilings: copy 20.0 GB/s; products fp32 100 GFLOP/s, bf16 2000 GFLOP/s (AMX)"
    )


def test_a_ceiling_is_the_fastest_dtype_that_can_be_taken(monkeypatch: Any):
    monkeypatch.undo()
    rates = {torch.float32: 1e11, torch.bfloat16: 4e9}
    monkeypatch.setattr(ceilings, "_copy_rate", lambda device: 2e10)
    monkeypatch.setattr(ceilings, "_matmul_rate", lambda device, dtype: rates[dtype])
    measured = ceilings.measure.__wrapped__
    on_cpu = measured(CPU, torch.bfloat16)
    assert (on_cpu.matmul, on_cpu.matmuls) == (1e11, {"bf16": 4e9, "fp32": 1e11})
    assert measured(torch.device("cuda"), torch.bfloat16).matmuls == {"bf16": 4e9}
    assert measured(CPU, torch.float32).matmuls == {"fp32": 1e11}


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
