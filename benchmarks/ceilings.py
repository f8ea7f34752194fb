"""What the machine can do at best, measured in the same process as the ops."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROUNDS = 12
LONGEST = 0.5  # seconds for them


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy (read and written both count), FLOP per second of a matmul."""

    copy: float
    matmul: float

    def bound(self, num_bytes: int, flops: int) -> tuple[float, str]:
        """The shortest possible time in seconds, and which ceiling sets it."""
        memory, compute = num_bytes / self.copy, flops / self.matmul
        return (memory, "copy") if memory >= compute else (compute, "matmul")


@functools.cache
def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several runs each: a ceiling is what the machine reaches undisturbed.

    A CPU without products in the dtype can still make them in fp32.
    """
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    return Ceilings(_copy_rate(device), max(_matmul_rate(device, d) for d in dtypes))


@functools.cache
def _copy_rate(device: torch.device) -> float:
    length = 2**28 if device.type == "cuda" else 2**25
    source = torch.ones(length, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    num_bytes = 2 * source.numel() * source.element_size()
    return num_bytes / _best(lambda: target.copy_(source), device)


@functools.cache
def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Of the largest product that does not take long."""
    rate = 0.0
    for side in (8192,) if device.type == "cuda" else (192, 768, 1536):
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        if rate and 2 * side**3 / rate > LONGEST:
            break
        rate = 2 * side**3 / _best(functools.partial(torch.mm, a, b, out=out), device)
    return rate


def _best(call: Callable[[], object], device: torch.device) -> float:
    # A product in a dtype that the CPU lacks takes long: a few will do.
    times: list[float] = []
    while len(times) < ROUNDS and (len(times) < 3 or sum(times) < LONGEST):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
