"""Times calls side by side: round after round, each in turn, so that drift hits all alike."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

Call = Callable[[], object]

MAX_ROUNDS = 200
FEWEST_ROUNDS = 3
PATIENCE = 5  # times the given seconds, after which the fewest rounds are enough
SHORTEST_SAMPLE = 1e-3  # seconds on a CPU: shorter calls are repeated within a sample


class Clock(Protocol):
    """Seconds per call."""

    def sample(self, call: Call, repeats: int) -> float: ...


class CpuClock:
    """Wall-clock time on the CPU."""

    def sample(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaClock:
    """CUDA events around one call, with the L2 cache overwritten before it.

    `launches=True` waits for the device first, so the time includes every launch gap.
    `launches=False` queues the call behind the overwriting, which hides the launch of a CUDA graph.
    """

    def __init__(self, device: torch.device, *, launches: bool) -> None:
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 2**26
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)
        self._device = device
        self._launches = launches

    def sample(self, call: Call, repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.fill_(1)
            if self._launches:
                torch.cuda.synchronize(self._device)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(self._device)
            total += start.elapsed_time(end) * 1e-3
        return total / repeats


def clock_for(device: torch.device, *, launches: bool = True) -> Clock:
    """The clock of this device."""
    return CudaClock(device, launches=launches) if device.type == "cuda" else CpuClock()


def round_robin(
    calls: Mapping[str, Call], clock: Clock, *, seconds: float, min_rounds: int
) -> dict[str, dict[int, float]]:
    """Samples of every call, in seconds per call, by the round in which they were taken.

    Each call has an equal part of `seconds` and at least `min_rounds` samples; a slow call takes
    part in fewer rounds, evenly spread. The order within a round is shuffled with a fixed seed.
    Where that takes much longer than `seconds`, it ends with three samples of each call.
    """
    if not calls:
        return {}
    repeats: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for name, call in calls.items():
        estimate = max(min(clock.sample(call, 1) for _ in range(2)), 1e-7)
        repeats[name] = math.ceil(SHORTEST_SAMPLE / estimate) if isinstance(clock, CpuClock) else 1
        rounds = int(seconds / len(calls) / (estimate * repeats[name]))
        wanted[name] = min(max(rounds, min_rounds), MAX_ROUNDS)
    rounds = max(wanted.values())
    samples: dict[str, dict[int, float]] = {name: {} for name in calls}
    order = random.Random(0)
    latest = time.monotonic() + PATIENCE * seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(1, rounds + 1):
            if time.monotonic() > latest and min(map(len, samples.values())) >= FEWEST_ROUNDS:
                break
            due = [n for n in calls if index * wanted[n] // rounds > len(samples[n])]
            order.shuffle(due)
            for name in due:
                samples[name][index] = clock.sample(calls[name], repeats[name])
    finally:
        if collecting:
            gc.enable()
    return samples
