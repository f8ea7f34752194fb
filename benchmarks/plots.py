"""The report's images of the ops: speed-ups, a roofline, and what grows with size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import growth_plots, results, training_plots
from benchmarks.figure import COLOURS, MARKERS, OTHER, OURS_COLOUR, times_axis, write
from benchmarks.formats import ratio
from benchmarks.results import Results
from benchmarks.rows import BASELINE, MODES
from benchmarks.spread import Ratio

Gains = dict[str, Ratio]


def draw(found: Results, folder: Path) -> list[str]:
    """Writes every image there is data for; their names."""
    names = draw_whole(found, folder, "png")
    return names + [n for op in results.ops(found) if (n := _speedups(found, op, folder))]


def draw_whole(found: Results, folder: Path, suffix: str) -> list[str]:
    """The images of the whole run, and not of single ops."""
    names = [
        _overview(found, folder / f"overview.{suffix}"),
        _roofline(found, folder / f"roofline.{suffix}"),
        *growth_plots.draw(found, folder, suffix),
    ]
    if found["text"]:
        names.append(training_plots.curves(found["text"], folder / f"text-curves.{suffix}"))
        names.append(training_plots.steps(found["text"], folder / f"text-steps.{suffix}"))
    if found["images"]:
        names.append(training_plots.accuracies(found["images"], folder / f"images.{suffix}"))
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
                shown.append((f"{shape.split('/')[0]}\n({ours['impl']})", gains))
    return shown


def _overview(found: Results, path: Path) -> str:
    """A line per op, a mark per baseline: the geometric mean over shapes, forward and step."""
    panels = {
        mode: [
            (op, _mean(gains)) for op in results.ops(found) if (gains := _gains(found, op, mode))
        ]
        for mode in MODES
    }
    panels = {mode: lines for mode, lines in panels.items() if lines}
    if not panels:
        return ""
    ops = [op for op in results.ops(found) if any(op == o for p in panels.values() for o, _ in p)]
    height = 1.6 + 0.3 * len(ops)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 + 3 * len(panels), height), squeeze=False, sharey=True
    )
    labels = results.baselines(found["rows"])
    for axis, (mode, lines) in zip(axes[0], panels.items(), strict=True):
        for name in labels:
            pairs = [(means[name], ops.index(op)) for op, means in lines if name in means]
            colour, marker = COLOURS.get(name, OTHER), MARKERS.get(name, "o")
            axis.plot(*zip(*pairs, strict=True) if pairs else ((), ()), marker, color=colour,
                      markersize=7, label=f"vs {name}", markeredgecolor="white")  # fmt: skip
        times_axis(axis, [v for _, means in lines for v in means.values()])
        for place in range(len(ops)):
            axis.axhline(place, color="#dddddd", linewidth=0.8, zorder=0)
        axis.set_title("forward" if mode == MODES[0] else "forward and backward")
        axis.set_xlabel("times faster (right of 1x: ours)")
    axes[0][0].set_yticks(range(len(ops)), ops)
    axes[0][0].invert_yaxis()
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.suptitle("Speed-up against each baseline", fontweight="bold")
    figure.legend(handles, texts, ncols=len(texts), loc="lower center", frameon=False)
    return write(figure, path, bottom=0.3 / height)


def _mean(gains: list[tuple[str, Gains]]) -> dict[str, float]:
    names = dict.fromkeys(name for _, of_shape in gains for name in of_shape)
    found = {}
    for name in names:
        logs = [math.log(of_shape[name].median) for _, of_shape in gains if name in of_shape]
        found[name] = math.exp(sum(logs) / len(logs))
    return found


def _roofline(found: Results, path: Path) -> str:
    """Each op's largest shape under the two ceilings measured in the same run."""
    dtype, ceiling = next(iter(found["ceilings"].items()), ("", {}))
    points = []
    for op in results.ops(found):
        for shape in results.shapes(found, op, MODES[0])[:1]:
            row = results.best(results.members(found, op, MODES[0], shape))
            if row and row["flops"] and row["dtype"] == dtype:
                points.append((row["flops"] / row["bytes"], row["gflop_per_s"] * 1e9, op))
    if not points:
        return ""
    figure, axis = plt.subplots(figsize=(8, 5))
    knee = ceiling["matmul"] / ceiling["copy"]
    left, right = min(0.5 * min(p[0] for p in points), 0.1), 4 * max(*(p[0] for p in points), knee)
    axis.plot([left, knee, right], [left * ceiling["copy"], *[ceiling["matmul"]] * 2],
              color=OURS_COLOUR, linewidth=1.5)  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.text(left * 1.2, left * 1.6 * ceiling["copy"], "copy", rotation=38, va="bottom")
    axis.text(right, ceiling["matmul"] * 1.1, f"matmul, {dtype}", ha="right", va="bottom")
    axis.plot([p[0] for p in points], [p[1] for p in points], "o", color="#4477aa")
    taken: list[tuple[float, float]] = []
    for x, y, op in sorted(points, key=lambda p: (p[0], p[1])):
        axis.annotate(op, (x, y), _free_place(taken, math.log10(x), math.log10(y)), fontsize=8,
                      textcoords="offset points", va="center")  # fmt: skip
    axis.set_xlabel("FLOPs for each byte that has to cross memory")
    axis.set_ylabel("FLOP/s, forward")
    axis.set_title("How close each op is to the machine's ceilings", fontweight="bold")
    axis.grid(alpha=0.3, which="major")
    return write(figure, path)


def _free_place(taken: list[tuple[float, float]], x: float, y: float) -> tuple[int, int]:
    """An offset in points for a label; labels that would lie on each other go up or down."""
    for shift in (0, 10, -10, 20, -20, 30):
        place = (x, y + shift / 70)
        if all(abs(place[0] - a) > 0.9 or abs(place[1] - b) > 0.12 for a, b in taken):
            break
    taken.append(place)
    return 6, shift


def _speedups(found: Results, op: str, folder: Path) -> str:
    """One panel per mode; a group of bars per shape, a bar per baseline, on a logarithmic axis."""
    panels = [(mode, bars) for mode in MODES if (bars := _gains(found, op, mode))]
    if not panels:
        return ""
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
    figure.suptitle(f"{op}: speed-up against each baseline", fontweight="bold")
    figure.legend(
        handles, [f"vs {t}" for t in texts], ncols=len(labels), loc="lower center", frameon=False
    )
    return write(figure, folder / f"speedup-{op}.png", bottom=0.35 / height)


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
