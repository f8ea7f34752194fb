"""The published settings of the cluster statistics, and how explicit arguments change them."""

from __future__ import annotations

import math
from typing import NamedTuple

from molex_kernels import _check

STATS = ("mad", "variance", "pairwise")
NORMS = ("feature_post", "global_pre", "global_post", "none")
EMPTY = ("mask", "published")


class Recipe(NamedTuple):
    """W = 1 / (s + eps), clipped at `clip` times its mean, divided as `norm` says."""

    stat: str
    eps: float
    clip: float
    norm: str
    mask: bool


# stat "mad", by backbone: eps, clip, norm.
_MAD = {
    "lm": (1e-4, 10.0, "feature_post"),
    "swin": (1e-4, 1.5, "global_pre"),
    "softmoe": (0.35, 5.0, "global_post"),
}
_OTHERS = {"variance": (0.1, math.inf, "none"), "pairwise": (1e-4, math.inf, "none")}


def resolve(
    recipe: str,
    stat: str | None,
    eps: float | None,
    clip: float | None,
    norm: str | None,
    empty: str,
) -> Recipe:
    """The recipe's settings with every explicit argument in its place; checks all of them."""
    _check.choice("recipe", recipe, tuple(_MAD))
    stat = "mad" if stat is None else stat
    _check.choice("stat", stat, STATS)
    default_eps, default_clip, default_norm = _MAD[recipe] if stat == "mad" else _OTHERS[stat]
    eps = default_eps if eps is None else eps
    clip = default_clip if clip is None else clip
    norm = default_norm if norm is None else norm
    _check.number("eps", eps, 0.0, exclusive=True)
    if clip != math.inf:
        _check.number("clip", clip, 0.0, exclusive=True)
    _check.choice("norm", norm, NORMS)
    _check.choice("empty", empty, EMPTY)
    return Recipe(stat, float(eps), float(clip), norm, empty == "mask")
