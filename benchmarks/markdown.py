"""The report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import expert_parallel, goals, noise, results, scaling
from benchmarks.formats import cells, count, gain, image, rate, ratio, seconds, share, size
from benchmarks.results import Results, Row
from benchmarks.rows import BASELINE, MODES, OURS

# Columns that are there where the device and the pass have them.
EXTRA: dict[str, tuple[str, Callable[[Any], str]]] = {
    "graph": ("graph_s", seconds),
    "launches": ("launches", count),
    "waits": ("waits", count),
    "peak memory": ("peak_bytes", size),
    "kept for backward": ("saved_bytes", size),
    "PyTorch's attention": ("sdpa", str),
}
RATES = ("GB/s", "GFLOP/s", "share of ceiling")
TITLES = {"forward": "forward", "step": "step (forward and backward)"}


def report(found: Results, plots: list[str]) -> str:
    """The whole file; `plots` are the names of the images beside it."""
    lines = [
        "# Benchmarks",
        "",
        *_warnings(found),
        *_environment(found),
        "## Speed-up of the fastest implementation, geometric mean over shapes",
        "",
        *summary(found),
        *image("Speed-up against each baseline", "overview", plots),
        *_goals(found),
        *image("Share of the machine's ceilings", "ceilings", plots),
        *(line for op in results.ops(found) for line in _op(found, op, plots)),
        *_scaling(found, plots),
        *_expert_parallel(found),
    ]
    return "\n".join(lines) + "\n"


def _warnings(found: Results) -> Iterator[str]:
    """What a reader has to know first."""
    for line in (noise.banner(found), results.skips(found)):
        if line:
            yield f"> {line}"
            yield ""


def _goals(found: Results) -> Iterator[str]:
    """What the kernels are written to reach, where this run has a figure."""
    verdicts = goals.verdicts(found)
    if not verdicts:
        return
    yield "## Goals"
    yield ""
    yield "Undecided: the interval holds the goal."
    yield ""
    yield cells(["op", "shape", "pass", "against", "goal", "reached", "verdict"])
    yield f"|{'---|' * 7}"
    for goal, shape, mode, reached, outcome in verdicts:
        against, factor = f"`{goal.baseline}`", ratio(goal.factor)
        yield cells([f"`{goal.op}`", shape, mode, against, factor, gain(reached), outcome])
    yield ""


def _environment(found: Results) -> Iterator[str]:
    facts = found["environment"]
    yield "| | |"
    yield "|---|---|"
    for name, value in facts.items():
        yield f"| {name.replace('_', ' ')} | {value} |"
    yield f"| preset | {found['preset']} |"
    for dtype, ceiling in found["ceilings"].items():
        yield f"| copy ceiling, beside {dtype} | {rate(ceiling['copy'] * 1e-9)} GB/s |"
        own = ceiling.get("matmuls", {}).get(dtype, ceiling["matmul"])
        by = f", of fp32; in {dtype} {rate(own * 1e-9)}" if own < ceiling["matmul"] else ""
        yield f"| matmul ceiling, {dtype} | {rate(ceiling['matmul'] * 1e-9)} GFLOP/s{by} |"
    yield ""
    yield (
        "Read the ratios: all rows of one shape were measured in turn, round after round, in one "
        "process. The absolute times are this machine's. A speed-up is the median of the "
        "baseline's times divided by ours, pair by pair; after it stands half of the interval that "
        "holds this median nine times in ten. Every result was checked against fp64 within the "
        "tests' error budget before it was timed; a wrong one is shown as wrong and has no time. "
        "In italics: a proxy, which does as much work in a vendor's kernel, for something else. "
        "The share of the ceiling can exceed 100% where the data sits in a cache, and says so."
    )
    yield ""


def summary(found: Results) -> Iterator[str]:
    """Geometric means of the speed-ups, a line for each op, pass and dtype."""
    names = results.baselines(found["rows"])
    if not results.ops(found):
        yield "No op was measured."
        yield ""
        return
    yield cells(["op", "pass", "dtype", "ours", "shapes", *(f"vs `{name}`" for name in names)])
    yield f"|---|---|---|---|---|{'---|' * len(names)}"
    for op in results.ops(found):
        for mode in MODES:
            for dtype in found["ceilings"]:
                chosen, count = _fastest(found, op, mode, dtype)
                if count:
                    means = [ratio(_mean(_gains(chosen, name))) for name in names]
                    ours = ", ".join(dict.fromkeys(row["impl"] for row in chosen)) or "-"
                    shapes = f"{len(chosen)} of {count}"
                    yield cells([f"`{op}`", mode, dtype, ours, shapes, *means])
    yield ""


def brief(found: Results, *, graphs: bool = False) -> Iterator[str]:
    """An op a line: against `published` and against the fastest baseline of each shape.

    graphs: of the kernels' own times, as CUDA graphs, and of the ops that have one.
    """
    places = [(dtype, mode) for dtype in found["ceilings"] for mode in MODES]
    gains_of = results.graph_gains if graphs else results.gains
    yield cells(["op", *(f"{dtype}, {mode}" for dtype, mode in places)])
    yield f"|---|{'---|' * len(places)}"
    for op in results.ops(found):
        shown = []
        for dtype, mode in places:
            groups = [
                results.members(found, op, mode, shape)
                for shape in results.shapes(found, op, mode)
                if shape.endswith(f"/{dtype}")
            ]
            against = [gains for group in groups if (gains := gains_of(group))]
            published = [gains["published"] for gains in against if "published" in gains]
            fastest = ratio(_mean([min(gains.values()) for gains in against]))
            shown.append(f"{ratio(_mean(published))} / {fastest}" if against else "-")
        if set(shown) != {"-"} or not graphs:
            yield cells([f"`{op}`", *shown])
    yield ""


def _fastest(found: Results, op: str, mode: str, dtype: str) -> tuple[list[Row], int]:
    """The fastest of our implementations at each shape that has a time; the number of shapes."""
    shapes = [s for s in results.shapes(found, op, mode) if s.endswith(f"/{dtype}")]
    groups = [results.members(found, op, mode, shape) for shape in shapes]
    return [ours for group in groups if (ours := results.best(group))], len(groups)


def _gains(chosen: list[Row], name: str) -> list[float]:
    return [g.median for ours in chosen if (g := results.speedup(ours, name))]


def _mean(gains: list[float]) -> float | None:
    """The geometric mean."""
    return math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None


def _op(found: Results, op: str, plots: list[str]) -> Iterator[str]:
    yield f"## {op}"
    yield ""
    for mode in MODES:
        shapes = results.shapes(found, op, mode)
        if not shapes:
            continue
        rows = [r for shape in shapes for r in results.members(found, op, mode, shape)]
        names = results.baselines(rows)
        extra = [name for name, (key, _) in EXTRA.items() if any(key in r for r in rows)]
        against = [f"vs {name}" for name in names]
        yield f"### {op}, {TITLES[mode]}"
        yield ""
        yield cells(["shape", "implementation", "time", *extra, *against, *RATES])
        yield f"|{'---|' * (6 + len(extra) + len(names))}"
        for shape in shapes:
            group = results.members(found, op, mode, shape)
            shown = [row for row in group if "median_s" in row or row["kind"] != BASELINE]
            for index, row in enumerate(shown):
                yield cells([shape if index == 0 else "", *_row(row, names, extra)])
        yield ""
        yield from _notes(rows)
    yield from image(f"Speed-up of {op}", f"speedup-{op}", plots)


def _row(row: Row, names: list[str], extra: list[str]) -> list[str]:
    label = f"**{row['impl']}**" if row["kind"] == OURS else row["impl"]
    if row["kind"] not in (OURS, BASELINE):
        label = f"*{label}*"
    if "median_s" not in row:
        return [label, row["status"], *["-"] * (len(extra) + len(names) + 3)]
    shown = [show(row[key]) if key in row else "-" for key, show in map(EXTRA.__getitem__, extra)]
    gains = [gain(results.speedup(row, name)) for name in names]
    if row["kind"] not in (OURS, BASELINE):
        return [label, seconds(row["median_s"]), *shown, *gains, "-", "-", "-"]
    rates = [rate(row["gb_per_s"]), rate(row["gflop_per_s"])]
    part = f"{share(row['share'], row['ceiling'])} of {row['ceiling']}"
    return [label, seconds(row["median_s"]), *shown, *gains, *rates, part]


def _notes(rows: list[Row]) -> Iterator[str]:
    """Why rows have no time, and what they were checked against; each reason once."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        notes = []
        if row["status"] != "ok":
            notes.append(f"{row['status']}: {row['reason']}")
        elif "checked" in row:
            notes.append(row["checked"])
        notes += [row["graph"]] if "graph" in row else []
        for note in notes:
            reasons.setdefault(note, {}).setdefault(row["impl"], []).append(row["shape"])
    everywhere = len({row["shape"] for row in rows})
    for reason, places in reasons.items():
        shown = [
            impl if len(shapes) == everywhere else f"{impl} at {', '.join(shapes)}"
            for impl, shapes in places.items()
        ]
        yield f"- {'; '.join(shown)}: {reason}"
    if reasons:
        yield ""


def _scaling(found: Results, plots: list[str]) -> Iterator[str]:
    if not found["sweeps"]:
        return
    yield "## Growth"
    yield ""
    yield (
        "One size grows and the others stay. The exponent b of time ~ size^b is fitted to all "
        f"sizes by least squares on logarithms, where there are at least {scaling.FEWEST}. After "
        "it stands its standard error; R² is the part of the variance that the line explains, "
        "which is small by itself where b is near 0. 1 is linear, 0 is constant."
    )
    yield ""
    yield from scaling_table(found)
    for op, letter in scaling.sweeps(found):
        for mode in MODES:
            for line in scaling.refused(found, op, letter, mode):
                yield f"- {op}, {mode}, {line}"
    yield ""
    for name, title in (
        ("time-tokens", "Time over tokens"),
        ("time-experts", "Time over experts"),
        ("time-others", "Time over other sizes"),
        ("memory", "Memory over size"),
    ):
        yield from image(title, name, plots)


def scaling_table(found: Results) -> Iterator[str]:
    """The fitted exponents, a line per sweep and pass."""
    names = ["op", "size", "from", "to", "sizes", "pass", "implementation"]
    yield cells([*names, "time", "R²", "memory", "R²"])
    yield f"|{'---|' * 11}"
    for op, letter in scaling.sweeps(found):
        for mode in MODES:
            for fit in scaling.fits(found, op, letter, mode):
                sizes = [str(fit.size(fit.points[end])) for end in (0, -1)]
                name = f"**{fit.impl}**" if fit.kind == OURS else fit.impl
                shown = [text for b in (fit.time, fit.memory) for text in _exponent(b)]
                what, points = scaling.NAMES.get(letter, letter), str(len(fit.points))
                yield cells([f"`{op}`", what, *sizes, points, mode, name, *shown])
    yield ""


def _exponent(b: scaling.Exponent | None) -> tuple[str, str]:
    return ("-", "-") if b is None else (str(b), f"{b.r_squared:.2f}")


def _expert_parallel(found: Results) -> Iterator[str]:
    layers, links = list(expert_parallel.layers(found)), expert_parallel.links(found)
    if not layers or not links:
        return
    yield "## Past one card, on paper"
    yield ""
    yield (
        "Expert parallelism: P cards with E/P experts each; every token goes to the cards of its "
        "experts and comes back. Computed from this run's rate of our expert MLP, forward, and "
        "from nominal link rates; nothing of it was measured on several cards. A token sends "
        "2 x copies x D x bytes; it computes 6 K D I FLOPs (4 K D I without a gate). `alone`: "
        "every choice travels by itself, copies = K (P - 1) / P. `merged`: once per card, copies = "
        "(P - 1)(1 - (1 - 1/P)^K). The backward pass sends as much and computes twice as much. No "
        "overlap of the two, uniform routing."
    )
    yield ""
    for layer in layers:
        yield f"`moe_mlp` {layer.name}, {rate(layer.rate * 1e-9)} GFLOP/s measured:"
        yield ""
        columns = [f"{name}: link / compute" for name in links]
        yield cells(["cards", "rows", "bytes a token", *columns, "width to break even"])
        yield f"|{'---|' * (4 + len(links))}"
        for cards in expert_parallel.CARDS:
            for merged in (False, True):
                sent = layer.sent(cards, merged=merged)
                shares = [ratio(layer.dominated(cards, r, merged=merged)) for r in links.values()]
                even = [layer.break_even(cards, r, merged=merged) for r in links.values()]
                widths = " / ".join(f"{math.ceil(width)}" for width in even)
                how = "merged" if merged else "alone"
                yield cells([str(cards), how, size(sent), *shares, widths])
        yield ""
        yield from (f"- {line}" for line in layer.verdict(links))
        yield ""
