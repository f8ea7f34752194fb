"""Small made-up runs of the benchmarks, and a small op."""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks import rows
from molex_kernels.testing.opinfo import Case, Cost, OpInfo, Sweep

FACTS = {
    "date": "2026-01-02 03:04 UTC", "commit": "0123456789", "device": "cpu", "chip": "Some Chip",
    "cpu": "Some Chip", "cores": 2, "threads": 2, "load": 0.0, "memory_gib": 8, "python": "3.11",
    "torch": "2", "triton": "3", "system": "Linux",
}  # fmt: skip


def row(impl: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    kind = rows.BASELINE if impl in rows.BASELINES else rows.OURS
    found: dict[str, Any] = {
        "op": "momentum_update", "shape": "T3072-D352-adam", "sizes": {"T": 3072, "D": 352},
        "sweep": "", "dtype": "fp32", "device": "cpu", "impl": impl, "kind": kind,
        "mode": "forward", "bytes": 1000, "flops": 500, "status": "ok", "reason": "",
    }  # fmt: skip
    if seconds is None:
        return found | {"status": "wrong", "reason": "y: error 3 > 1"} | more
    rates = {"gb_per_s": 1e-6 / seconds, "gflop_per_s": 5e-7 / seconds}
    timed = {"median_s": seconds, "ceiling": "copy", "share": 0.5, "peak_bytes": 4096}
    return found | timed | rates | more


def run(*found: dict[str, Any], sweeps: tuple[dict[str, Any], ...] = (), **more: Any) -> Any:
    run = {
        "preset": "quick", "environment": dict(FACTS), "rows": list(found), "sweeps": list(sweeps),
        "ceilings": {"fp32": {"copy": 1e10, "matmul": 1e11}},
    }  # fmt: skip
    # As it comes back from a file.
    return json.loads(json.dumps(run | more))


def against(gains: dict[str, tuple[float, float, float]], **more: Any) -> dict[str, Any]:
    return row("cpu", 1e-3, versus=gains, **more)


def pair(published: float, width: float = 0.02, **more: Any) -> list[dict[str, Any]]:
    interval = (published, published * (1 - width), published * (1 + width))
    ours = against({"published": interval, "compiled": interval}, **more)
    return [ours, *(row(n, 1e-3 * published, **more) for n in ("published", "compiled"))]


def _scale(x: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    if impl not in (None, "reference"):
        raise ValueError(impl)
    return 2 * x


def scale_op(**baselines: Any) -> OpInfo:
    case = Case({"T": 64, "D": 8})
    return OpInfo(
        name="scale",
        function=_scale,
        make=lambda case, dtype, device, generator: {
            "x": torch.randn(*case.sizes.values(), generator=generator).to(dtype)
        },
        results=lambda y: {"y": y},
        differentiable=("x",),
        tests=(),
        benchmarks=(case,),
        quick=(case,),
        cost=lambda case, dtype, backward: Cost(case.sizes["T"] * 64, case.sizes["T"]),
        baselines=baselines,
        proxies={"copy": lambda x: x.clone()},
        quick_sweeps=(Sweep("T", tuple(Case({"T": t, "D": 8}) for t in (16, 32))),),
    )
