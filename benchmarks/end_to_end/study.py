"""Methods beside a baseline: settings are chosen on validation data, compared on test data.

The baseline's learning rate is chosen first and used for all. Then each method is trained with
every value of its one knob, the published one first, and the best by validation is its tuned one.
One seed does that, which the comparison does not use. Then the baseline and each method, as
published and as tuned, are trained from every seed of the plan on the same batches, and tested.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console

from benchmarks import terminal
from benchmarks.presets import TrainingPlan

V = TypeVar("V")

TUNING_SEED = 1000
EVALUATIONS = 4  # points of a validation curve, so that the last quarter is from one to the next
EVALUATING = 0.2  # share of the time that they and the test may take
WARMUP = 0.1


@dataclass(frozen=True)
class Method(Generic[V]):
    """`make` gives what is trained, with the knob at a value.

    `values`: the published one first, then what is tried beside it; of the baseline, its rates.
    """

    label: str
    make: Callable[[float], V]
    knob: str = ""
    values: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class Measure:
    """What is compared: `metrics` of the test, in this unit."""

    metrics: tuple[str, ...]
    unit: str
    digits: int
    higher_is_better: bool


@dataclass(frozen=True)
class Outcome:
    """One model, trained: validation by step, the test's metrics, and other facts."""

    curve: list[tuple[int, float]]
    test: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)


# (what is trained, learning rate, seed, whether it is tested) -> what came out.
Train = Callable[[V, float, int, bool], Outcome]


def methods_of(plan: TrainingPlan, methods: dict[str, Method[V]]) -> dict[str, Method[V]]:
    """Those that the plan has."""
    return {name: method for name, method in methods.items() if name not in plan.left_out}


def study(
    name: str,
    plan: TrainingPlan,
    methods: dict[str, Method[V]],
    train: Train[V],
    measure: Measure,
    console: Console,
) -> dict[str, Any]:
    """Trains everything; the part of the report's data that all parts have. The first is the base.

    A learning rate or a setting at which training diverges has no finite score, and is not chosen.
    """
    sign = 1 if measure.higher_is_better else -1
    kept = methods_of(plan, methods)
    base = next(iter(methods))
    tried: dict[str, list[tuple[float, float]]] = {}
    runs: list[dict[str, Any]] = []
    with terminal.training_bar(name, console) as bar:
        task = bar.add_task("", total=count(plan, methods))

        def one(key: str, value: float, rate: float, seed: int = TUNING_SEED) -> Outcome:
            method = kept[key]
            knob = f", {method.knob} {value:g}" if method.knob else ""
            shown = f"{method.label}{knob}, seed {seed}"
            bar.update(task, description=shown)
            start = time.perf_counter()
            outcome = train(method.make(value), rate, seed, seed != TUNING_SEED)
            bar.advance(task)
            if not console.is_terminal:
                took = time.perf_counter() - start
                console.print(f"{name}: {shown}: {outcome.curve[-1][1]:.4f} in {took:.0f} s")
            return outcome

        def tuned(key: str, rate: float | None = None) -> float:
            values = kept[key].values
            if not plan.tuning or len(values) == 1:
                return values[0]
            tried[key] = [(v, one(key, v, rate or v).curve[-1][1]) for v in values]
            finite = [pair for pair in tried[key] if math.isfinite(pair[1])]
            return max(finite or tried[key][:1], key=lambda pair: sign * pair[1])[0]

        rate = tuned(base)
        chosen = {key: rate if key == base else tuned(key, rate) for key in kept}
        for seed in plan.seeds:
            for key, method in kept.items():
                settings = (rate,) if key == base else (method.values[0], chosen[key])
                for value in dict.fromkeys(settings):
                    outcome = one(key, value, rate, seed)
                    made = {"variant": key, "value": value, "seed": seed}
                    runs.append(made | dataclasses.asdict(outcome))
    return {
        "plan": dataclasses.asdict(plan),
        "base": base,
        "measure": dataclasses.asdict(measure),
        "labels": {key: method.label for key, method in methods.items()},
        "knobs": {key: method.knob for key, method in methods.items()},
        "published": {key: method.values[0] for key, method in methods.items()},
        "tried": tried,
        "chosen": chosen,
        "runs": runs,
    }


def count(plan: TrainingPlan, methods: dict[str, Method[V]]) -> int:
    """How many models are trained, at most."""
    _, *others = kept = [*methods_of(plan, methods).values()]
    tuning = sum(len(m.values) for m in kept if plan.tuning and len(m.values) > 1)
    settings = 1 + sum(2 if plan.tuning and len(m.values) > 1 else 1 for m in others)
    return tuning + settings * len(plan.seeds)


def affordable_steps(
    plan: TrainingPlan,
    methods: dict[str, Method[V]],
    calls: list[Callable[[], Any]],
    device: torch.device,
) -> int:
    """How many steps of every run fit into the plan's time; each call is one step of a method."""
    step = sum(_shortest(call, device) for call in calls) / len(calls)
    steps = int((1 - EVALUATING) * plan.seconds / count(plan, methods) / step)
    return max(min(plan.max_steps, steps) // EVALUATIONS, 1) * EVALUATIONS


def _shortest(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    # What else runs on the machine must not decide how long the models train: the shortest of
    # several, and on a CPU the time of this thread, which waits for the others by spinning.
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def fit(
    step: Callable[[float], Any], validate: Callable[[], float], steps: int, peak: float
) -> list[tuple[int, float]]:
    """Takes the steps, each at its learning rate; the validation curve."""
    curve = []
    for index in range(steps):
        step(learning_rate(index, steps, peak))
        if (index + 1) % (steps // EVALUATIONS) == 0:
            curve.append((index + 1, validate()))
    return curve


def learning_rate(index: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warm = max(int(WARMUP * steps), 1)
    if index < warm:
        return peak * (index + 1) / warm
    done = (index - warm) / max(steps - warm, 1)
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))
