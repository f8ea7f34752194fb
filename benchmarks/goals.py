"""The goals of docs/benchmarks.md that are a speed-up over one baseline, and what a run decides.

A goal is met or missed where the whole interval is on one side of it; where the interval holds the
goal, the run does not tell.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks import results, terminal
from benchmarks.results import Results
from benchmarks.rows import MODES, Group
from benchmarks.spread import Ratio

MET, MISSED, UNDECIDED = "met", "missed", "undecided"
FASTER, SLOWER = "faster", "slower"
COLOURS = {MET: terminal.GREEN, MISSED: terminal.RED, UNDECIDED: terminal.ORANGE}


class Goal(NamedTuple):
    """`factor` times as fast as `baseline`, in both passes of each shape that the pattern finds."""

    op: str
    shape: str
    baseline: str
    factor: float


GOALS = {
    "cpu": (
        Goal("momentum_update", "T3072-D352-adam/fp32$", "published", 8.0),
        Goal("momentum_update", "T3072-D352-adam/fp32$", "compiled", 1.0),
        Goal("ac_route", "T8192-D1024-E64-K2/fp32$", "published", 4.0),
        Goal("ac_route", "T8192-D1024-E64-K2/fp32$", "compiled", 2.0),
        Goal("rpc_attention", "B8-H3-N197-d64-n4/fp32$", "published", 2.0),
        Goal("rpc_attention", "B8-H3-N197-d64-n4/fp32$", "compiled", 1.1),
        Goal("camex_linear", "-ties/fp32$", "published", 3.0),
        Goal("camex_linear", "-ties/fp32$", "compiled", 1.5),
    ),
    "cuda": (
        Goal("moe_mlp", "T3072-D352-.*/bf16$", "published", 5.0),
        Goal("moe_mlp", "T(40960-D768|24576-D1536|32768-D4096)-.*-swiglu/bf16$", "library", 1.0),
        Goal("moe_mlp", "-qwen3/bf16$", "liger", 1.0),
        Goal("ac_route", "T6144-D352-E16-K2-(cosine|swin|softmoe)/bf16$", "published", 5.0),
        Goal("rpc_attention", "B256-H3-N197-d64-n4-.*/bf16$", "library", 3.0),
        Goal("rpc_attention", "B256-H3-N197-d64-n4-.*/bf16$", "published", 8.0),
        Goal("camex_linear", "-r[18]-ties/bf16$", "published", 3.0),
        Goal("layer_linear", "T(4096|8192)-.*/bf16$", "published", 1.0),
    ),
}


class Verdict(NamedTuple):
    """A goal at one shape in one pass."""

    goal: Goal
    shape: str
    mode: str
    gain: Ratio
    outcome: str


def concerns(group: Group) -> bool:
    """Whether there is a goal for this shape."""
    return any(
        goal.op == group.info.name and re.search(goal.shape, group.name)
        for goal in GOALS.get(group.device.type, ())
    )


def outcome(gain: Ratio, factor: float) -> str:
    """Met or missed by the whole interval, else undecided."""
    if gain.low >= factor:
        return MET
    return MISSED if gain.high < factor else UNDECIDED


def verdicts(found: Results) -> list[Verdict]:
    """Every goal that the run has a figure for; ours is the fastest that has one."""
    made = []
    for goal in GOALS.get(found["environment"]["device"], ()):
        for mode in MODES:
            for shape in results.shapes(found, goal.op, mode):
                ours = results.best(results.members(found, goal.op, mode, shape))
                gain = results.speedup(ours, goal.baseline) if ours else None
                if gain and re.search(goal.shape, shape):
                    made.append(Verdict(goal, shape, mode, gain, outcome(gain, goal.factor)))
    return made


def against(gains: Iterable[Ratio]) -> str:
    """ "12 faster, 1 slower, 5 undecided": on which side of 1x the intervals are."""
    names = {MET: FASTER, MISSED: SLOWER, UNDECIDED: UNDECIDED}
    counts = Counter(names[outcome(gain, 1.0)] for gain in gains)
    return ", ".join(f"{counts[name]} {name}" for name in names.values())
