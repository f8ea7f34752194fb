"""What the project set out to reach, as data, and how each goal is read off a run."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.formats import count, percent, ratio, seconds
from benchmarks.readings import (
    Figures,
    Read,
    Reading,
    against_op,
    attention_output,
    fact,
    growth,
    nowhere,
    per,
    pre_activation,
    share,
    slowdown,
    speedup,
    together,
    two_blocks,
)
from benchmarks.results import Results
from benchmarks.rows import MODES

MET, MISSED, PARTLY, UNMEASURED = "met", "missed", "partly measured", "not measured"

COLUMNS = ("what", "figure", "goal", "pass", "measured", "share of ceiling", "status")
MEAN, EACH = "geometric mean", "each shape"


@dataclass(frozen=True)
class Goal:
    """`read` finds the figures of one mode; `target` is the least, or with `most` the largest."""

    device: str
    subject: str
    what: str
    target: float
    read: Read
    show: Callable[[float], str] = ratio
    most: bool = False
    over: str = EACH
    modes: tuple[str, ...] = MODES

    @property
    def wording(self) -> str:
        """ "at least 1.40x, geometric mean"."""
        over = "" if self.over == EACH else f", {self.over}"
        return f"{'at most' if self.most else 'at least'} {self.show(self.target)}{over}"


@dataclass(frozen=True)
class Standing:
    """A goal beside what was measured in one mode. `measured` is the mean, or the worst shape's.

    `bound` says how near to the ceiling our implementation is at the shape that decided.
    """

    goal: Goal
    mode: str
    measured: float | None
    shape: str
    found: int
    expected: int
    bound: str = "-"

    @property
    def status(self) -> str:
        """Met or missed; a miss counts even where shapes are lacking."""
        if self.measured is None:
            return UNMEASURED
        target = self.goal.target
        reached = self.measured <= target if self.goal.most else self.measured >= target
        if not reached and (self.goal.over == EACH or self.found == self.expected):
            return MISSED
        return MET if self.found == self.expected else PARTLY

    def cells(self, *, worst: bool) -> tuple[str, ...]:
        """The fields of `COLUMNS`; `worst` names the shape that decided."""
        shown = "-" if self.measured is None else self.goal.show(self.measured)
        if self.measured is not None and self.expected > 1:
            which = f", worst {self.shape}" if worst and self.goal.over == EACH else ""
            shown += f" ({self.found} of {self.expected} shapes{which})"
        goal = self.goal
        return goal.subject, goal.what, goal.wording, self.mode, shown, self.bound, self.status


def standings(found: Results) -> list[Standing]:
    """Every goal of the device of this run, by mode."""
    device = found["environment"].get("device")
    wanted = [goal for goal in GOALS if goal.device == device]
    stands = [
        _standing(goal, mode, goal.read(found, mode)) for goal in wanted for mode in goal.modes
    ]
    return [replace(standing, bound=_bound(standing, found)) for standing in stands]


def speaks_of(device: str, op: str, shape: str) -> bool:
    """Whether a goal of this device is about this shape, and not about any shape of the op."""
    reads = [goal.read for goal in GOALS if goal.device == device]
    mine = [read for read in reads if isinstance(read, Reading) and read.op == op]
    patterns = {pattern for read in mine for pattern in read.patterns} - {"*"}
    return any(fnmatch.fnmatchcase(shape, pattern) for pattern in patterns)


def _bound(standing: Standing, found: Results) -> str:
    read = standing.goal.read
    rows = read.rows(found, standing.mode) if isinstance(read, Reading) else {}
    row = rows.get(standing.shape)
    return "-" if row is None else f"{percent(row['share'])} of {row['ceiling']}"


def _standing(goal: Goal, mode: str, figures: Figures) -> Standing:
    known = [(value, shape) for shape, value in figures if value is not None]
    if not known:
        return Standing(goal, mode, None, "", 0, len(figures))
    if goal.over == MEAN:
        mean = math.exp(sum(math.log(value) for value, _ in known) / len(known))
        return Standing(goal, mode, mean, "", len(known), len(figures))
    value, shape = (max if goal.most else min)(known)
    return Standing(goal, mode, value, shape, len(known), len(figures))


FIELD = ("T40960-D768-*-swiglu", "T24576-D1536-*-swiglu", "T32768-D4096-*-swiglu")
VISION = "B256-H3-N197-d64-n4-lam_4.0"
ROUTING = (("topk_route", "route_plan"), ("T6144-D352-E16-K2", "T6144-E16-K2"))
LONG = ("B4-H16-N1024-*", "B4-H16-N4096-*")
BY_RANK = ("*-r1-ties", "*-r8-ties")
ADAM = "T3072-D352-adam"
FORWARD, STEP = MODES[:1], MODES[1:]
# What has no kinks, near which two right gradients differ.
SMOOTH = (
    ("moe_mlp", "*-swiglu*", MODES),
    ("grouped_gemm", "*", MODES),
    ("topk_route", "*", MODES),
    ("ac_route", "*", MODES),
    ("momentum_update", "*", MODES),
    ("rpc_attention", "*", FORWARD),
    ("camex_linear", "*", MODES),
    ("layer_linear", "*", MODES),
)

_GPU = (
    Goal(
        "cuda",
        "expert MLP, the field's 12 shapes",
        "against `library`",
        1.4,
        speedup("moe_mlp", "library", *FIELD),
        over=MEAN,
    ),
    Goal(
        "cuda",
        "expert MLP, the field's 12 shapes",
        "against `library`",
        1.0,
        speedup("moe_mlp", "library", *FIELD),
    ),
    Goal(
        "cuda",
        "expert MLP, Qwen3-30B",
        "against `liger`",
        1.5,
        speedup("moe_mlp", "liger", "*-qwen3"),
        over=MEAN,
    ),
    Goal(
        "cuda",
        "bare grouped GEMM, uniform",
        "share of a bmm's speed",
        0.88,
        speedup("grouped_gemm", "bmm", "T65536-*-even", "T131072-*-even"),
        percent,
    ),
    Goal(
        "cuda",
        "bare grouped GEMM, Zipf-skewed",
        "share of a bmm's speed",
        0.80,
        speedup("grouped_gemm", "bmm", "*-zipf"),
        percent,
    ),
    Goal(
        "cuda",
        "expert MLP, 128 tokens",
        "share of copy bandwidth",
        0.65,
        share("moe_mlp", "T128-*"),
        percent,
    ),
    Goal(
        "cuda",
        "expert MLP, T3072 D352 E16 K2",
        "against `published`",
        5.0,
        speedup("moe_mlp", "published", "T3072-D352-*"),
    ),
    Goal(
        "cuda",
        "routing, all of it",
        "launches",
        4,
        together(*ROUTING, "launches"),
        count,
        most=True,
        modes=FORWARD,
    ),
    Goal(
        "cuda",
        "routing, all of it",
        "waits for the device",
        0,
        together(*ROUTING, "waits"),
        count,
        most=True,
        modes=FORWARD,
    ),
    Goal(
        "cuda",
        "routing, all of it",
        "against `library`",
        4.0,
        together(*ROUTING, "library"),
        modes=FORWARD,
    ),
    Goal(
        "cuda",
        "adaptive-clustering router",
        "times the plain router's time",
        2.2,
        against_op("ac_route", "topk_route", "T6144-D352-E16-K2-cosine", "T6144-D352-E16-K2"),
        most=True,
    ),
    Goal(
        "cuda",
        "adaptive-clustering router",
        "against `published`",
        5.0,
        speedup("ac_route", "published", "T6144-D352-E16-K2-cosine", "*-swin", "*-softmoe"),
    ),
    Goal(
        "cuda",
        "pairwise statistics, 6144 x 352",
        "time",
        20e-3,
        fact("ac_weights", "median_s", "T6144-*-pairwise"),
        seconds,
        most=True,
        modes=FORWARD,
    ),
    Goal(
        "cuda",
        "momentum update",
        "share of copy bandwidth",
        0.85,
        share("momentum_update", "T24576-*", "T32768-*"),
        percent,
    ),
    Goal(
        "cuda",
        "combine and momentum, inside `moe_mlp_momentum`",
        "share of copy bandwidth",
        0.85,
        nowhere,
        percent,
    ),
    Goal(
        "cuda",
        "RPC attention, N=197, n=4",
        "against `library`",
        3.0,
        speedup("rpc_attention", "library", VISION),
    ),
    Goal(
        "cuda",
        "RPC attention, N=197, n=4",
        "against `published`",
        8.0,
        speedup("rpc_attention", "published", VISION),
    ),
    Goal(
        "cuda",
        "RPC attention, N=197, n=4",
        "peak memory, in outputs",
        1.1,
        per("rpc_attention", "peak_bytes", attention_output, VISION),
        most=True,
        modes=FORWARD,
    ),
    Goal(
        "cuda",
        "RPC attention, N >= 1024",
        "times n x SDPA",
        1.15,
        slowdown("rpc_attention", "sdpa_per_iteration", *LONG),
        most=True,
        modes=FORWARD,
    ),
    Goal(
        "cuda",
        "RPC attention, N >= 1024",
        "times n x SDPA",
        1.25,
        slowdown("rpc_attention", "sdpa_per_iteration", *LONG),
        most=True,
        modes=STEP,
    ),
    Goal(
        "cuda",
        "layer mixing, a pair of blocks, up to 2048 tokens",
        "against two in sequence",
        1.6,
        two_blocks,
        modes=STEP,
    ),
    Goal(
        "cuda",
        "layer mixing, products of more tokens",
        "against `published`",
        1.0,
        speedup("layer_linear", "published", "G2-T8192-*", "G2-T4096-*"),
    ),
    Goal(
        "cuda",
        "layer mixing, products",
        "waits for the device",
        0,
        fact("layer_linear", "waits", "*"),
        count,
        most=True,
    ),
    Goal(
        "cuda",
        "CAMEx linear",
        "against `published`",
        3.0,
        speedup("camex_linear", "published", *BY_RANK),
    ),
    Goal(
        "cuda",
        "CAMEx linear",
        "exponent of memory over segments",
        0.1,
        growth("camex_linear", "S", "memory"),
        count,
        most=True,
    ),
    Goal(
        "cuda",
        "expert MLP",
        "kept for backward, in pre-activations",
        1.1,
        per("moe_mlp", "saved_bytes", pre_activation, *FIELD),
        most=True,
        modes=STEP,
    ),
    *(
        Goal(
            "cuda",
            f"accuracy, {op}",
            "error in multiples of PyTorch's",
            1.1,
            fact(op, "error", pattern),
            count,
            most=True,
            modes=modes,
        )
        for op, pattern, modes in SMOOTH
    ),
)

_CPU = (
    *(
        Goal(
            "cpu",
            "momentum, Adam, 3072 x 352",
            f"against `{name}`",
            least,
            speedup("momentum_update", name, ADAM),
        )
        for name, least in (("published", 8.0), ("compiled", 1.0))
    ),
    Goal(
        "cpu",
        "momentum, Adam, 8192 x 1024",
        "times three clones",
        1.2,
        slowdown("momentum_update", "three_clones", "T8192-D1024-adam"),
        most=True,
        modes=FORWARD,
    ),
    *(
        Goal(
            "cpu",
            "adaptive-clustering router, MAD, 8192 x 1024, 64 clusters",
            f"against `{name}`",
            least,
            speedup("ac_route", name, "T8192-D1024-E64-K2"),
        )
        for name, least in (("published", 4.0), ("compiled", 2.0))
    ),
    *(
        Goal(
            "cpu",
            "RPC attention, 197 x 64, 4 iterations",
            f"against `{name}`",
            least,
            speedup("rpc_attention", name, "B*-H3-N197-d64-n4"),
        )
        for name, least in (("published", 2.0), ("compiled", 1.1))
    ),
    *(
        Goal(
            "cpu",
            "CAMEx linear",
            f"against `{name}`",
            least,
            speedup("camex_linear", name, "*-ties"),
        )
        for name, least in (("published", 3.0), ("compiled", 1.5))
    ),
    Goal(
        "cpu",
        "pairwise statistics, 6144 x 352, where `published` needs 53 GB",
        "time",
        10.0,
        fact("ac_weights", "median_s", "T6144-*-pairwise"),
        seconds,
        most=True,
        modes=FORWARD,
    ),
)

GOALS = (*_GPU, *_CPU)
