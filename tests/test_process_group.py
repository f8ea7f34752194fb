"""Data-parallel ranks that share their cluster statistics route as one process would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import DEVICE

import molex_kernels as mk

E, D, K = 4, 12, 2


def _inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, D, generator=generator)
    gate = torch.randn(E, D, generator=generator)
    prev_index = torch.rand(40, E, generator=generator).argsort(1)[:, :K]
    prev_weight = torch.rand(40, K, generator=generator)
    return tuple(t.to(DEVICE) for t in (x, gate, prev_index, prev_weight))


def _worker(rank: int, folder: str, split: int, stat: str, impl: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, gate, prev_index, prev_weight = _inputs()
    mine = slice(0, split) if rank == 0 else slice(split, None)
    routing = mk.ac_route(
        x[mine],
        gate,
        prev_index[mine],
        prev_weight[mine],
        top_k=K,
        mix=True,
        stat=stat,
        process_group=dist.group.WORLD,
        impl=impl,
    )
    torch.save(routing.logits.cpu(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("stat", "split", "impl"),
    [("mad", 13, "reference"), ("mad", 0, "triton"), ("variance", 13, "triton")],
    ids=["uneven", "one rank without tokens", "variance"],
)
def test_two_ranks_route_as_one(tmp_path: Path, stat: str, split: int, impl: str):
    mp.spawn(_worker, (str(tmp_path), split, stat, impl), nprocs=2)
    shared = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    x, gate, prev_index, prev_weight = _inputs()

    def route(tokens: slice) -> torch.Tensor:
        return mk.ac_route(
            x[tokens], gate, prev_index[tokens], prev_weight[tokens], top_k=K, mix=True, stat=stat
        ).logits

    torch.testing.assert_close(shared, route(slice(None)).cpu(), rtol=1e-5, atol=1e-5)
    if split:
        alone = torch.cat([route(slice(0, split)), route(slice(split, None))]).cpu()
        assert not torch.allclose(shared, alone, rtol=1e-3), "the ranks did not share anything"


def test_pairwise_is_refused(tmp_path: Path):
    x, gate, prev_index, _ = _inputs()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(NotImplementedError, match="pairwise"):
            mk.ac_route(
                x, gate, prev_index, top_k=K, stat="pairwise", process_group=dist.group.WORLD
            )
    finally:
        dist.destroy_process_group()
