"""The images of the training runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.end_to_end import images
from benchmarks.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    write,
)
from benchmarks.formats import seconds

VARIANT_COLOURS = (BLACK, VERMILION, BLUE, SKY, GREEN, ORANGE, PURPLE, GREY)


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    """Writes every image there is data for; their names."""
    names = []
    if text := found.get("text"):
        names.append(_curves(text, folder / "text-curves"))
        names.append(_steps(text, folder / "text-steps"))
    if digits := found.get("images"):
        names.append(_accuracies(digits, folder / "images"))
    return names


def _curves(text: dict[str, Any], path: Path) -> str:
    figure, axis = plt.subplots(figsize=(7, 4.2))
    markers = "osD^v"
    seeds = sorted({run["seed"] for run in text["runs"]})
    for run in text["runs"]:
        marker = markers[seeds.index(run["seed"]) % len(markers)]
        style = "-" if run["variant"] == text["base"] else "--"
        colour, name = _colours(text)[run["variant"]], text["labels"][run["variant"]]
        steps, bits = zip(*run["validation"], strict=True)
        label = f"{name}, seed {run['seed']}: {run['final']:.3f}"
        axis.plot(steps, bits, style, color=colour, marker=marker, markersize=3.5, label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("validation bits per byte, every eighth window")
    axis.set_title("Byte-level transformer on the Python standard library", fontweight="bold")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, title="in the end, on all windows", title_fontsize=8)
    return write(figure, path)


def _steps(text: dict[str, Any], path: Path) -> str:
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
    return write(figure, path, bottom=0.12)


def _accuracies(found: dict[str, Any], path: Path) -> str:
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
    return write(figure, path, bottom=0.13)


def _colours(text: dict[str, Any]) -> dict[str, str]:
    return dict(zip(text["labels"], itertools.cycle(VARIANT_COLOURS), strict=False))
