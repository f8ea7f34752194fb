"""What a run of the benchmarks looks like: tables, bars, verdicts, images, options, its end."""

# ruff: noqa: E402 - the suite needs packages that the tests of the ops do not

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(needed)

import benchmark_runs as runs
from rich.color import Color
from rich.console import Console

from benchmarks import __main__ as main
from benchmarks import (
    ceilings,
    compare,
    figure,
    goals,
    growth_plots,
    limit,
    markdown,
    measure,
    noise,
    plots,
    presets,
    report,
    results,
    rows,
    tables,
    terminal,
)
from benchmarks.spread import Ratio

CPU = torch.device("cpu")
BASELINES = ("published", "reference", "compiled", "library", "compiled_library", "liger")
SHAPES = ("T3072-D352-I352-E16-K2-adam-bias-affine", "T6144-D352-I352-E16-K2-adam-bias-affine")


def _console(width: int, *, tty: bool = True) -> Console:
    return Console(width=width, file=io.StringIO(), force_terminal=tty, color_system=None)


def _text(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def _full(gain: float = 2.0, width: float = 0.02, **more: Any) -> dict[str, Any]:
    """Two long shapes with a gain over every baseline there may be."""
    interval = (gain, gain * (1 - width), gain * (1 + width))
    found = []
    for shape, mode in itertools.product(SHAPES, rows.MODES):
        of = {"shape": shape, "mode": mode, "op": "moe_mlp_momentum"}
        found.append(runs.row("cpu", 1e-3, versus=dict.fromkeys(BASELINES, interval), **of))
        found += [runs.row(b, 1e-3 * gain, kind=rows.BASELINE, **of) for b in BASELINES]
    return runs.run(*found, **more)  # type: ignore[no-any-return]


# Tables


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_folded(width: int):
    console = _console(width)
    report.show(_full(), console)
    lines = _text(console).splitlines()
    assert max(map(len, lines)) <= width
    # A row is one line: both passes of both shapes, and nothing between them.
    at = next(i for i, line in enumerate(lines) if line.startswith("moe_mlp_momentum"))
    passes = [next(p for p in rows.MODES if f" {p} " in line) for line in lines[at + 1 : at + 5]]
    assert passes == [*rows.MODES, *rows.MODES]
    assert lines[at + 5].startswith(("Left out at", "against published"))


def test_what_is_left_out_is_said_and_its_order_is_fixed():
    columns = [tables.Column("shape"), *(tables.Column(n, leave=i) for i, n in enumerate("abc"))]
    lines = [["s" * 40, *["x" * 10] * 3]]
    kept = {width: tables.fit(columns, lines, width) for width in (100, 70, 56, 46, 32)}
    assert kept == {
        100: ([0, 1, 2, 3], 40),
        70: ([0, 1, 2, 3], 34),
        56: ([0, 1, 2, 3], 20),
        46: ([0, 2, 3], 22),
        32: ([0, 3], 20),
    }
    shown = {}
    for width in (80, 120, 200):
        console = _console(width)
        report.show(_full(), console)
        shown[width] = [line for line in _text(console).splitlines() if "Left out" in line]
    assert shown == {
        80: ["Left out at 80 columns: reference, compiled_library, liger, of ceiling."],
        120: ["Left out at 120 columns: of ceiling."],
        200: [],
    }


def test_shapes_stay_apart_when_their_names_are_cut():
    names = ["B256-H3-N197-d64-n1-lam_4.0/bf16", "B256-H3-N197-d64-n2-lam_4.0/bf16"]
    lines = [["rpc_attention"], *([name, "x" * 12] for name in names)]
    console = _console(35)
    tables.show("title", [tables.Column("shape", "left"), tables.Column("y")], lines, console)
    cut = [line.split()[0] for line in _text(console).splitlines() if "…" in line]
    assert len(set(cut)) == 2


def test_a_file_has_whole_lines_and_no_control_characters(monkeypatch: Any, capsys: Any):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = terminal.console()
    assert (console.width, console.is_terminal) == (terminal.LOG_WIDTH, False)
    report.show(_full(facts=0), console)
    terminal.line("word " * 60 + "end", console)
    with terminal.measuring_bar(console, lambda: 1.0) as bar:
        bar.add_task("name", total=2)
    with terminal.training_bar("text", console) as bar:
        bar.add_task("losses", total=2)
    text = capsys.readouterr().out
    assert "word " * 60 + "end\n" in text
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
    monkeypatch.setenv("COLUMNS", "95")
    assert terminal.console().width == 95


# Bars


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_has_name_count_and_time_left(width: int):
    console = _console(width)
    name = f"moe_mlp_momentum/{SHAPES[0]}/fp32/over-T"
    with terminal.measuring_bar(console, lambda: 65.0) as bar:
        task = bar.add_task("", total=88)
        bar.update(task, description=name, refresh=True)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", _text(console))
    shown = [part for part in plain.split("\n") if "0/88" in part]
    assert shown
    assert shown[-1].startswith(name[:20])
    assert "1:05 left" in shown[-1]
    assert len(shown[-1]) <= width


def test_the_time_left_is_that_of_the_pace_within_the_limit():
    def left(limit: float) -> str:
        bar = terminal.Progress(get_time=lambda: 10.0, auto_refresh=False)
        task = bar.add_task("", total=8, completed=2)
        bar.tasks[task].start_time = 0.0
        return terminal.TimeLeft(lambda: limit).render(bar.tasks[task]).plain

    assert left(float("inf")) == "0:30 left"
    assert left(12.0) == "0:12 left"


def test_losses_stand_below_the_training_bar():
    console = _console(80)
    bar = terminal.training_bar("text", console)
    bar.add_task("train bits/byte: " + ", ".join(f"variant{i} 5.02" for i in range(9)), total=36)
    with console.capture() as shown:
        console.print(*bar.get_renderables())
    first, *rest = shown.get().splitlines()
    assert first.startswith("text ")
    assert "0/36" in first
    assert "bits" not in first
    assert "".join(rest).count("variant") == 9


# What a run says of itself


def test_what_was_skipped_is_one_line():
    late = [
        runs.row("cpu", None, status="skipped", reason=why, shape=f"T{index}")
        for index, why in enumerate([measure.LATE] * 40 + ["too large: 3 GiB of inputs", "no GPU"])
    ]
    found = runs.run(*runs.pair(2.0), *late)
    console = _console(120)
    report.show(found, console)
    text = _text(console)
    lines = [line for line in text.splitlines() if "skipped" in line]
    assert lines == [
        "42 of 45 rows skipped (40 for time, 1 too large, 1 not possible); listed in results.csv"
    ]
    assert "T17" not in text
    assert lines[0] in markdown.report(found, [])
    assert results.skips(runs.run(*runs.pair(2.0))) == ""


def test_a_goal_inside_the_interval_is_undecided():
    assert goals.outcome(Ratio(9.59, 8.1, 16.0), 8.0) == goals.MET
    assert goals.outcome(Ratio(9.59, 4.9, 16.0), 8.0) == goals.UNDECIDED
    assert goals.outcome(Ratio(7.0, 4.9, 8.1), 8.0) == goals.UNDECIDED
    assert goals.outcome(Ratio(7.0, 6.9, 7.1), 8.0) == goals.MISSED
    found = runs.run(*runs.pair(9.0, width=0.5))
    by_baseline = {v.goal.baseline: v.outcome for v in goals.verdicts(found)}
    assert by_baseline == {"published": goals.UNDECIDED, "compiled": goals.MET}
    row = "T3072-D352-adam/fp32 | forward | `published` | 8.00x | 9.00x ±55% | undecided |"
    assert row in markdown.report(found, [])
    console = _console(80)
    report.show(found, console)
    text = _text(console)
    (line,) = [x for x in text.splitlines() if "8.00x" in x]
    assert line.split()[-1] == "undecided"
    assert "against published: 1 faster, 0 slower, 0 undecided" in text
    around = [Ratio(1.2, 0.9, 1.4), Ratio(2, 1.9, 2.1), Ratio(0.5, 0.4, 0.6)]
    assert goals.against(around) == "1 faster, 1 slower, 1 undecided"


@pytest.mark.parametrize("goal", [g for each in goals.GOALS.values() for g in each], ids=str)
def test_a_goal_stands_in_the_pages(goal: goals.Goal):
    text = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    said = (
        f"{goal.factor:g}x `{goal.baseline}`"
        if goal.factor != 1
        else f"as fast as `{goal.baseline}`"
    )
    assert any(row.startswith(f"| `{goal.op}`") and said in row for row in text.splitlines()), said


def test_a_comparison_in_the_noise_is_undecided():
    old, new = (runs.run(*runs.pair(4.0, width=0.5)) for _ in range(2))
    changes = compare.changes(old, new)
    assert [c.status for c in changes] == [compare.UNDECIDED]
    console = _console(80)
    compare.show(changes, console)
    assert "0 same, 0 faster, 0 slower, 1 undecided" in " ".join(_text(console).split())


def test_a_busy_machine_is_said():
    quiet = runs.run(*runs.pair(2.0))
    assert noise.banner(quiet) == ""
    loaded = runs.run(*runs.pair(2.0), environment=runs.FACTS | {"load": 5.0})
    assert noise.banner(loaded).startswith("BUSY MACHINE: a load of 5.0 on 2 cores")
    wide = runs.run(*runs.pair(2.0, width=0.4))
    assert "intervals of ±42% in the median" in noise.banner(wide)
    for found in (loaded, wide):
        console = _console(120)
        report.show(found, console)
        assert "BUSY MACHINE" in _text(console)
        assert "> BUSY MACHINE" in markdown.report(found, [])
    assert "BUSY" not in markdown.report(quiet, [])


@pytest.mark.parametrize(("ceiling", "said"), [("copy", "(cache)"), ("matmul", "(cache or noise)")])
def test_more_than_a_ceiling_says_cache(monkeypatch: Any, tmp_path: Path, ceiling: str, said: str):
    over, under = (runs.run(*runs.pair(2.0, share=part, ceiling=ceiling)) for part in (1.13, 0.99))
    console = _console(120)
    report.show(over, console)
    assert f"113% {said}" in _text(console)
    assert f"113% {said} of {ceiling}" in markdown.report(over, [])
    assert f"99% of {ceiling}" in markdown.report(under, [])
    drawn = _drawn(monkeypatch, plots, lambda: plots._ceilings(over, tmp_path / "ceilings"))
    assert f"113% {said}" in [text.get_text() for text in drawn.axes[0].texts]


# Images


def _drawn(monkeypatch: Any, module: Any, draw: Any) -> Any:
    """The figure, as it is when it is saved."""
    kept = []

    def write(drawn: Any, path: Path, bottom: float = 0.0, top: float = 1.0) -> str:
        drawn.tight_layout(rect=(0, bottom, 1, top))
        drawn.canvas.draw()
        kept.append(drawn)
        return path.name

    monkeypatch.setattr(module, "write", write)
    draw()
    (drawn,) = kept
    return drawn


@pytest.mark.parametrize("count", [1, 18])
def test_no_mark_is_hidden(monkeypatch: Any, tmp_path: Path, count: int):
    """All gains are the same: the marks of a band stand in one place but for their lines."""
    found = _full()
    found["rows"] = [row | {"op": f"op{i}"} for i in range(count) for row in found["rows"]]
    drawn = _drawn(monkeypatch, plots, lambda: plots.overview(found, tmp_path / "overview"))
    for axis in drawn.axes:
        marks = [axis.transData.transform(line.get_xydata()) for line in axis.lines
                 if line.get_marker() != "None"]  # fmt: skip
        places = np.concatenate(marks) * 72 / drawn.dpi
        assert len(places) == count * len(BASELINES)
        apart = np.linalg.norm(places[:, None] - places, axis=-1) + 1e9 * np.eye(len(places))
        assert apart.min() > plots.MARK


def test_a_line_under_ours_shows(monkeypatch: Any, tmp_path: Path):
    swept = [
        runs.row(impl, 1e-6 * t, sweep="T", sizes={"T": t}, shape=f"T{t}")
        for impl in ("cpu", "published") for t in (512, 1024, 2048, 4096)
    ]  # fmt: skip
    found = runs.run(sweeps=tuple(swept))
    draw = growth_plots.images(found, tmp_path)[0]
    drawn = _drawn(monkeypatch, growth_plots, draw)
    ours, beside = drawn.axes[0].lines
    assert np.array_equal(ours.get_ydata(), beside.get_ydata())
    assert ours.get_markersize() < beside.get_markersize() - 2 * beside.get_markeredgewidth()
    assert beside.get_markerfacecolor() == "none"
    assert ours.get_linewidth() < beside.get_linewidth()
    assert ours.get_zorder() > beside.get_zorder()
    legend = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
    assert legend == ["cpu: 1.00 ±0.00", "published: 1.00 ±0.00"]


def test_colours_are_okabe_and_itos():
    palette = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"}
    used = [figure.OURS_COLOUR, *figure.COLOURS.values()]
    assert set(used) <= palette
    assert len(set(used)) == len(used)
    assert set(figure.MARKERS) == set(figure.COLOURS)
    assert len(set(figure.MARKERS.values())) == len(figure.MARKERS)


def _contrast(colour: str, background: float) -> float:
    """Of WCAG 2: 1 for the same, 21 for black on white."""
    parts = [part / 255 for part in Color.parse(colour).get_truecolor()]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    shine = sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    darker, lighter = sorted((shine, background))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("name", ["GREEN", "RED", "ORANGE", "CYAN", "GREY"])
def test_a_colour_shows_on_white_and_on_black(name: str):
    for background in (0.0, 1.0):
        assert _contrast(getattr(terminal, name), background) >= 3.8
    assert _contrast("color(226)", 1.0) < 1.2, "yellow on white"


def test_numbers_have_no_colour_of_their_own(monkeypatch: Any):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console = terminal.console()
    with console.capture() as shown:
        console.print("a load of 2.1 on 2 cores")
    assert shown.get() == "a load of 2.1 on 2 cores\n"


def test_the_attention_that_was_taken_is_said():
    taken = [
        runs.row("cpu", 1e-3, op="rpc_attention"),
        *(
            runs.row(name, 1e-3, op="rpc_attention", sdpa="flash for CPUs", mode=mode)
            for name in ("library", "compiled_library")
            for mode in rows.MODES
        ),
    ]
    console = _console(120)
    report.show(runs.run(*taken), console)
    line = "attention of PyTorch in rpc_attention (library, compiled_library): flash for CPUs"
    assert line in _text(console)


# The end of a run


@contextlib.contextmanager
def _handlers():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def _swallow_once() -> None:
    with contextlib.suppress(limit.Ended):
        time.sleep(30)
    time.sleep(30)


def test_a_limit_ends_what_runs_even_if_it_is_swallowed_once():
    ends = limit.Limit(0.2)
    start = time.monotonic()
    with _handlers(), ends.installed():
        with pytest.raises(limit.Ended), ends.running():
            _swallow_once()
        assert ends.reason == "the limit of 0.2 s was reached"
        with pytest.raises(limit.Ended), ends.running():
            pytest.fail("nothing more is begun")
        time.sleep(0.01)  # and outside of it nothing is raised
    assert time.monotonic() - start < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def _command(monkeypatch: Any, info: Any, *arguments: str) -> None:
    torch._dynamo.reset()  # imports it, which an end must not cut
    fixed = ceilings.Ceilings(copy=1e10, matmul=1e11)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype: fixed)
    monkeypatch.setattr(main, "load_ops", lambda: {"scale": info})
    quick = dataclasses.replace(
        presets.PRESETS["quick"], mode_seconds=0.01, sweep_mode_seconds=0.01, compile_seconds=-1
    )
    monkeypatch.setitem(presets.PRESETS, "quick", quick)
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", *arguments])


def test_what_a_limit_leaves_is_listed(monkeypatch: Any, tmp_path: Path, capsys: Any):
    def slow(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16:
            os.kill(os.getpid(), signal.SIGALRM)  # as the clock does
            time.sleep(60)
        return 2 * x

    arguments = ("--limit", "600", "--out", str(tmp_path))
    _command(monkeypatch, runs.scale_op(published=slow), *arguments)
    start = time.monotonic()
    with _handlers():
        assert main.main() == 0
    assert time.monotonic() - start < 60
    text = capsys.readouterr().out
    assert "the limit of 600 s was reached" in text
    assert " rows skipped (" in text
    found = results.read(tmp_path / "rows.jsonl")
    assert {row["dtype"] for row in found["rows"] if "median_s" in row} == {"fp32"}
    listed = (tmp_path / "results.csv").read_text().splitlines()
    left = [line for line in listed if "the limit of 600 s was reached" in line]
    assert {line.split(",")[3] for line in left} == {"bf16", "fp32"}
    assert len(left) == sum(
        "was reached" in r.get("reason", "") for r in found["rows"] + found["sweeps"]
    )


def test_results_go_to_standard_output_alone(monkeypatch: Any, tmp_path: Path, capsys: Any):
    given = ("--filter", "none", "T64", "--dtype", "bf16", "--json", "--out", str(tmp_path))
    _command(monkeypatch, runs.scale_op(), *given)
    with _handlers():
        assert main.main() == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert {(row["shape"], row["dtype"]) for row in found["rows"]} == {("T64-D8", "bf16")}
    assert not found["sweeps"]
    assert list(found["ceilings"]) == ["bf16"]
    assert "T64-D8/bf16" in err
    assert found == json.loads((tmp_path / "results.json").read_text())
    _command(monkeypatch, runs.scale_op(), *given[:6], str(tmp_path / "r.json"), *given[6:])
    with _handlers():
        assert main.main() == 0
    assert "T64-D8/bf16" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--filter", "nothing"), "--filter nothing: expected a part of <op>/<shape>/<dtype>"),
        (("--limit", "0"), "expected a positive number of seconds, got 0"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
    ],
)
def test_a_bad_option_is_named(monkeypatch: Any, capsys: Any, arguments: Any, message: str):
    _command(monkeypatch, runs.scale_op(), *arguments)
    with contextlib.suppress(SystemExit):
        assert main.main() == 2
    out, err = capsys.readouterr()
    assert message in " ".join((out + err).split())
