"""The report's images of the ops: speed-ups, a roofline, and what grows with size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import growth_plots, results
from benchmarks.figure import (
    COLOURS,
    MANY_COLOURS,
    MANY_MARKERS,
    MARKERS,
    OTHER,
    OURS_COLOUR,
    times_axis,
    write,
)
from benchmarks.formats import percent, ratio
from benchmarks.results import Results
from benchmarks.rows import BASELINE, MODES
from benchmarks.spread import Ratio

Gains = dict[str, Ratio]
Means = dict[str, float]

MANY = 6  # shapes, from which on bars would be too many


def draw(found: Results, folder: Path) -> list[str]:
    """Writes every image there is data for; their names."""
    names = [
        overview(found, folder / "overview.png"),
        _roofline(found, folder / "roofline.png"),
        *growth_plots.draw(found, folder, "png"),
        *(_speedups(found, op, folder) for op in results.ops(found)),
    ]
    return [name for name in names if name]


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
    """A panel per mode; a line per name, a mark per baseline."""
    lines = {mode: of_mode for mode, of_mode in lines.items() if of_mode}
    if not lines:
        return ""
    names = list(dict.fromkeys(name for of_mode in lines.values() for name in of_mode))
    height = 1.6 + 0.3 * len(names)
    figure, axes = plt.subplots(
        1, len(lines), figsize=(4.5 + 3 * len(lines), height), squeeze=False, sharey=True
    )
    for axis, (mode, of_mode) in zip(axes[0], lines.items(), strict=True):
        for baseline in results.baselines(found["rows"]):
            points = [(m[baseline], names.index(n)) for n, m in of_mode.items() if baseline in m]
            axis.plot(
                [x for x, _ in points], [y for _, y in points], MARKERS.get(baseline, "o"),
                color=COLOURS.get(baseline, OTHER), markersize=7, label=f"vs {baseline}",
                markeredgecolor="white",
            )  # fmt: skip
        times_axis(axis, [value for means in of_mode.values() for value in means.values()])
        axis.hlines(range(len(names)), *axis.get_xlim(), color="#dddddd", linewidth=0.8, zorder=0)
        axis.set_title("forward" if mode == MODES[0] else "forward and backward")
        axis.set_xlabel("times faster (right of 1x: ours)")
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.4, -0.6)
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.suptitle(title, fontweight="bold")
    figure.legend(handles, texts, ncols=len(texts), loc="lower center", frameon=False)
    return write(figure, path, bottom=0.3 / height)


def _mean(gains: list[tuple[str, Gains]]) -> Means:
    names = dict.fromkeys(name for _, of_shape in gains for name in of_shape)
    found = {}
    for name in names:
        logs = [math.log(of_shape[name].median) for _, of_shape in gains if name in of_shape]
        found[name] = math.exp(sum(logs) / len(logs))
    return found


def _roofline(found: Results, path: Path) -> str:
    """Each op's first shape under the two ceilings measured in the same run."""
    dtype, ceiling = next(iter(found["ceilings"].items()), ("", {}))
    points = []
    for op in results.ops(found):
        for shape in results.shapes(found, op, MODES[0])[:1]:
            row = results.best(results.members(found, op, MODES[0], shape))
            if row and row["flops"] and row["dtype"] == dtype:
                label = f"{op}: {percent(row['share'])} of {row['ceiling']}"
                points.append((row["flops"] / row["bytes"], row["gflop_per_s"] * 1e9, label))
    if not points:
        return ""
    figure, axis = plt.subplots(figsize=(9.5, 5))
    knee = ceiling["matmul"] / ceiling["copy"]
    left, right = min(0.5 * min(p[0] for p in points), 0.1), 3 * max(*(p[0] for p in points), knee)
    heights = [left * ceiling["copy"], *[ceiling["matmul"]] * 2]
    axis.plot([left, knee, right], heights, color=OURS_COLOUR, linewidth=1.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    place = math.sqrt(left * knee)
    axis.annotate("copy", (place, place * ceiling["copy"]), (-8, 4),
                  textcoords="offset points", ha="right")  # fmt: skip
    axis.annotate(f"matmul, {dtype}", (right, ceiling["matmul"]), (0, 4),
                  textcoords="offset points", ha="right")  # fmt: skip
    for number, (x, y, label) in enumerate(points):
        colour = MANY_COLOURS[number % len(MANY_COLOURS)]
        marker = MANY_MARKERS[number // len(MANY_COLOURS) % len(MANY_MARKERS)]
        axis.plot([x], [y], marker, color=colour, markersize=8, label=label, linestyle="none",
                  markeredgecolor="white")  # fmt: skip
    axis.set_xlabel("FLOPs for each byte that has to cross memory")
    axis.set_ylabel("FLOP/s, forward, the first shape of each op")
    axis.set_title("How close each op is to the machine's ceilings", fontweight="bold")
    axis.grid(alpha=0.3, which="major")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return write(figure, path)


def _speedups(found: Results, op: str, folder: Path) -> str:
    """One panel per mode; a group of bars per shape, a bar per baseline, on a logarithmic axis."""
    panels = [(mode, bars) for mode in MODES if (bars := _gains(found, op, mode))]
    if not panels:
        return ""
    title, path = f"{op}: speed-up against each baseline", folder / f"speedup-{op}.png"
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
    handles, texts = axes[0][0].get_legend_handles_labels()
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
