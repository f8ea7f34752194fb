"""What the differences between the variants allow to say."""

from __future__ import annotations

import math
from typing import Any


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(spread / len(values))


def verdict(text: dict[str, Any]) -> list[str]:
    """What came out, one line per variant and one on what it allows to say."""
    differences = text["differences"]
    seeds = sorted({d["seed"] for d in differences})
    names = list(dict.fromkeys(d["variant"] for d in differences))
    lines = []
    for name in names:
        mine = [d for d in differences if d["variant"] == name]
        shown = ", ".join(
            f"{mean:+.4f} +- {error:.4f} {on}"
            for on, key in (("clean", "final"), ("with swapped words", "swapped"))
            for mean, error in [_over_seeds(mine, key)]
        )
        lines.append(f"{text['labels'][name]} minus {text['labels'][text['base']]}: {shown}")
    if len(seeds) == 1:
        return [
            *lines,
            "Bits per byte; the error is over validation windows. This is one seed: the spread "
            "between seeds is not in it, so a difference of a few hundredths means nothing.",
        ]
    return [
        *lines,
        f"Bits per byte; the error is between {len(seeds)} seeds. With so few, even a difference "
        "of more than two errors is an indication, not a proof.",
    ]


def _over_seeds(differences: list[dict[str, Any]], key: str) -> tuple[float, float]:
    if len(differences) == 1:
        return differences[0][key], differences[0][f"{key}_error"]
    return mean_and_error([d[key] for d in differences])
