"""What time and memory do as a size grows, on logarithmic axes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import scaling
from benchmarks.figure import COLOURS, MARKERS, OTHER, OURS_COLOUR, write
from benchmarks.formats import seconds, size
from benchmarks.results import Results, Row
from benchmarks.rows import MODES, OURS
from benchmarks.scaling import NAMES, Exponent, Fit

COLUMNS = 4
Show = Callable[[float], str]


def images(found: Results, folder: Path) -> list[Callable[[], str]]:
    """What draws time over tokens, over experts, over every other size; memory over all."""
    every = scaling.sweeps(found)
    by_name = {
        "tokens": [s for s in every if s[1] == "T"],
        "experts": [s for s in every if s[1] == "E"],
        "others": [s for s in every if s[1] not in "TE"],
    }
    times = [
        partial(_panels, found, chosen, "median_s", seconds, folder / f"time-{name}",
                f"Time over {'other sizes' if name == 'others' else name}")
        for name, chosen in by_name.items()
    ]  # fmt: skip
    chosen = [s for s in every if s[1] in "TNS"]
    title = "Peak memory of a call over its size"
    memory = partial(_panels, found, chosen, "peak_bytes", size, folder / "memory", title)
    return [*times, memory]


def _panels(
    found: Results, chosen: list[tuple[str, str]], key: str, show: Show, path: Path, title: str
) -> str:
    """A panel per sweep, a line per implementation, its exponent in the legend."""
    panels = []
    for op, letter in chosen:
        for mode in (MODES[1], MODES[0]):
            if fits := scaling.fits(found, op, letter, mode):
                panels.append((op, letter, mode, fits))
                break
    if not panels:
        return ""
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.3 * columns + 0.4, 2.9 * lines + 0.5), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (op, letter, mode, fits) in zip(axes.flat, panels, strict=False):
        for fit in fits:
            _line(axis, fit, key)
        _scales(axis, fits, key, show)
        axis.set_title(f"{op}, {mode}", fontsize=10)
        axis.set_xlabel(f"{letter}: {NAMES.get(letter, letter)}", fontsize=9)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    known = any(_fitted(fit, key) for *_, fits in panels for fit in fits)
    after = ", and the exponent ± its standard error" if known else ""
    figure.suptitle(f"{title}{after}", fontweight="bold")
    return write(figure, path)


def _line(axis: Axes, fit: Fit, key: str) -> None:
    ours = fit.kind == OURS
    colour = OURS_COLOUR if ours else COLOURS.get(fit.impl, OTHER)
    fitted = _fitted(fit, key)
    label = fit.impl if fitted is None else f"{fit.impl}: {fitted}"
    # Two lines may run through the same points: a small full mark shows inside of a large ring.
    axis.plot(
        [fit.size(r) for r in fit.points], [_value(r, key) for r in fit.points],
        marker="o" if ours else MARKERS.get(fit.impl, "o"), color=colour, label=label,
        markersize=4 if ours else 9, markerfacecolor=colour if ours else "none",
        linewidth=1 if ours else 3, alpha=1 if ours else 0.7, zorder=3 if ours else 2,
    )  # fmt: skip


def _fitted(fit: Fit, key: str) -> Exponent | None:
    return fit.time if key == "median_s" else fit.memory


def _value(row: Row, key: str) -> float:
    return row[key] or math.nan


def _scales(axis: Axes, fits: list[Fit], key: str, show: Show) -> None:
    axis.set_xscale("log", base=2)
    base = 10 if key == "median_s" else 2
    axis.set_yscale("log", base=base)
    sizes = sorted({fit.size(row) for fit in fits for row in fit.points})
    axis.set_xticks(sizes, [str(s) for s in sizes], fontsize=8)
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    values = [v for fit in fits for r in fit.points if (v := _value(r, key)) == v]
    low, high = min(values), max(values)
    # At least a decade, so that a flat line looks flat; room for the legend above.
    middle = math.sqrt(low * high)
    span = max(math.sqrt(high / low), math.sqrt(10.0))
    axis.set_ylim(middle / span / 1.3, middle * span * 1.3 * 3.5 ** (len(fits) / 2))
    ticks = mpl.ticker.LogLocator(base=10) if base == 10 else mpl.ticker.LogLocator(4, numticks=6)
    axis.yaxis.set_major_locator(ticks)
    axis.yaxis.set_major_formatter(lambda value, _: re.sub(r"\.0+ ", " ", show(value)))
    if base == 2:
        axis.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.3)
