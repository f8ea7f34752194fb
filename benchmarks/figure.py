"""What the report's images share: colours, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's palette, which readers with any colour vision tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#e69f00", "#56b4e9", "#009e73"
BLUE, VERMILION, PURPLE, GREY = "#0072b2", "#d55e00", "#cc79a7", "#999999"
COLOURS = {
    "published": BLUE,
    "reference": ORANGE,
    "compiled": GREEN,
    "library": VERMILION,
    "compiled_library": PURPLE,
    "liger": SKY,
}
OURS_COLOUR = BLACK
OTHER = GREY

MARKERS = {
    "published": "s",
    "reference": "v",
    "compiled": "D",
    "library": "^",
    "compiled_library": "o",
    "liger": "P",
}

# The same data gives the same bytes, and text stays text.
mpl.rcParams |= {"svg.hashsalt": "molex_kernels", "svg.fonttype": "none"}


def write(figure: Any, path: Path, bottom: float = 0.0, top: float = 1.0) -> str:
    """Saves and closes the figure: as PNG and SVG, or as what the path ends in.

    Returns the name of the file, of the PNG where there are two.
    """
    figure.tight_layout(rect=(0, bottom, 1, top))
    paths = [path] if path.suffix else [path.with_suffix(kind) for kind in (".png", ".svg")]
    for target in paths:
        metadata = {"Date": None} if target.suffix == ".svg" else None
        figure.savefig(target, dpi=130, metadata=metadata)
    plt.close(figure)
    return paths[0].name


def times_axis(axis: Axes, values: list[float]) -> None:
    """A logarithmic axis of ratios, with a line where there is no difference."""
    axis.set_xscale("log")
    axis.set_xlim(min(0.4, 0.5 * min(values)), max(2.5, 2.2 * max(values)))
    axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axis.axvline(1.0, color="black", linewidth=0.8, zorder=1)
    axis.axvspan(axis.get_xlim()[0], 1.0, color="#eeeeee", zorder=0)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
