"""Numbers as a reader wants them."""

from __future__ import annotations


def seconds(value: float) -> str:
    """Three digits with the unit: "12.3 us"."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 1e-9)} ns"


def ratio(value: float | None) -> str:
    """ "2.35x", or a dash."""
    return "-" if value is None else f"{value:.2f}x" if value < 10 else f"{_three(value)}x"


def rate(value: float) -> str:
    """Two or three digits."""
    return _three(value) if value >= 1 or value == 0 else f"{value:.2g}"


def percent(value: float) -> str:
    """A share of 1: "43%"."""
    return f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1f}%"


def _three(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
