"""Numbers as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


def seconds(value: float) -> str:
    """Three digits with the unit: "12.3 us"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 1e-9)} ns"


def ratio(value: float | None) -> str:
    """ "2.35x", or a dash."""
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{_three(value)}x"


def gain(value: tuple[float, float, float] | None) -> str:
    """A ratio with half its interval: "2.35x +-4%", or a dash."""
    if value is None:
        return "-"
    median, low, high = value
    return f"{ratio(median)} ±{100 * math.log(high / low) / 2:.0f}%"


def count(value: float) -> str:
    """A number of things, or a plain number: "4", "1.06"."""
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"


def size(value: float) -> str:
    """Bytes with the unit: "12.3 MiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{value:.0f} B"


def rate(value: float) -> str:
    """Two or three digits."""
    return _three(value) if value >= 1 or value == 0 else f"{value:.2g}"


def percent(value: float) -> str:
    """A share of 1: "43%"."""
    return f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1f}%"


def share(value: float, ceiling: str) -> str:
    """A share of a ceiling. More than all of it can only be had from a cache, or by noise."""
    shown = percent(value)
    if value <= 1:
        return shown
    return f"{shown} (cache)" if ceiling == "copy" else f"{shown} (cache or noise)"


def cells(values: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(values)} |"


def image(title: str, name: str, plots: Sequence[str], folder: str = "") -> Iterator[str]:
    """The image of that name in Markdown, of whatever kind, where there is one."""
    for plot in plots:
        if plot.rsplit(".", 1)[0] == name:
            yield from (f"![{title}]({folder}{plot})", "")


def _three(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
