"""What the difference between the routers allows to say."""

from __future__ import annotations

import math
from typing import Any


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(spread / len(values))


def verdict(text: dict[str, Any]) -> str:
    """One or two sentences, for or against."""
    differences = text["differences"]
    mean, spread = mean_and_error([d["mean"] for d in differences])
    shown = f"Adaptive clustering minus top-k: {mean:+.4f} bits per byte"
    if len(differences) == 1:
        return (
            f"{shown} (standard error over validation windows {differences[0]['error']:.4f}). "
            "This is one seed: the spread between seeds is not in that error, so a difference "
            "of a few hundredths means nothing."
        )
    size = "within" if abs(mean) <= 2 * spread else "more than"
    return (
        f"{shown} over {len(differences)} seeds (standard error between seeds {spread:.4f}): "
        f"{size} two standard errors. With so few seeds that is an indication, not a proof."
    )
