"""What a part of the training runs shows: differences paired by seed, and their spread."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.formats import cells

# Student's t at 95%, two-sided, by degrees of freedom from 1; of more, the last.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """The mean, and the standard deviation of one value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


def differences(found: dict[str, Any]) -> Iterator[tuple[str, float, dict[str, list[float]]]]:
    """Each method and setting, minus the baseline of the same seed, by metric."""
    base = {run["seed"]: run["test"] for run in found["runs"] if run["variant"] == found["base"]}
    settings = dict.fromkeys((run["variant"], run["value"]) for run in found["runs"])
    for name, value in settings:
        if name != found["base"]:
            mine = [r for r in found["runs"] if (r["variant"], r["value"]) == (name, value)]
            gaps = {m: [r["test"][m] - base[r["seed"]][m] for r in mine] for m in mine[0]["test"]}
            yield name, value, gaps


def gain(found: dict[str, Any]) -> tuple[float, float]:
    """By how much the baseline's validation still improved over the last quarter of its steps."""
    sign = 1 if found["measure"]["higher_is_better"] else -1
    curves = [run["curve"] for run in found["runs"] if run["variant"] == found["base"]]
    quarter = len(curves[0]) // 4
    return mean_and_deviation([sign * (c[-1][1] - c[-1 - quarter][1]) for c in curves])


def verdict(found: dict[str, Any]) -> list[str]:
    """A table of the differences, and what it allows to say."""
    seeds = sorted({run["seed"] for run in found["runs"]})
    if len(seeds) == 1:
        return ["One seed: it says nothing about the methods."]
    measure, labels, base = found["measure"], found["labels"], found["base"]
    metrics, digits = measure["metrics"], measure["digits"]
    limit = T95[min(len(seeds) - 1, len(T95)) - 1] / math.sqrt(len(seeds))

    def shown(values: list[float], is_gap: bool) -> str:
        mean, deviation = mean_and_deviation(values)
        text = f"{mean:{'+' if is_gap else ''}.{digits}f} ± {deviation:.{digits}f}"
        return f"**{text}**" if is_gap and abs(mean) > limit * deviation else text

    own = [run["test"] for run in found["runs"] if run["variant"] == base]
    lines = [
        cells(["", "setting", *metrics]),
        f"|{'---|' * (2 + len(metrics))}",
        cells(
            [
                labels[base],
                _setting(found, base),
                *(shown([t[m] for t in own], False) for m in metrics),
            ]
        ),
    ]
    for name, value, gaps in differences(found):
        setting = _setting(found, name, value)
        lines.append(
            cells([f"{labels[name]} minus that", setting, *(shown(gaps[m], True) for m in metrics)])
        )
    mean, deviation = gain(found)
    better = "higher" if measure["higher_is_better"] else "lower"
    lines += [
        "",
        f"{measure['unit'].capitalize()}, {better} is better: mean ± standard deviation between "
        f"{len(seeds)} seeds, methods minus the baseline of the same seed. In bold where 0 is "
        "outside the 95% interval of the mean, which each figure has one chance in twenty to be "
        f"where there is no difference. Over the last quarter of {found['steps']} steps the "
        f"baseline's validation still gained {mean:.{digits}f} ± {deviation:.{digits}f}.",
    ]
    if left_out := found["plan"]["left_out"]:
        lines.append(f"Left out here: {', '.join(labels[name] for name in left_out)}.")
    return lines


def _setting(found: dict[str, Any], name: str, value: float | None = None) -> str:
    """The knob, its value, and whether that is the published one, the tuned one, or both."""
    chosen = found["chosen"][name]
    value = chosen if value is None else value
    if not found["knobs"][name]:
        return "published"
    is_tuned = name in found["tried"] and value == chosen
    is_published = name != found["base"] and value == found["published"][name]
    words = [w for w, holds in (("published", is_published), ("tuned", is_tuned)) if holds]
    return f"{found['knobs'][name]} {value:g}{', ' if words else ''}{' and '.join(words)}"
