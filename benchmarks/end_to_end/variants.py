"""The models that the text run trains: one transformer, its mixtures varied."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.end_to_end.study import Method
from molex_kernels.ops.momentum.types import Adam, HeavyBall, Nesterov, RobustMomentum, Rule

RATES = (3e-2, 6e-2, 1.2e-1)


@dataclass(frozen=True)
class Variant:
    """One model. `clip`: of adaptive-clustering routers; None: plain ones.

    `rules`: momentum, of the first mixture and of the others. `merged`: the experts are merged
    segment by segment, with a curvature of this rank (0: none) and a step of `alpha`; None: they
    are routed to.
    """

    clip: float | None = None
    rules: tuple[Rule, Rule] | None = None
    merged: int | None = None
    alpha: float = 1.0


# The published values: MomentumSMoE's scripts have mu 0.7 and gamma 1. AdamSMoE has Adam in the
# first layer only, heavy ball after it: its step there is about 3 gamma in every feature. The
# robust constants give mu 0.68, gamma 1.0 and a look-ahead of 1.6 displacements.
METHODS: dict[str, Method[Variant]] = {
    "plain": Method("plain", lambda _: Variant(), "learning rate", RATES),
    "ac": Method("adaptive clustering", lambda v: Variant(clip=v), "clip", (10, 3, 1.5)),
    "heavy_ball": Method(
        "heavy ball", lambda v: Variant(rules=(HeavyBall(v),) * 2), "mu", (0.7, 0.5, 0.3)
    ),
    "nesterov": Method(
        "Nesterov", lambda v: Variant(rules=(Nesterov(v),) * 2), "mu", (0.7, 0.5, 0.3)
    ),
    "adam": Method(
        "Adam", lambda v: Variant(rules=(Adam(gamma=v), HeavyBall(0.7))), "gamma", (1, 0.3, 0.05)
    ),
    "robust": Method(
        "robust",
        lambda v: Variant(rules=(RobustMomentum(0.4163, 0.04163, v),) * 2),
        "rho",
        (0.85, 0.8),
    ),
    "euclidean": Method(
        "Euclidean merging", lambda v: Variant(merged=0, alpha=v), "alpha", (1, 0.5, 0.25)
    ),
    "camex": Method("CAMEx", lambda v: Variant(merged=8, alpha=v), "alpha", (1, 0.5, 0.125)),
}
