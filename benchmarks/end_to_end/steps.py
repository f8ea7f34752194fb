"""The time of a whole training step with each implementation of the mixtures, measured in turn."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import spread, timing
from benchmarks.end_to_end.data import Text
from benchmarks.end_to_end.train import Trainer
from benchmarks.measure import FAILED, OK, SKIPPED, WRONG
from benchmarks.presets import TextPlan

CLOSE = 0.01  # how far the loss of one step may be from the reference's, relatively
PATHS = {"cpu": ("cpu", "reference", "published"), "cuda": ("triton", "reference", "published")}


def step_times(
    plan: TextPlan, text: Text, trainers: dict[str, Trainer], device: torch.device
) -> list[dict[str, Any]]:
    """Forward, backward and optimiser step at learning rate zero, by variant and implementation.

    An implementation whose loss is not the reference's is `wrong` and has no time. `published` is
    not held to that: it gives empty clusters another weight.
    """
    windows = text.batch(plan.batch, plan.context, torch.Generator().manual_seed(1)).to(device)
    entries: list[dict[str, Any]] = []
    calls = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for variant, trainer in trainers.items():
            expected = _call(trainer, "reference", windows)()
            for path in PATHS[device.type]:
                call = _call(trainer, path, windows)
                entry: dict[str, Any] = {"variant": variant, "impl": path}
                entry |= _try(call, path, expected)
                trainer.optimizer.zero_grad(set_to_none=True)
                entries.append(entry)
                if entry["status"] == OK:
                    calls[variant, path] = call
        clock = timing.clock_for(device)
        named = {" ".join(key): call for key, call in calls.items()}
        samples = timing.round_robin(named, clock, seconds=plan.step_seconds, min_rounds=5)
    for entry in entries:
        if taken := samples.get(f"{entry['variant']} {entry['impl']}"):
            entry["median_s"] = statistics.median(taken.values())
            base = samples.get(f"{entry['variant']} published", {})
            if entry["impl"] != "published" and (gain := spread.ratio(base, taken)):
                entry["versus"] = {"published": gain}
    for trainer in trainers.values():
        trainer.model.use(None)
    return entries


def _try(call: Callable[[], float], path: str, expected: float) -> dict[str, str]:
    """One step: its status, and the reason where it is not "ok"."""
    try:
        nats = call()
    except Exception as error:
        missing = path == "published" or isinstance(error, NotImplementedError)
        first = (str(error).strip() or "no message").splitlines()[0][:300]
        reason = f"{type(error).__name__}: {first}"
        return {"status": SKIPPED if missing else FAILED, "reason": reason}
    if path != "published" and not abs(nats - expected) <= CLOSE * expected:
        return {"status": WRONG, "reason": f"loss {nats:.4f}, the reference's is {expected:.4f}"}
    return {"status": OK}


def _call(trainer: Trainer, path: str, windows: torch.Tensor) -> Callable[[], float]:
    def call() -> float:
        trainer.model.use(path)
        return trainer.step(windows, 0.0).item()

    return call
