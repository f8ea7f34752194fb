"""The report's images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import results
from benchmarks.end_to_end import images
from benchmarks.formats import ratio, seconds
from benchmarks.results import Results
from benchmarks.rows import MODES, OURS

COLOURS = {
    "published": "#4477aa",
    "reference": "#ccbb44",
    "compiled": "#228833",
    "library": "#ee6677",
}
OTHER = "#888888"
VARIANT_COLOURS = (
    *("#000000", "#ee6677", "#4477aa", "#66ccee", "#228833", "#ccbb44", "#aa3377"),
    *("#999933", "#882255", "#44aa99"),
)


def draw(found: Results, folder: Path) -> list[str]:
    """Writes every image there is data for; their names."""
    names = [n for op in results.ops(found) if (n := _speedups(found, op, folder))]
    if found["text"]:
        names += [_curves(found["text"], folder), _steps(found["text"], folder)]
    if found["images"]:
        names.append(_images(found["images"], folder))
    return names


def _speedups(found: Results, op: str, folder: Path) -> str:
    """One panel per mode; a group of bars per shape, a bar per baseline, on a logarithmic axis."""
    panels = []
    for mode in MODES:
        bars = []
        for shape in results.shapes(found, op, mode):
            group = results.members(found, op, mode, shape)
            if ours := results.best(group):
                gains = {
                    r["impl"]: gain
                    for r in group
                    if r["kind"] != OURS and (gain := results.speedup(ours, r))
                }
                if gains:
                    bars.append((f"{shape.split('/')[0]}\n({ours['impl']})", gains))
        if bars:
            panels.append((mode, bars))
    if not panels:
        return ""
    labels = [n for n in results.baselines(found) if any(n in g for _, b in panels for _, g in b)]
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
    return _write(figure, folder / f"speedup-{op}.png", bottom=0.35 / height)


def _bars(axis: Axes, bars: list[tuple[str, dict[str, float]]], labels: list[str]) -> None:
    width = 0.8 / len(labels)
    for index, name in enumerate(labels):
        offset = (index - (len(labels) - 1) / 2) * width
        places = [p + offset for p in range(len(bars))]
        values = [gains.get(name, float("nan")) for _, gains in bars]
        # A logarithmic bar has no zero: it starts at 1, no difference.
        lengths = [v - 1 for v in values]
        colour = COLOURS.get(name, OTHER)
        axis.barh(places, lengths, 0.9 * width, left=1.0, color=colour, label=name)
        for place, value in zip(places, values, strict=True):
            if value == value:
                side = "left" if value >= 1 else "right"
                shift = 3 if value >= 1 else -3
                axis.annotate(
                    ratio(value), (value, place), (shift, 0), textcoords="offset points",
                    ha=side, va="center", fontsize=8,
                )  # fmt: skip
    found = [g for _, gains in bars for g in gains.values()]
    axis.set_xscale("log")
    axis.set_xlim(min(0.4, 0.5 * min(found)), max(2.5, 2.2 * max(found)))
    axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("times faster (right of 1x: ours is faster)")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _curves(text: dict[str, Any], folder: Path) -> str:
    figure, axis = plt.subplots(figsize=(7, 4.2))
    markers = "osD^v"
    seeds = sorted({run["seed"] for run in text["runs"]})
    for run in text["runs"]:
        marker = markers[seeds.index(run["seed"]) % len(markers)]
        style = "-" if run["variant"] == text["base"] else "--"
        colour, name = _colours(text)[run["variant"]], text["labels"][run["variant"]]
        steps, bits = zip(*run["validation"], strict=True)
        label = f"{name}, seed {run['seed']}: {run['final']:.3f} in the end, all windows"
        axis.plot(steps, bits, style, color=colour, marker=marker, markersize=3.5, label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("validation bits per byte, every eighth window")
    axis.set_title("Byte-level transformer on the Python standard library", fontweight="bold")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return _write(figure, folder / "text-curves.png")


def _steps(text: dict[str, Any], folder: Path) -> str:
    timed = [t for t in text["step_times"] if "median_s" in t]
    impls = list(dict.fromkeys(t["impl"] for t in timed))
    variants = list(dict.fromkeys(t["variant"] for t in timed))
    height = 0.8 / max(len(variants), 1)
    figure, axis = plt.subplots(figsize=(7, 1.8 + 0.25 * len(timed)))
    for index, variant in enumerate(variants):
        entries = [t for t in timed if t["variant"] == variant]
        shift = (index - (len(variants) - 1) / 2) * height
        places = [impls.index(t["impl"]) + shift for t in entries]
        values = [t["median_s"] * 1e3 for t in entries]
        colour, label = _colours(text)[variant], text["labels"][variant]
        axis.barh(places, values, 0.9 * height, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            axis.annotate(
                seconds(value * 1e-3), (value, place), (3, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
    axis.set_yticks(range(len(impls)), impls)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_xlabel("milliseconds per training step (this machine's)")
    axis.set_title("Training step by implementation", fontweight="bold")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(ncols=3, loc="lower center", frameon=False, fontsize=8)
    return _write(figure, folder / "text-steps.png", bottom=0.12)


def _images(found: dict[str, Any], folder: Path) -> str:
    rows = images.summary(found)
    width = 0.8 / len(rows)
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for index, ((label, accuracies), colour) in enumerate(zip(rows, VARIANT_COLOURS, strict=False)):
        places = [p + (index - (len(rows) - 1) / 2) * width for p in range(len(images.TESTS))]
        means, errors = zip(*([100 * x for x in pair] for pair in accuracies.values()), strict=True)
        axis.bar(places, means, 0.9 * width, yerr=errors, capsize=2, color=colour, label=label)
    axis.set_xticks(range(len(images.TESTS)), images.TESTS)
    axis.set_ylabel(f"% of {found['test']} held-out digits recognised")
    axis.set_title("Vision transformer on handwritten digits", fontweight="bold")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(ncols=2, loc="lower center", frameon=False, fontsize=8)
    return _write(figure, folder / "images.png", bottom=0.13)


def _colours(text: dict[str, Any]) -> dict[str, str]:
    return dict(zip(text["labels"], VARIANT_COLOURS, strict=False))


def _write(figure: Any, path: Path, bottom: float = 0.0) -> str:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path.name
