"""One text model with its optimiser."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end.model import BALANCE, ByteTransformer, build
from benchmarks.end_to_end.variants import Variant
from benchmarks.presets import TextPlan

NATS_PER_BIT = math.log(2.0)


class Trainer:
    """One model with its optimiser."""

    def __init__(self, plan: TextPlan, variant: Variant, seed: int, device: torch.device) -> None:
        self.model: ByteTransformer = build(plan, variant, seed, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.device = device
        self.size = 8 * plan.batch

    def step(self, windows: Tensor, rate: float) -> Tensor:
        """One step; the mean nats per character, still on the device."""
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
    def bits(self, windows: Tensor, counted: Tensor | None = None) -> float:
        """Bits per character, over all of the windows or those that are `counted`."""
        counted = torch.ones_like(windows, dtype=torch.bool) if counted is None else counted
        total = 0.0
        for part, weights in zip(windows.split(self.size), counted.split(self.size), strict=True):
            with precision(self.device):
                nats, _ = self.model(part.to(self.device).long())
            total += (nats.double() * weights[:, 1:].to(nats.device)).sum().item()
        return total / counted[:, 1:].sum().item() / NATS_PER_BIT


def precision(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast on a GPU, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
