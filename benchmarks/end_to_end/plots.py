"""The images of the training runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, write
from benchmarks.formats import seconds

COLOURS = (BLACK, VERMILION, BLUE, SKY, GREEN, ORANGE, PURPLE, GREY)
TITLES = {"text": "Text", "images": "Images", "finetune": "Fine-tuning a pretrained encoder"}


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    """Writes every image there is data for; their names."""
    names = [_curves(found[p], TITLES[p], folder / f"{p}-curves") for p in TITLES if p in found]
    if text := found.get("text"):
        names.append(_steps(text, folder / "text-steps"))
    return names


def _curves(part: dict[str, Any], title: str, path: Path) -> str:
    """Validation by step, every seed's; a method is shown as tuned."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    colours = _colours(part)
    for name, value in part["chosen"].items():
        label = part["labels"][name]
        for run in part["runs"]:
            if (run["variant"], run["value"]) == (name, value):
                style = "-" if name == part["base"] else "--"
                steps, scores = zip(*run["curve"], strict=True)
                axis.plot(steps, scores, style, color=colours[name], marker="o", ms=3, label=label)
                label = None
    axis.set_xlabel("step")
    axis.set_ylabel(f"validation, {part['measure']['unit']}")
    axis.set_title(title, fontweight="bold")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
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


def _colours(part: dict[str, Any]) -> dict[str, str]:
    return dict(zip(part["labels"], itertools.cycle(COLOURS), strict=False))
