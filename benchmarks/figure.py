"""What the report's images share: colours, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Told apart by readers with any colour vision.
COLOURS = {
    "published": "#4477aa",
    "reference": "#ccbb44",
    "compiled": "#228833",
    "library": "#ee6677",
    "liger": "#66ccee",
}
OURS_COLOUR = "#222222"
OTHER = "#888888"
# For more things than there are colours.
MANY_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44")
MANY_MARKERS = "os^DvPX*"

MARKERS = {"published": "s", "reference": "v", "compiled": "D", "library": "^", "liger": "P"}

# The same data gives the same bytes, and text stays text.
mpl.rcParams |= {"svg.hashsalt": "molex_kernels", "svg.fonttype": "none"}


def write(figure: Any, path: Path, bottom: float = 0.0, top: float = 1.0) -> str:
    """Saves and closes the figure; the file's name."""
    figure.tight_layout(rect=(0, bottom, 1, top))
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=130, metadata=metadata)
    plt.close(figure)
    return path.name


def times_axis(axis: Axes, values: list[float]) -> None:
    """A logarithmic axis of ratios, with a line where there is no difference."""
    axis.set_xscale("log")
    axis.set_xlim(min(0.4, 0.5 * min(values)), max(2.5, 2.2 * max(values)))
    axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.axvspan(axis.get_xlim()[0], 1.0, color="#eeeeee", zorder=0)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
