"""The time of a whole training step with each implementation of the mixtures, measured in turn."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import timing
from benchmarks.end_to_end.data import Text
from benchmarks.end_to_end.model import Functions
from benchmarks.end_to_end.train import NATS_PER_BIT, Trainer
from benchmarks.presets import TextPlan

PATHS = {"cpu": ("cpu", "reference", "published"), "cuda": ("triton", "reference", "published")}


def step_times(
    plan: TextPlan, text: Text, trainers: dict[str, Trainer], device: torch.device
) -> list[dict[str, Any]]:
    """Forward, backward and optimiser step at learning rate zero, by router and implementation."""
    windows = text.batch(plan.batch, plan.context, torch.Generator().manual_seed(1)).to(device)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    calls = {}
    for router, trainer in trainers.items():
        for path in PATHS[device.type]:
            call = _call(trainer, path, windows)
            entry = found[router, path] = {"router": router, "impl": path, "status": "ok"}
            try:
                entry["bits"] = call() / NATS_PER_BIT
            except Exception as error:
                first = (str(error).strip() or "no message").splitlines()[0]
                entry |= {"status": "skipped", "reason": f"{type(error).__name__}: {first[:300]}"}
                trainer.optimizer.zero_grad(set_to_none=True)
                continue
            calls[f"{router} {path}"] = call
    clock = timing.clock_for(device)
    samples = timing.round_robin(calls, clock, seconds=plan.step_seconds, min_rounds=5)
    for (router, path), entry in found.items():
        if taken := samples.get(f"{router} {path}"):
            entry["median_s"] = statistics.median(taken)
            entry["samples"] = taken
    for trainer in trainers.values():
        trainer.model.use(None)
    return list(found.values())


def _call(trainer: Trainer, path: str, windows: torch.Tensor) -> Any:
    functions = Functions.of(path)

    def call() -> float:
        trainer.model.use(functions)
        return trainer.step(windows, 0.0).item()

    return call
