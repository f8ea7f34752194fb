"""Trains all variants side by side: the same bytes, the same steps, turn by turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end.data import Text, contaminate
from benchmarks.end_to_end.model import BALANCE, ByteTransformer, build
from benchmarks.end_to_end.variants import VARIANTS, Variant
from benchmarks.end_to_end.verdict import mean_and_error
from benchmarks.presets import TextPlan

PEAK_RATE = 3e-3
WARMUP = 0.1
CURVE_EVERY = 8  # curves are evaluated on every eighth validation window, the end on all of them
NATS_PER_BIT = math.log(2.0)

Report = Callable[[int, dict[str, float]], None]


@dataclass
class Run:
    """One variant with one seed. Curves are [step, bits per byte]."""

    seed: int
    variant: str
    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    final: list[float] = field(default_factory=list)  # bits per byte of each validation window
    swapped: list[float] = field(default_factory=list)  # of its untouched bytes, words swapped

    def summary(self) -> dict[str, Any]:
        """What goes into the JSON."""
        mean, error = mean_and_error(self.final)
        swapped, swapped_error = mean_and_error(self.swapped)
        return {
            "seed": self.seed,
            "variant": self.variant,
            "train": self.train,
            "validation": self.validation,
            "final": mean,
            "final_error": error,
            "swapped": swapped,
            "swapped_error": swapped_error,
        }


class Trainer:
    """One model with its optimiser."""

    def __init__(self, plan: TextPlan, variant: Variant, seed: int, device: torch.device) -> None:
        self.model: ByteTransformer = build(plan, variant, seed, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.device = device

    def step(self, windows: Tensor, rate: float) -> Tensor:
        """One step; the mean nats per byte, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with precision(self.device):
            nats, balance = self.model(windows)
        (nats.mean() + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return nats.detach().mean()

    @torch.no_grad()
    def evaluate(self, windows: Tensor, size: int, counted: Tensor | None = None) -> list[float]:
        """Bits per byte of each window, over all its bytes or those that are `counted`."""
        bits = []
        for start in range(0, len(windows), size):
            part = windows[start : start + size].to(self.device).long()
            with precision(self.device):
                nats, _ = self.model(part)
            weights = torch.ones_like(nats)
            if counted is not None:
                weights = counted[start : start + size, 1:].to(nats)
            bits.append((nats * weights).sum(1) / weights.sum(1).clamp_min(1) / NATS_PER_BIT)
        return torch.cat(bits).tolist()


def precision(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast on a GPU, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def affordable_steps(plan: TextPlan, text: Text, device: torch.device) -> int:
    """How many steps of all variants fit into the plan's time, measured on this machine."""
    trainers = [Trainer(plan, variant, 0, device) for variant in VARIANTS.values()]
    batch = text.batch(plan.batch, plan.context, torch.Generator().manual_seed(0)).to(device)
    windows = text.validation[: 2 * plan.batch]

    def step() -> None:
        for trainer in trainers:
            trainer.step(batch, 0.0).item()

    def evaluate() -> None:
        for trainer in trainers:
            trainer.evaluate(windows, len(windows))

    evaluated = len(text.validation) * (2 + (plan.evaluations + 1) / CURVE_EVERY)
    evaluating = _shortest(evaluate) * evaluated / len(windows)
    steps = int((plan.seconds / len(plan.seeds) - evaluating) / _shortest(step))
    return max(min(plan.max_steps, steps) // plan.evaluations, 1) * plan.evaluations


def _shortest(call: Callable[[], None], repeats: int = 5) -> float:
    # The shortest of several: one disturbance must not decide how long the models train.
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def train(
    plan: TextPlan, text: Text, steps: int, seed: int, device: torch.device, report: Report
) -> tuple[list[Run], dict[str, Trainer]]:
    """All variants from one seed."""
    trainers = {name: Trainer(plan, v, seed, device) for name, v in VARIANTS.items()}
    runs = {name: Run(seed, name) for name in VARIANTS}
    generator = torch.Generator().manual_seed(seed)
    every = steps // plan.evaluations
    for index in range(steps):
        windows = text.batch(plan.batch, plan.context, generator).to(device)
        rate = learning_rate(index, steps)
        losses = {name: trainer.step(windows, rate) for name, trainer in trainers.items()}
        bits = {name: loss.item() / NATS_PER_BIT for name, loss in losses.items()}
        for name, run in runs.items():
            run.train.append((index + 1, bits[name]))
            if index == 0 or (index + 1) % every == 0:
                sample = trainers[name].evaluate(text.validation[::CURVE_EVERY], 2 * plan.batch)
                run.validation.append((index + 1, sum(sample) / len(sample)))
        report(index + 1, bits)
    swapped, untouched = contaminate(text.validation)
    for name, run in runs.items():
        run.final = trainers[name].evaluate(text.validation, 2 * plan.batch)
        run.swapped = trainers[name].evaluate(swapped, 2 * plan.batch, untouched)
    return list(runs.values()), trainers


def learning_rate(index: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warm = max(int(WARMUP * steps), 1)
    if index < warm:
        return PEAK_RATE * (index + 1) / warm
    done = (index - warm) / max(steps - warm, 1)
    return PEAK_RATE * (0.55 + 0.45 * math.cos(math.pi * done))
