"""What the machine can do at best, measured in the same process as the ops."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import products
from benchmarks.formats import rate
from benchmarks.presets import dtype_name

ROUNDS = 12
LONGEST = 0.5  # seconds for them


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy (read and written both count), FLOP per second of a matmul.

    `matmuls` has the rate of each dtype that was tried, by name; `matmul` is the best of them.
    """

    copy: float
    matmul: float
    matmuls: Mapping[str, float] = field(default_factory=dict)

    def bound(self, num_bytes: int, flops: int) -> tuple[float, str]:
        """The shortest possible time in seconds, and which ceiling sets it."""
        memory, compute = num_bytes / self.copy, flops / self.matmul
        return (memory, "copy") if memory >= compute else (compute, "matmul")


def sentence(found: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """A run's ceilings in words: the copy, and the products of each dtype with what makes them."""
    copied = max(ceiling["copy"] for ceiling in found.values())
    rates: dict[str, float] = {}
    for ceiling in found.values():
        rates |= ceiling.get("matmuls", {})
    shown = []
    for name, value in sorted(rates.items(), key=lambda item: item[0] != "fp32"):
        by = facts.get(f"{name}_instructions")
        by = "no instructions" if by == products.NONE else by
        shown.append(f"{name} {rate(value * 1e-9)} GFLOP/s" + (f" ({by})" if by else ""))
    text = f"ceilings: copy {rate(copied * 1e-9)} GB/s"
    text += f"; products {', '.join(shown)}" if shown else ""
    slow = [name for name, value in rates.items() if value < rates.get("fp32", 0.0)]
    if slow:
        text += f"; {' and '.join(slow)} held against fp32"
    return text


@functools.cache
def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several runs each: a ceiling is what the machine reaches undisturbed.

    A CPU without products in the dtype can still make them in fp32.
    """
    dtypes = dict.fromkeys((dtype, torch.float32) if device.type == "cpu" else (dtype,))
    rates = {dtype_name(tried): _matmul_rate(device, tried) for tried in dtypes}
    return Ceilings(_copy_rate(device), max(rates.values()), rates)


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
