"""Host time: from the entry of a public function to the driver's last launch call, without a GPU.

    python -m benchmarks.host_time [--against COMMIT] [--rounds N]

Checks, allocations and the plan are part of it, the driver's own time is not. With a commit, both
are measured in turn, in processes of their own, and the shortest round of each is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CALLS = 5  # in a sample
SAMPLES = 100  # in a round; the shortest counts


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="measured in turn with these files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure()))
        return
    with tempfile.TemporaryDirectory() as folder:
        trees = {"now": ROOT}
        if options.against:
            archive = subprocess.run(
                ["git", "archive", options.against, "molex_kernels"],
                cwd=ROOT,
                check=True,
                capture_output=True,
            )
            subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
            trees["before"] = Path(folder)
        found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in trees}
        for _ in range(options.rounds):
            for name, tree in trees.items():
                found[name].append(_round(tree))
    for call, (_, launches) in found["now"][0].items():
        best = {name: min(r[call][0] for r in rounds) * 1e6 for name, rounds in found.items()}
        line = f"{call:32} {launches:3.0f} launches  {best['now']:5.0f} us"
        if "before" in best:
            line += f"  before {best['before']:5.0f} us: {best['now'] / best['before']:.2f}"
        print(line)


def _round(tree: Path) -> dict[str, list[float]]:
    """One round in a process of its own, with the package of that tree and these benchmarks."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.host_time", "--measure"],
        cwd=tree,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _measure() -> dict[str, list[float]]:
    """Seconds and launches of each call."""
    from benchmarks import fake_gpu

    driver = fake_gpu.install()
    found = {}
    for name, call in _calls().items():
        call()
        driver.count = 0
        call()
        launches = float(driver.count)
        found[name] = [_seconds(call), launches]
    return found


def _seconds(call: Callable[[], object]) -> float:
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS)
    return min(samples)


def _calls() -> dict[str, Callable[[], object]]:
    """The layers of the papers' sizes: T 3072, D 352, 16 experts of 352, the best 2."""
    import torch

    import molex_kernels as mk

    tokens, width, experts, top_k = 3072, 352, 16, 2
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(torch.bfloat16)

    x, gate = drawn(tokens, width), drawn(experts, width)
    w_up, w_down = drawn(experts, width, width), drawn(experts, width, width)
    leaves = [t.clone().requires_grad_() for t in (x, gate, w_up, w_down)]
    f = drawn(tokens, width)
    index = torch.randint(0, experts, (tokens, top_k), generator=generator)
    weight = torch.rand(tokens, top_k, generator=generator)
    plan = mk.route_plan(index, experts)
    k, v = drawn(2, 6, 197, 64), drawn(2, 6, 197, 64)
    pair, layers, two = drawn(2, 512, width), drawn(4, width, width), torch.tensor([1, 2])
    rule = mk.HeavyBall(0.7)
    state = (torch.zeros(tokens, width),)

    def layer(x: Any, gate: Any, w_up: Any, w_down: Any) -> torch.Tensor:
        mk.topk_route(x, gate, top_k=top_k)  # whose outputs no kernel has filled
        plan = mk.route_plan(index, experts)
        return mk.moe_mlp(x, index, weight, w_up, w_down, plan=plan)

    def step() -> None:
        torch.autograd.grad(layer(*leaves), [leaves[0], *leaves[2:]], f)

    return {
        "topk_route": lambda: mk.topk_route(x, gate, top_k=top_k),
        "route_plan": lambda: mk.route_plan(index, experts),
        "moe_mlp, with the plan": lambda: mk.moe_mlp(x, index, weight, w_up, w_down, plan=plan),
        "MoE layer, forward": lambda: layer(x, gate, w_up, w_down),
        "MoE layer, forward and backward": step,
        "ac_route": lambda: mk.ac_route(x, gate, index, top_k=top_k),
        "layer_linear, a pair": lambda: mk.layer_linear(pair, layers, two),
        "momentum_update": lambda: mk.momentum_update(x, f, state, rule),
        "rpc_attention, 4 iterations": lambda: mk.rpc_attention(
            k, v, num_iters=4, lam=1.0, impl="triton"
        ),
    }


if __name__ == "__main__":
    main()
