"""`python -m benchmarks.end_to_end.images`: robust attention on real images.

Trains a small vision transformer on handwritten digits with each kind of attention, as `study.py`
says, and counts what it still recognises under noise, occlusion and an attack. Since that is what
the methods are for, settings are chosen by the mean over clean and corrupted validation digits;
none is trained on corrupted ones. Whatever comes out is reported. Needs scikit-learn.
"""

from __future__ import annotations

import functools
import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks.end_to_end import digits, part
from benchmarks.end_to_end.digits import Labelled
from benchmarks.end_to_end.study import Measure, Outcome, affordable_steps, fit, methods_of, study
from benchmarks.end_to_end.vit import METHODS, Attention, ViT
from benchmarks.presets import ImagesPlan

MEASURE = Measure(
    ("clean", "noise", "occlusion", "fgsm"), "percent recognised", 1, higher_is_better=True
)


class Trainer:
    """One model with its optimiser."""

    def __init__(
        self, plan: ImagesPlan, attention: Attention, seed: int, device: torch.device
    ) -> None:
        torch.manual_seed(seed)
        self.model = ViT(plan, attention).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.05, fused=True)

    def step(self, batch: Labelled, rate: float) -> None:
        """One step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        F.cross_entropy(self.model(batch.images), batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def recognised(self, data: Labelled) -> dict[str, float]:
        """The percentage of digits recognised, as they are and after each corruption."""
        images = data.images.clone().requires_grad_()
        loss = F.cross_entropy(self.model(images), data.labels)
        (gradient,) = torch.autograd.grad(loss, images)
        shown = (
            data.images,
            digits.noisy(data.images),
            digits.occluded(data.images),
            digits.attacked(data.images, gradient),
        )
        with torch.no_grad():
            right = [(self.model(x).argmax(1) == data.labels).double().mean().item() for x in shown]
        return {name: 100 * share for name, share in zip(MEASURE.metrics, right, strict=True)}


def run(plan: ImagesPlan, device: torch.device, console: Console) -> dict[str, Any]:
    """The whole run, as the report's data."""
    data = digits.load(device)
    kept = methods_of(plan, METHODS).values()
    trainers = [Trainer(plan, method.make(method.values[0]), 0, device) for method in kept]
    first = Labelled(*(tensor[: plan.batch] for tensor in data.train))
    calls = [functools.partial(trainer.step, first, 0.0) for trainer in trainers]
    steps = affordable_steps(plan, METHODS, calls, device)
    sizes = {name: len(getattr(data, name).labels) for name in ("train", "validation", "test")}
    console.print(f"images: {sizes['train']} digits to train on, {steps} steps")

    def train(attention: Attention, rate: float, seed: int, is_tested: bool) -> Outcome:
        trainer = Trainer(plan, attention, seed, device)
        generator = torch.Generator().manual_seed(seed)

        def step(rate: float) -> None:
            chosen = torch.randint(sizes["train"], (plan.batch,), generator=generator)
            trainer.step(Labelled(*(tensor[chosen] for tensor in data.train)), rate)

        def validate() -> float:
            return statistics.mean(trainer.recognised(data.validation).values())

        curve = fit(step, validate, steps, rate)
        return Outcome(curve, trainer.recognised(data.test) if is_tested else {})

    return study("images", plan, METHODS, train, MEASURE, console) | {"steps": steps} | sizes


if __name__ == "__main__":
    missing = "" if digits.available() else "scikit-learn is not installed"
    sys.exit(part.main("images", run, missing))
