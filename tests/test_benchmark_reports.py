"""What the benchmark suite makes of a run, on small made-up ones. Nothing is timed."""

# ruff: noqa: E402 - the suite needs packages that the tests of the ops do not

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

for needed in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(needed)

import benchmark_runs as runs

from benchmarks import (
    compare,
    expert_parallel,
    folders,
    markdown,
    plots,
    readme,
    report,
    results,
    rows,
    scaling,
    terminal,
)


def test_a_wrong_row_is_shown_as_wrong():
    gains = {"published": (2.0, 1.9, 2.1)}
    found = runs.run(
        runs.row("cpu", None), runs.row("triton", 1e-3, versus=gains), runs.row("published", 2e-3)
    )
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
    skipped = runs.row("liger", None, kind=rows.BASELINE, status="skipped", reason="it is missing")
    text = markdown.report(runs.run(*runs.pair(2.0), skipped), [])
    assert "- liger: skipped: it is missing" in text
    assert "vs liger" not in text


# Growth


def _swept(impl: str, power: float, overhead: float = 0.0) -> list[dict[str, Any]]:
    return [
        runs.row(impl, overhead + 1e-6 * t**power, sweep="T", sizes={"T": t, "D": 8},
                 shape=f"T{t}-D8", peak_bytes=100 * t)
        for t in (4096, 512, 1024, 2048)
    ]  # fmt: skip


def test_exponents_are_recovered():
    run = runs.run(sweeps=(*_swept("published", 2.0), *_swept("cpu", 1.0, overhead=1e-3)))
    ours, published = scaling.fits(run, "momentum_update", "T", "forward")
    assert (ours.impl, published.impl) == ("cpu", "published")
    assert published.time == pytest.approx((2.0, 0.0, 1.0), abs=1e-6)
    assert published.memory == pytest.approx((1.0, 0.0, 1.0), abs=1e-6)
    assert ours.time is not None
    assert ours.time.value < 1.0
    assert ours.time.error > 0.05, "an overhead is no power law"
    assert ours.time.r_squared < 0.99
    noisy = random.Random(1)
    points = [(x, x**1.5 * math.exp(noisy.gauss(0, 0.02))) for x in (1, 2, 4, 8, 16)]
    value, error, r_squared = scaling.exponent(points)
    assert value == pytest.approx(1.5, abs=0.05)
    assert 0 < error < 0.05
    assert 0.99 < r_squared < 1
    assert scaling.exponent([(x, 1.0) for x in (1, 2, 4, 8)]) == (0.0, 0.0, 1.0)
    text = markdown.report(run, [])
    assert (
        "| `momentum_update` | tokens | 512 | 4096 | 4 | forward | published | "
        "2.00 ±0.00 | 1.00 | 1.00 ±0.00 | 1.00 |" in text
    )


def test_no_exponent_through_fewer_than_four_sizes():
    three = [row for row in _swept("cpu", 1.0) if row["sizes"]["T"] != 512]
    run = runs.run(*runs.pair(2.0), sweeps=(*three, *_swept("published", 1.0)))
    ours, published = scaling.fits(run, "momentum_update", "T", "forward")
    assert (ours.time, ours.memory) == (None, None)
    assert published.time is not None
    text = markdown.report(run, [])
    assert "| 1024 | 4096 | 3 | forward | **cpu** | - | - | - | - |" in text
    console = terminal.console()
    with console.capture() as shown:
        report.show(run, console)
    assert "published 1.00 ±0.00" in shown.get()
    assert "No exponent for 1 lines: fewer than 4 sizes have a time." in shown.get()
    assert "cpu 1.00" not in shown.get()


def test_a_sweep_says_where_something_has_no_time():
    refused = runs.row(
        "published", None, sweep="T", sizes={"T": 8192}, status="skipped", reason="53 GB"
    )
    run = runs.run(sweeps=(*_swept("cpu", 1.0), refused))
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
    base = runs.run(*runs.pair(4.0))
    assert [c.status for c in compare.changes(base, runs.run(*runs.pair(3.8)))] == [compare.SAME]
    assert [c.status for c in compare.changes(base, runs.run(*runs.pair(2.0)))] == [compare.SLOWER]
    assert [c.status for c in compare.changes(base, runs.run(*runs.pair(8.0)))] == [compare.FASTER]
    loud = runs.run(*runs.pair(2.6, width=0.5))
    assert [c.status for c in compare.changes(runs.run(*runs.pair(4.0, width=0.5)), loud)] == [
        compare.UNDECIDED
    ]
    assert not compare.regressions(compare.changes(runs.run(*runs.pair(4.0, width=0.5)), loud))


def test_one_faster_baseline_is_no_regression():
    gains = {"published": (4.0, 3.9, 4.1), "library": (4.0, 3.9, 4.1), "compiled": (2.0, 1.9, 2.1)}
    old = runs.run(runs.against(gains))
    new = runs.run(runs.against(gains | {"compiled": (0.5, 0.49, 0.51)}))
    assert not compare.regressions(compare.changes(old, new))


def test_a_result_gone_wrong_is_a_regression():
    old, new = (
        runs.run(*runs.pair(4.0)),
        runs.run(runs.row("cpu", None), runs.row("published", 1e-3)),
    )
    assert [c.status for c in compare.regressions(compare.changes(old, new))] == [compare.BROKEN]


def test_compare_exits_with_1_on_a_regression(tmp_path: Path, monkeypatch: Any, capsys: Any):
    for gain, day in ((9.0, "01"), (4.0, "02")):
        run = runs.run(
            *runs.pair(gain), environment=runs.FACTS | {"date": f"2026-01-{day} 00:00 UTC"}
        )
        file = folders.store(run, tmp_path)
        assert json.loads(file.read_text()) == run
    monkeypatch.setattr(folders, "STORED", tmp_path)
    new = tmp_path / "new.json"
    for gain, code in ((4.0, 0), (2.0, 1)):
        new.write_text(json.dumps(runs.run(*runs.pair(gain))))
        monkeypatch.setattr("sys.argv", ["compare", str(new)])
        assert compare.main() == code
        assert f"compared with {file.name}" in capsys.readouterr().out
    new.write_text(
        json.dumps(runs.run(*runs.pair(4.0), environment=runs.FACTS | {"chip": "Other"}))
    )
    assert compare.main() == 2


# What is written


def test_the_report_is_whole_and_its_images_exist(tmp_path: Path):
    run = runs.run(*runs.pair(4.0), *runs.pair(2.0, mode="step"), sweeps=tuple(_swept("cpu", 1.0)))
    folder = report.write(run, tmp_path / "out")
    text = (folder / "report.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert {"overview.png", "ceilings.png", "time-tokens.png", "memory.png"} < set(linked)
    for name in linked:
        assert (folder / name).stat().st_size > 1000
        assert (folder / name).with_suffix(".svg").read_text().rstrip().endswith("</svg>")
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


def test_the_readme_is_generated(tmp_path: Path):
    """`python -m benchmarks.readme` leaves everything as it is, the overview included."""
    stored = readme.latest()
    pages = {readme.README: readme.picture(stored), readme.DOCS: readme.section(stored)}
    for page, part in pages.items():
        text = page.read_text()
        assert readme.replaced(text, part) == text, "run python -m benchmarks.readme"
        links = re.findall(r"\(([./]*benchmarks/results/[^)#]*)\)", part)
        assert links
        for link in links:
            assert (page.parent / link).exists(), link
    for path, found in stored:
        assert (path.parent / "README.md").read_text() == readme.page(path, found)
        _tables_are_even(readme.page(path, found))
        kept, drawn = path.parent / readme.OVERVIEW, tmp_path / readme.OVERVIEW
        plots.overview(found, drawn)
        if _drawn_by(kept) == _drawn_by(drawn):
            assert kept.read_bytes() == drawn.read_bytes(), "run python -m benchmarks.readme"


def _drawn_by(image: Path) -> str:
    """The version of Matplotlib, which an image names; another one may place a mark elsewhere."""
    return re.search(r"Matplotlib v[0-9.]+", image.read_text())[0]


def test_the_readme_shows_the_latest_run_of_each_machine(tmp_path: Path):
    for chip, day, gain in (("A", "01", 2.75), ("A", "02", 3.0), ("GPU", "01", 5.0)):
        device = "cuda" if chip == "GPU" else "cpu"
        facts = runs.FACTS | {"chip": chip, "date": f"2026-01-{day} 00:00 UTC", "device": device}
        folders.store(runs.run(*runs.pair(gain), environment=facts), tmp_path)
    stored = readme.latest(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path, _ in stored] == [
        "gpu/ops-2026-01-01-0123456789.json",
        "a-2-cores/ops-2026-01-02-0123456789.json",
    ]
    part = readme.section(stored, tmp_path)
    assert "5.00x / 5.00x" in part
    assert "3.00x / 3.00x" in part
    assert "2.75x" not in part
    short = readme.picture(stored, tmp_path)
    assert "GPU, `--preset" in short
    assert "docs/benchmarks.md#a-2-cores" in short
    whole = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert (
        readme.replaced(whole, part) == f"before\n{readme.BEGIN}\n\n{part}\n{readme.END}\nafter\n"
    )


def _tables_are_even(text: str) -> None:
    """Every line of a table has as many cells as its head."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1, table


def test_a_run_is_completed_by_an_earlier_one_of_its_day():
    def run(day: str, commit: str, *statuses: str) -> dict:
        place = {"op": "o", "dtype": "fp32", "mode": "forward", "sweep": ""}
        rows = [{**place, "shape": n, "status": s} for n, s in zip("ab", statuses, strict=True)]
        environment = {"date": day, "commit": commit}
        found = {"environment": environment, "preset": "gpu", "rows": rows, "sweeps": []}
        return {**found, "ceilings": {"fp32": commit, commit: commit}}

    latest = run("2026-01-02 09:00", "new", "ok", "skipped")
    found = results.completed(latest, run("2026-01-02 08:00", "old", "wrong", "ok"))
    assert [(r["shape"], r["status"]) for r in found["rows"]] == [("a", "ok"), ("b", "ok")]
    assert found["environment"]["commit"] == "old and new"
    assert found["ceilings"] == {"fp32": "new", "new": "new", "old": "old"}
    assert results.completed(latest, run("2026-01-01 08:00", "old", "ok", "ok")) is latest


def test_graphs_have_a_table_of_their_own():
    """The fastest of ours there is not that of plain calls; a row without a graph is left out."""
    ours = (runs.row("triton", 4.0, graph_s=1.0), runs.row("cuda", 2.0, graph_s=2.0))
    others = (runs.row("published", 8.0, graph_s=6.0), runs.row("library", 2.0))
    found = runs.run(*ours, *others)
    assert results.graph_gains(found["rows"]) == {"published": 6.0}
    table = "\n".join(markdown.brief(found, graphs=True))
    assert "6.00x / 6.00x" in table
    assert "| `momentum_update` | -" not in "\n".join(
        markdown.brief(runs.run(*others), graphs=True)
    )
