"""Data-parallel ranks that share their statistics compute what one process would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import DEVICE
from torch import Tensor

import molex_kernels as mk

E, D, K = 4, 12, 2


def _inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, D, generator=generator)
    gate = torch.randn(E, D, generator=generator)
    prev_index = torch.rand(40, E, generator=generator).argsort(1)[:, :K]
    prev_weight = torch.rand(40, K, generator=generator)
    return tuple(t.to(DEVICE) for t in (x, gate, prev_index, prev_weight))


def _rank(rank: int, folder: str, split: int, job: Callable[..., Tensor], options: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = slice(0, split) if rank == 0 else slice(split, None)
    torch.save(job(mine, dist.group.WORLD, **options).cpu(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _on_two_ranks(
    folder: Path, split: int, job: Callable[..., Tensor], **options: Any
) -> list[Tensor]:
    """What `job(tokens, group, **options)` returns on each of two ranks, which share the tokens."""
    mp.spawn(_rank, (str(folder), split, job, options), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _ac_logits(tokens: slice, group: Any, **options: Any) -> Tensor:
    x, gate, prev_index, prev_weight = _inputs()
    return mk.ac_route(
        x[tokens],
        gate,
        prev_index[tokens],
        prev_weight[tokens],
        top_k=K,
        mix=True,
        process_group=group,
        **options,
    ).logits


@pytest.mark.parametrize(
    ("stat", "split", "impl"),
    [("mad", 13, "reference"), ("mad", 0, "triton"), ("variance", 13, "triton")],
    ids=["uneven", "one rank without tokens", "variance"],
)
def test_two_ranks_route_as_one(tmp_path: Path, stat: str, split: int, impl: str):
    shared = torch.cat(_on_two_ranks(tmp_path, split, _ac_logits, stat=stat, impl=impl))

    def route(tokens: slice) -> Tensor:
        return _ac_logits(tokens, None, stat=stat)

    torch.testing.assert_close(shared, route(slice(None)).cpu(), rtol=1e-5, atol=1e-5)
    if split:
        alone = torch.cat([route(slice(0, split)), route(slice(split, None))]).cpu()
        assert not torch.allclose(shared, alone, rtol=1e-3), "the ranks did not share anything"


def _bias(tokens: slice, group: Any) -> Tensor:
    _, _, index, _ = _inputs()
    counts = torch.bincount(index[tokens].flatten(), minlength=E)
    before = counts.clone()
    bias = torch.zeros(E, device=DEVICE)
    mk.update_expert_bias(bias, counts, rate=0.5, process_group=group)
    assert torch.equal(counts, before), "the counts of the rank were modified"
    return bias


def test_two_ranks_move_a_bias_as_one(tmp_path: Path):
    shared = _on_two_ranks(tmp_path, 3, _bias)
    whole = _bias(slice(None), None).cpu()
    assert torch.equal(shared[0], whole)
    assert torch.equal(shared[1], whole)
    assert not torch.equal(_bias(slice(0, 3), None).cpu(), whole), "it takes no group to agree"


def _losses(tokens: slice, group: Any, impl: str | None, kind: str) -> Tensor:
    """Some losses of these tokens, and under each its gradient of the gate."""
    x, gate, index, _ = _inputs()
    mask = torch.arange(40, device=DEVICE) % 4 > 0
    sequence = torch.arange(40, device=DEVICE) // 5  # none is on two ranks
    weight = gate.requires_grad_()
    rows = []
    for given in (None, mask[tokens]):
        for own in (None, sequence[tokens], "z"):
            logits = x[tokens] @ weight.T
            options = {"mask": given, "process_group": group, "impl": impl}
            if own == "z":
                loss = mk.router_z_loss(logits, **options)
            else:
                routing = mk.Routing(index[tokens], logits.new_zeros(len(logits), K), logits)
                options |= {"sequence": own, "kind": kind, "temperature": 0.7}
                loss = mk.load_balance_loss(routing, **options)
            (gradient,) = torch.autograd.grad(loss, weight)
            rows.append(torch.cat([loss[None], gradient.flatten()]).detach())
    return torch.stack(rows)


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize("kind", ["switch", "published"])
@pytest.mark.parametrize("split", [15, 0], ids=["uneven", "one rank without tokens"])
def test_losses_and_gradients_averaged_over_ranks_are_the_whole_batchs(
    tmp_path: Path, split: int, kind: str, impl: str | None
):
    shared = torch.stack(_on_two_ranks(tmp_path, split, _losses, impl=impl, kind=kind)).mean(0)
    whole = _losses(slice(None), None, "reference", kind).cpu()
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)
    if split:
        parts = [slice(0, split), slice(split, None)]
        alone = torch.stack([_losses(p, None, "reference", kind).cpu() for p in parts]).mean(0)
        assert not torch.isclose(alone[:, 0], whole[:, 0], rtol=1e-3).any(), "they shared nothing"


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
