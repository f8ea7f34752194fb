"""The models that the text run trains side by side: one transformer, its mixtures varied."""

from __future__ import annotations

from dataclasses import dataclass

from molex_kernels.ops.momentum.types import Adam, HeavyBall, Nesterov, RobustMomentum, Rule

BASE = "plain"


@dataclass(frozen=True)
class Variant:
    """One model. `adaptive`: adaptive-clustering routers.

    `rules`: momentum, of the first mixture and of the others. `merged`: the experts are merged
    segment by segment, with a curvature of this rank (0: none); None: they are routed to.
    """

    name: str
    label: str
    adaptive: bool = False
    rules: tuple[Rule, Rule] | None = None
    merged: int | None = None


def _momentum(name: str, label: str, rule: Rule, first: Rule | None = None) -> Variant:
    return Variant(name, label, rules=(first or rule, rule))


# mu as in MomentumSMoE's scripts. AdamSMoE has Adam in the first layer only, heavy ball after it:
# its step there is about 3 gamma in every feature, so gamma is small beside a pre-LN residual.
# The robust constants give mu 0.68, gamma 1.0 and a look-ahead of 1.6 displacements.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(BASE, "plain"),
        Variant("ac", "adaptive clustering", adaptive=True),
        _momentum("heavy_ball", "heavy ball", HeavyBall(0.7)),
        _momentum("nesterov", "Nesterov", Nesterov(0.7)),
        _momentum("adam", "Adam", HeavyBall(0.7), first=Adam(gamma=0.05)),
        _momentum("robust", "robust", RobustMomentum(0.4163, 0.04163, 0.85)),
        Variant("euclidean", "Euclidean merging", merged=0),
        Variant("camex", "CAMEx", merged=1),
    )
}
