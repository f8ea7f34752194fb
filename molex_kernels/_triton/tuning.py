"""Launch configurations: pinned per kernel, chip and shape class, swept only on request.

`MOLEX_AUTOTUNE=1`, read at import, times a short list of candidates once per shape class on a GPU
and keeps the fastest, for later processes too (see `winners`). Without it nothing is ever timed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from molex_kernels._triton import winners

AUTOTUNE = os.environ.get("MOLEX_AUTOTUNE") == "1"
MAX_CANDIDATES = 8


@dataclass(frozen=True)
class Config:
    """Block sizes (the kernel's constexprs) and Triton's launch options."""

    blocks: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None  # of a thread, so that more blocks fit; not on AMD's chips

    def launch_options(self) -> dict[str, int | bool]:
        """Keyword arguments of the kernel launch.

        Multiply-adds are fused whatever Triton's default: its releases differ in it.
        """
        options: dict[str, int | bool] = {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


Options = tuple[Config, tuple[Config, ...]]  # the pinned configuration, and what a sweep tries


# For the functions of sizes that give them: a launch asks at every call.
kept = functools.lru_cache(maxsize=1024)


def around(pinned: Config, *, warps: Sequence[int] = (), stages: Sequence[int] = ()) -> Options:
    """The pinned configuration, and the same tile with other warps and stages."""
    other = [replace(pinned, num_warps=n) for n in warps]
    other += [replace(pinned, num_stages=n) for n in stages]
    return pinned, tuple(other)


def aligned(*tensors: Tensor) -> bool:
    """Whether rows move 16 elements at a time: one unit stride, the others multiples of 16."""
    return all(t.data_ptr() % 16 == 0 and _moves(t.stride()) for t in tensors)


@kept
def _moves(strides: tuple[int, ...]) -> bool:
    return min(strides) <= 1 and all(stride == 1 or stride % 16 == 0 for stride in strides)


_chosen: dict[str, Config] = {}


def choose(
    shape_class: str,
    options: Options,
    start: Callable[[Config], None],
    device: torch.device,
    updates: Sequence[Tensor | None] = (),
) -> Config:
    """The configuration for this launch: the pinned one, or the fastest when sweeping is on.

    Args:
        shape_class: What the result is kept under; it names the kernel and its source.
        options: The pinned configuration and the candidates, of which MAX_CANDIDATES are tried.
        start: Runs the kernel with a configuration.
        device: Where it runs; nothing is timed but on a GPU.
        updates: Tensors that a repeated start would change: they are left as they were.
    """
    pinned, candidates = options
    if not (AUTOTUNE and device.type == "cuda"):
        return pinned
    tried = [pinned, *(c for c in candidates if c != pinned)][:MAX_CANDIDATES]
    if len(tried) == 1:
        return pinned
    key = f"{winners.platform(device)} | {shape_class}"
    if key not in _chosen:
        known = winners.load().get(key)
        best = next((c for c in tried if _entry(c) == known), None)
        if best is None:
            before = [(t, t.clone()) for t in updates if t is not None]
            times = [_milliseconds(start, config) for config in tried]
            for tensor, value in before:
                tensor.copy_(value)
            best = tried[times.index(min(times))]
            winners.keep(key, _entry(best))
        _chosen[key] = best
    return _chosen[key]


def _entry(config: Config) -> dict[str, object]:
    """The configuration as it stands in the file."""
    entry = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.max_registers is not None:
        entry["max_registers"] = config.max_registers
    return {**config.blocks, **entry}


def _milliseconds(start: Callable[[Config], None], config: Config) -> float:
    """Infinite where the chip has not the registers or the shared memory."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: start(config), return_mode="median")
    except OutOfResources:
        return float("inf")
