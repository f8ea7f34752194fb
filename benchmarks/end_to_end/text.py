"""`python -m benchmarks.end_to_end.text`: the methods on real text.

Trains a small transformer on the Python standard library's source, with plain mixtures and with
each variant of them, as `study.py` says; tests on clean text and on text with swapped words; then
measures the step time of each implementation. Whatever comes out is reported.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from rich.console import Console

from benchmarks.end_to_end import data, part
from benchmarks.end_to_end.steps import step_times
from benchmarks.end_to_end.study import Measure, Outcome, affordable_steps, fit, methods_of, study
from benchmarks.end_to_end.train import Trainer
from benchmarks.end_to_end.variants import METHODS, Variant
from benchmarks.formats import seconds
from benchmarks.presets import TextPlan

MEASURE = Measure(("clean", "swapped words"), "bits per character", 4, higher_is_better=False)


def run(plan: TextPlan, device: torch.device, console: Console) -> dict[str, Any]:
    """The whole run, as the report's data."""
    text = data.load(plan.context, plan.test_characters)
    swapped, untouched = data.contaminate(text.test)
    trainers = {
        name: Trainer(plan, method.make(method.values[0]), 0, device)
        for name, method in methods_of(plan, METHODS).items()
    }
    windows = text.batch(plan.batch, plan.context, torch.Generator().manual_seed(0)).to(device)
    calls = [functools.partial(trainer.step, windows, 0.0) for trainer in trainers.values()]
    steps = affordable_steps(plan, METHODS, calls, device)
    console.print(f"text: {len(text.train) / 1e6:.1f} M characters to train on, {steps} steps")

    def train(variant: Variant, rate: float, seed: int, is_tested: bool) -> Outcome:
        trainer = Trainer(plan, variant, seed, device)
        generator = torch.Generator().manual_seed(seed)

        def step(rate: float) -> None:
            trainer.step(text.batch(plan.batch, plan.context, generator).to(device), rate)

        curve = fit(step, lambda: trainer.bits(text.validation), steps, rate)
        if not is_tested:
            return Outcome(curve)
        bits = trainer.bits(text.test), trainer.bits(swapped, untouched)
        return Outcome(curve, dict(zip(MEASURE.metrics, bits, strict=True)))

    found = study("text", plan, METHODS, train, MEASURE, console)
    times = step_times(plan, text, trainers, device)
    for entry in times:
        took = seconds(entry["median_s"]) if "median_s" in entry else entry["reason"]
        console.print(f"step {entry['variant']:<10} {entry['impl']:<10} {took}")
    parameters = {
        name: sum(p.numel() for p in trainer.model.parameters())
        for name, trainer in trainers.items()
    }
    return found | {
        "steps": steps,
        "parameters": parameters,
        "files": text.files,
        "train": len(text.train),
        "validation": text.validation[:, 1:].numel(),
        "test": text.test[:, 1:].numel(),
        "step_times": times,
    }


if __name__ == "__main__":
    sys.exit(part.main("text", run))
