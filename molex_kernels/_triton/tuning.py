"""Launch configurations: pinned per kernel and shape class, swept only on request.

A launcher names its kernel, its shape class, the pinned configuration and at most eight candidates.
`MOLEX_AUTOTUNE=1`, read at import, times the candidates once per shape class on a GPU and keeps the
fastest for the life of the process. Without it nothing is ever timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

AUTOTUNE = os.environ.get("MOLEX_AUTOTUNE") == "1"
MAX_CANDIDATES = 8


@dataclass(frozen=True)
class Config:
    """Block sizes (the kernel's constexprs) and Triton's launch options."""

    blocks: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 3

    def launch_options(self) -> dict[str, int | bool]:
        """Keyword arguments of the kernel launch.

        Multiply-adds are fused whatever Triton's default: its releases differ in it.
        """
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def aligned(*tensors: Tensor) -> bool:
    """Whether rows move 16 elements at a time: one unit stride, the others multiples of 16."""
    return all(
        t.data_ptr() % 16 == 0
        and sorted(t.stride())[0] <= 1
        and all(stride % 16 == 0 for stride in t.stride() if stride != 1)
        for t in tensors
    )


_chosen: dict[tuple[str, Hashable], Config] = {}


def choose(
    kernel: str,
    shape_class: Hashable,
    pinned: Config,
    candidates: Sequence[Config],
    launch: Callable[[Config], None],
    *,
    on_gpu: bool,
) -> Config:
    """The configuration for this launch: the pinned one, or the fastest when sweeping is on.

    `launch` runs the kernel with a configuration and must be safe to repeat.
    """
    if not (AUTOTUNE and on_gpu):
        return pinned
    key = (kernel, shape_class)
    if key not in _chosen:
        from triton.testing import do_bench

        tried = [pinned, *(c for c in candidates if c != pinned)][:MAX_CANDIDATES]
        times = [do_bench(lambda c=config: launch(c), return_mode="median") for config in tried]
        _chosen[key] = tried[times.index(min(times))]
    return _chosen[key]
