"""Two ranks with a part of the tokens each, as DTensors: results and gradients of the whole."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import molex_kernels as mk
from molex_kernels import _operators, _sharding

WHOLE = Replicate()


def _beside(x: Tensor, value: Tensor) -> Tensor:
    """The value as x is, on every rank."""
    return distribute_tensor(value, x.device_mesh, [WHOLE]) if isinstance(x, DTensor) else value


def _routed(x: Tensor, gate: Tensor) -> Tensor:
    routing = mk.topk_route(x, gate, top_k=2)
    return routing.logits * routing.expert_weight.sum(1, keepdim=True)


def _mixed(x: Tensor, gate: Tensor, prev: Tensor) -> Tensor:
    index = torch.arange(14).view(7, 2) % 3
    if isinstance(x, DTensor):
        index = distribute_tensor(index, x.device_mesh, [Shard(0)])
    return mk.ac_route(x, gate, index, prev.detach().sigmoid(), top_k=2, mix=True).logits


def _experts(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    index = _beside(x, torch.arange(14).view(7, 2) % 3)
    return mk.moe_mlp(x, index, weight, up, down)


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    return mk.grouped_gemm(x, weight, _beside(x, torch.tensor([2, 4, 7], dtype=torch.int32)))


def _permuted(x: Tensor) -> Tensor:
    return mk.permute(x, mk.route_plan(_beside(x, torch.arange(14).view(7, 2) % 4), 3))


def _unpermuted(rows: Tensor, weight: Tensor) -> Tensor:
    plan = mk.route_plan(_beside(rows, torch.arange(14).view(7, 2) % 4), 3)
    return mk.unpermute(rows, plan, weight)


def _chosen(logits: Tensor, bias: Tensor) -> Tensor:
    options = {"score": "sigmoid", "renormalize": True}
    routing = mk.route_from_logits(logits, top_k=2, expert_bias=bias, **options)
    again = mk.route_from_index(logits, routing.expert_index, score="softmax")
    return routing.expert_weight * again.expert_weight


def _layers(x: Tensor, weights: Tensor) -> Tensor:
    return mk.layer_linear(x, weights, _beside(x, torch.tensor([0, 2])))


def _update(rule: mk.Rule) -> Callable[..., Tensor]:
    def update(x: Tensor, f: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        state = (s,) if isinstance(rule, mk.HeavyBall) else (s, s * s)
        if isinstance(rule, mk.Mars):
            state = (*state, 0.5 * f.detach())
        return mk.momentum_update(x, f, state, rule, norm=(weight, None, 1e-5))[0]

    return update


# The function, the sizes and placements of its arguments, the placements of result and gradients:
# "sum" where every rank has a part of it.
CASES: dict[str, tuple[Any, ...]] = {
    "topk_route": (_routed, [(7, 4), (3, 4)], [0, None], [0, 0, "sum"]),
    "ac_route": (_mixed, [(7, 4), (3, 4), (7, 2)], [0, None, 0], [0, 0, "sum", 0]),
    "route_from_logits": (_chosen, [(7, 5), (5,)], [0, None], [0, 0, None]),
    "momentum_update": (
        _update(mk.HeavyBall(0.7)),
        [(7, 4), (7, 4), (7, 4), (4,)],
        [0, 0, 0, None],
        [0, 0, 0, 0, "sum"],
    ),
    "adam": (
        _update(mk.Adam()),
        [(7, 4), (7, 4), (7, 4), (4,)],
        [0, 0, 0, None],
        [0, 0, 0, 0, "sum"],
    ),
    "mars": (  # whose norms are over samples: four, two for each rank
        _update(mk.Mars()),
        [(4, 3, 5), (4, 3, 5), (4, 3, 5), (5,)],
        [0, 0, 0, None],
        [0, 0, 0, 0, "sum"],
    ),
    "layer_mix": (mk.layer_mix, [(2, 7, 4), (2,)], [1, None], [0, 1, "sum"]),
    "camex_linear": (
        mk.camex_linear,
        [(4, 3, 5), (6, 5), (2, 6, 5), (4, 2)],
        [0, None, None, 0],
        [0, 0, "sum", None, 0],
    ),
    "rpc_attention": (
        lambda k, v: mk.rpc_attention(k, v, num_iters=2, threshold=0.5),
        [(4, 2, 6, 8), (4, 2, 6, 8)],
        [0, 0],
        [0, 0, 0],
    ),
    "rpc_attention in 16 bits": (
        lambda k, v: mk.rpc_attention(k.bfloat16(), v.bfloat16(), num_iters=2, threshold=0.5),
        [(4, 2, 6, 8), (4, 2, 6, 8)],
        [0, 0],
        [0, 0, 0],
    ),
    # What all ranks have to have whole is brought there.
    "grouped_gemm": (_rows, [(7, 5), (3, 4, 5)], [0, 0], [None] * 3),
    "moe_mlp": (_experts, [(7, 4), (7, 2), (3, 6, 4), (3, 4, 6)], [0, 0, None, None], [None] * 5),
    "permute": (_permuted, [(7, 5)], [0], [None] * 2),
    "unpermute": (_unpermuted, [(14, 5), (7, 2)], [0, 0], [None] * 3),
    "router_z_loss": (mk.router_z_loss, [(7, 5)], [0], [None] * 2),
    "mars over one sample": (
        _update(mk.Mars()),
        [(8, 4), (8, 4), (8, 4), (4,)],
        [0, 0, 0, None],
        [None, None, None, 0, None],  # the state's is of its square, too, a product of shards
    ),
    "layer_linear": (_layers, [(2, 7, 5), (3, 6, 5)], [1, None], [None] * 3),
}


def _placement(dim: int | str | None) -> Placement:
    if dim is None:
        return WHOLE
    return Partial() if dim == "sum" else Shard(int(dim))


def _check(mesh: Any, function: Any, sizes: Any, given: Any, expected: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    whole = [t.clone().requires_grad_() for t in drawn]
    shared = [
        distribute_tensor(t, mesh, [_placement(dim)]).requires_grad_()
        for t, dim in zip(drawn, given, strict=True)
    ]
    results = []
    for leaves in (whole, shared):
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)])
    for place, (want, got) in enumerate(zip(*results, strict=True)):
        assert got.placements == (_placement(expected[place]),), (place, got.placements)
        torch.testing.assert_close(got.full_tensor(), want, rtol=1e-4, atol=1e-5)


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),  # a rank whose case fails leaves the other one waiting
    )
    mesh = init_device_mesh("cpu", (2,))
    for name, case in CASES.items():
        try:
            _check(mesh, *case)
        except Exception as error:
            Path(folder, f"{name}-{rank}").write_text(f"{type(error).__name__}: {error}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text for each rank and case that failed."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_the_whole(failures: Path, name: str):
    assert not [p.read_text() for p in sorted(failures.glob(f"{name}-*"))]


def test_rules_name_what_the_operators_have():
    operators = {o.name: o for o in _operators.OPERATORS}
    assert _sharding.RULES.keys() <= operators.keys()
