"""`python -m benchmarks.end_to_end.images`: robust attention on real images.

Trains a small vision transformer on handwritten digits, once with each kind of attention, from the
same seeds on the same batches for the same number of steps; then counts what it still recognises
under noise, occlusion and an attack. Whatever comes out is reported. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks import environment, presets, terminal
from benchmarks.end_to_end import digits
from benchmarks.end_to_end.digits import Digits
from benchmarks.end_to_end.verdict import mean_and_error
from benchmarks.end_to_end.vit import ATTENTIONS, BASE, Attention, ViT
from benchmarks.presets import ImagesPlan

TESTS = ("clean", "noise", "occlusion", "fgsm")
PEAK_RATE = 2e-3
WARMUP = 0.1


class Trainer:
    """One model with its optimiser."""

    def __init__(
        self, plan: ImagesPlan, attention: Attention, seed: int, steps: int, device: torch.device
    ) -> None:
        torch.manual_seed(seed)
        self.model = ViT(plan, attention).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, PEAK_RATE, total_steps=steps, pct_start=WARMUP
        )

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step; the loss, still on the device."""
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def accuracies(self, data: Digits) -> dict[str, float]:
        """The share of held-out digits recognised, as they are and after each corruption."""
        self.model.eval()
        images = data.test.clone().requires_grad_()
        loss = F.cross_entropy(self.model(images), data.test_labels)
        (gradient,) = torch.autograd.grad(loss, images)
        shown = {
            "clean": data.test,
            "noise": digits.noisy(data.test),
            "occlusion": digits.occluded(data.test),
            "fgsm": digits.attacked(data.test, gradient),
        }
        with torch.no_grad():
            return {
                name: (self.model(x).argmax(1) == data.test_labels).double().mean().item()
                for name, x in shown.items()
            }


def run(plan: ImagesPlan, device: torch.device, console: Console) -> dict[str, Any]:
    """The whole run, as the report's data."""
    data = digits.load(device)
    steps = _affordable_steps(plan, data, device)
    console.print(
        f"images: {len(data.train)} digits to train on, {len(data.test)} held out, {steps} steps"
    )
    runs: list[dict[str, Any]] = []
    with terminal.training_bar("images", console) as bar:
        task = bar.add_task("", total=steps * len(plan.seeds))
        for seed in plan.seeds:
            trainers = {
                name: Trainer(plan, kind, seed, steps, device) for name, kind in ATTENTIONS.items()
            }
            generator = torch.Generator().manual_seed(seed)
            for index in range(steps):
                chosen = torch.randint(len(data.train), (plan.batch,), generator=generator)
                batch = data.train[chosen], data.train_labels[chosen]
                losses = {name: trainer.step(*batch) for name, trainer in trainers.items()}
                if index % 20 == 0:
                    shown = ", ".join(f"{n} {loss.item():.2f}" for n, loss in losses.items())
                    bar.update(task, description=f"loss: {shown}")
                bar.advance(task)
            for name, trainer in trainers.items():
                runs.append({"variant": name, "seed": seed, **trainer.accuracies(data)})
    return {
        "plan": dataclasses.asdict(plan),
        "base": BASE,
        "labels": {name: kind.label for name, kind in ATTENTIONS.items()},
        "steps": steps,
        "train": len(data.train),
        "test": len(data.test),
        "runs": runs,
        "environment": environment.describe(device),
    }


def _affordable_steps(plan: ImagesPlan, data: Digits, device: torch.device) -> int:
    """How many steps of all models fit into the plan's time, measured on this machine."""
    trainers = [Trainer(plan, kind, 0, 100, device) for kind in ATTENTIONS.values()]
    batch = data.train[: plan.batch], data.train_labels[: plan.batch]
    times = []
    for _ in range(6):
        start = time.perf_counter()
        for trainer in trainers:
            trainer.step(*batch).item()
        times.append(time.perf_counter() - start)
    return max(min(plan.max_steps, int(plan.seconds / len(plan.seeds) / min(times))), 20)


def summary(images: dict[str, Any]) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """Per variant, the mean accuracy of each test and its standard error between seeds."""
    found = []
    for name, label in images["labels"].items():
        mine = [r for r in images["runs"] if r["variant"] == name]
        found.append((label, {t: mean_and_error([r[t] for r in mine]) for t in TESTS}))
    return found


def verdict(images: dict[str, Any]) -> list[str]:
    """What came out against softmax attention, paired by seed, and what it allows to say."""
    by_name = {(r["variant"], r["seed"]): r for r in images["runs"]}
    base = images["base"]
    seeds = sorted({r["seed"] for r in images["runs"]})
    lines = []
    for name, label in images["labels"].items():
        if name == base:
            continue
        shown = []
        for test in TESTS:
            gaps = [by_name[name, s][test] - by_name[base, s][test] for s in seeds]
            mean, error = mean_and_error([100 * gap for gap in gaps])
            shown.append(f"{mean:+.1f} +- {error:.1f} {test}")
        lines.append(f"{label} minus {images['labels'][base]}: {', '.join(shown)}")
    return [
        *lines,
        f"Percentage points of {images['test']} held-out digits; the error is between "
        f"{len(seeds)} seeds. These are tiny images and models: it shows that the methods train "
        "and how they compare here, not what they do on photographs.",
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="quick")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else presets.default_device()
    console = terminal.console()
    if not digits.available():
        console.print("images: left out, scikit-learn is not installed")
        return 0
    results = run(presets.PRESETS[options.preset].images, device, console)
    for label, accuracies in summary(results):
        shown = ", ".join(f"{100 * a:.1f}% {test}" for test, (a, _) in accuracies.items())
        console.print(f"{label}: {shown}")
    for line in verdict(results):
        console.print(line)
    if options.json:
        options.json.write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
