"""The report's images of the ops: speed-ups, shares of the ceilings, what grows with size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import growth_plots, results
from benchmarks.figure import (
    BLUE,
    COLOURS,
    MARKERS,
    ORANGE,
    OTHER,
    OURS_COLOUR,
    times_axis,
    write,
)
from benchmarks.formats import ratio, share
from benchmarks.results import Results
from benchmarks.rows import BASELINE, MODES
from benchmarks.spread import Ratio

Gains = dict[str, Ratio]
Means = dict[str, float]

LINE = 0.12  # inches between the marks of a band
MARK = 6.0  # points, less than a line
CEILINGS = {"copy": BLUE, "matmul": ORANGE}
MANY = 6  # shapes, from which on bars would be too many


def draw(found: Results, folder: Path, until: float = math.inf) -> list[str]:
    """Writes every image there is data for, as PNG and SVG; the names of the PNGs.

    By `time.monotonic()`, none is begun after `until`.
    """
    images: list[Callable[[], str]] = [
        partial(overview, found, folder / "overview"),
        partial(_ceilings, found, folder / "ceilings"),
        *growth_plots.images(found, folder),
        *(partial(_speedups, found, op, folder) for op in results.ops(found)),
    ]
    return [name for image in images if time.monotonic() < until and (name := image())]


def _gains(found: Results, op: str, mode: str) -> list[tuple[str, Gains]]:
    """The speed-ups of the fastest of ours, by shape."""
    shown = []
    for shape in results.shapes(found, op, mode):
        group = results.members(found, op, mode, shape)
        if ours := results.best(group):
            names = [r["impl"] for r in group if r["kind"] == BASELINE]
            gains = {name: gain for name in names if (gain := results.speedup(ours, name))}
            if gains:
                shown.append((f"{shape}\n({ours['impl']})", gains))
    return shown


def overview(found: Results, path: Path) -> str:
    """A line per op, a mark per baseline: the geometric mean over shapes, forward and step."""
    lines = {
        mode: {op: _mean(gains) for op in results.ops(found) if (gains := _gains(found, op, mode))}
        for mode in MODES
    }
    return _marks(found, lines, "Speed-up against each baseline", path)


def _marks(found: Results, lines: dict[str, dict[str, Means]], title: str, path: Path) -> str:
    """A panel per mode; a band per name with a line of its own for each baseline's mark."""
    lines = {mode: of_mode for mode, of_mode in lines.items() if of_mode}
    if not lines:
        return ""
    names = list(dict.fromkeys(name for of_mode in lines.values() for name in of_mode))
    every = [means for of_mode in lines.values() for means in of_mode.values()]
    baselines = [b for b in results.baselines(found["rows"]) if any(b in m for m in every)]
    # Inches: a band's lines are so far apart that no mark covers the next.
    height = 1.6 + (LINE * len(baselines) + LINE) * len(names)
    figure, axes = plt.subplots(
        1, len(lines), figsize=(4.5 + 3 * len(lines), height), squeeze=False, sharey=True
    )
    step = 1 / (len(baselines) + 1)
    for axis, (mode, of_mode) in zip(axes[0], lines.items(), strict=True):
        for index, baseline in enumerate(baselines):
            shift = (index - (len(baselines) - 1) / 2) * step
            points = [
                (means[baseline], names.index(name) + shift)
                for name, means in of_mode.items()
                if baseline in means
            ]
            axis.plot(
                [x for x, _ in points], [y for _, y in points], MARKERS.get(baseline, "o"),
                color=COLOURS.get(baseline, OTHER), markersize=MARK, label=f"vs {baseline}",
            )  # fmt: skip
        times_axis(axis, [value for means in of_mode.values() for value in means.values()])
        for edge in range(len(names) - 1):
            axis.axhline(edge + 0.5, color="#dddddd", linewidth=0.8, zorder=0)
        axis.set_title("forward" if mode == MODES[0] else "forward and backward")
        axis.set_xlabel("times faster (right of 1x: ours)")
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    handles, texts = _entries(axes[0])
    figure.suptitle(title, fontweight="bold")
    figure.legend(handles, texts, ncols=len(texts), loc="lower center", frameon=False)
    return write(figure, path, bottom=0.3 / height)


def _entries(axes: Iterable[Axes]) -> tuple[list[Any], list[str]]:
    """Each entry of the panels' legends once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(text, handle)
    return list(found.values()), list(found)


def _mean(gains: list[tuple[str, Gains]]) -> Means:
    names = dict.fromkeys(name for _, of_shape in gains for name in of_shape)
    found = {}
    for name in names:
        logs = [math.log(of_shape[name].median) for _, of_shape in gains if name in of_shape]
        found[name] = math.exp(sum(logs) / len(logs))
    return found


def _ceilings(found: Results, path: Path) -> str:
    """A bar per op: which part of the shortest possible time its first shape's forward pass is."""
    bars = []
    for op in results.ops(found):
        for shape in results.shapes(found, op, MODES[0])[:1]:
            row = results.best(results.members(found, op, MODES[0], shape))
            if row and row["bytes"]:
                bars.append((row["share"], op, row["ceiling"]))
    if not bars:
        return ""
    bars.sort()
    figure, axis = plt.subplots(figsize=(8.5, 1.8 + 0.27 * len(bars)))
    for ceiling, colour in CEILINGS.items():
        chosen = [(place, part) for place, (part, _, by) in enumerate(bars) if by == ceiling]
        if chosen:
            places, parts = zip(*chosen, strict=True)
            label = f"bound by {ceiling}"
            axis.barh(places, [100 * part for part in parts], 0.7, color=colour, label=label)
    for place, (part, _, ceiling) in enumerate(bars):
        axis.annotate(
            share(part, ceiling), (100 * part, place), (3, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axis.axvline(100, color=OURS_COLOUR, linewidth=1)
    axis.set_xlim(0, 1.25 * 100 * max(1.0, bars[-1][0]))
    axis.set_yticks(range(len(bars)), [op for _, op, _ in bars])
    axis.set_xlabel("% of the copy's or the matmul's rate in this run, forward, first shape")
    axis.set_title("How close each op is to the machine's ceilings", fontweight="bold")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, loc="lower right")
    return write(figure, path)


def _speedups(found: Results, op: str, folder: Path) -> str:
    """One panel per mode; a group of bars per shape, a bar per baseline, on a logarithmic axis."""
    panels = [(mode, bars) for mode in MODES if (bars := _gains(found, op, mode))]
    if not panels:
        return ""
    title, path = f"{op}: speed-up against each baseline", folder / f"speedup-{op}"
    if max(len(bars) for _, bars in panels) > MANY:
        lines = {
            mode: {label.split("\n")[0]: _mean([(label, gains)]) for label, gains in bars}
            for mode, bars in panels
        }
        return _marks(found, lines, title, path)
    known = results.baselines(found["rows"])
    labels = [n for n in known if any(n in g for _, b in panels for _, g in b)]
    tallest = max(len(bars) for _, bars in panels)
    height = 1.5 + tallest * max(0.27 * len(labels) + 0.15, 0.6)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 5.5 * len(panels), height), squeeze=False
    )
    for axis, (mode, bars) in zip(axes[0], panels, strict=True):
        _bars(axis, bars, labels)
        axis.set_title(mode)
    handles, texts = _entries(axes[0])
    figure.suptitle(title, fontweight="bold")
    figure.legend(
        handles, [f"vs {t}" for t in texts], ncols=len(labels), loc="lower center", frameon=False
    )
    return write(figure, path, bottom=0.35 / height)


def _bars(axis: Axes, bars: list[tuple[str, Gains]], labels: list[str]) -> None:
    width = 0.8 / len(labels)
    for index, name in enumerate(labels):
        offset = (index - (len(labels) - 1) / 2) * width
        placed = [(p + offset, g[name]) for p, (_, g) in enumerate(bars) if name in g]
        places, gains = zip(*placed, strict=True) if placed else ((), ())
        # A logarithmic bar has no zero: it starts at 1, no difference.
        lengths = [g.median - 1 for g in gains]
        errors: Any = [[g.median - g.low for g in gains], [g.high - g.median for g in gains]]
        axis.barh(
            places, lengths, 0.9 * width, left=1.0, color=COLOURS.get(name, OTHER), label=name,
            xerr=errors, error_kw={"elinewidth": 0.8, "ecolor": "#555555"},
        )  # fmt: skip
        for place, gain in placed:
            faster = gain.median >= 1
            axis.annotate(
                ratio(gain.median), (gain.high if faster else gain.low, place),
                (3 if faster else -3, 0), textcoords="offset points",
                ha="left" if faster else "right", va="center", fontsize=8,
            )  # fmt: skip
    times_axis(axis, [v for _, gains in bars for g in gains.values() for v in (g.low, g.high)])
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("times faster (right of 1x: ours is faster)")
