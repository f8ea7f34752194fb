"""Trains the model of `train_moe.py` with its experts, and the batch, over several ranks.

torchrun --nproc-per-node 2 examples/expert_parallel.py
torchrun --nproc-per-node 4 examples/expert_parallel.py all_gather
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from train_moe import Block

from molex_kernels.parallel import ExpertParallel


def main(steps: int = 300, width: int = 64, strategy: str = "all_to_all") -> list[float]:
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))

    torch.manual_seed(0)  # all ranks start with the same parameters, and draw the same batch
    blocks = nn.ModuleList(Block(width) for _ in range(2))
    ends = {"embedding": nn.Embedding(256, width), "head": nn.Linear(width, 256)}
    model = nn.ModuleDict({**ends, "layers": blocks})
    parallelize_module(model, mesh["ep"], {"layers.*.experts": ExpertParallel(strategy)})
    on_every_rank = [p for p in model.parameters() if not isinstance(p, DTensor)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    text = torch.tensor(list(Path(__file__).read_bytes()))
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text) - 65, (16, 1))[rank::ranks]
        window = text[starts + torch.arange(65)]
        x, balance = model["embedding"](window[:, :-1]), 0.0
        for block in blocks:
            x, loss = block(x)
            balance = balance + loss
        loss = F.cross_entropy(model["head"](x).flatten(0, 1), window[:, 1:].flatten()) / ranks
        optimizer.zero_grad()
        (loss + 0.01 / ranks * balance).backward()
        # Experts have the gradients of all ranks' losses already.
        for parameter in on_every_rank:
            dist.all_reduce(parameter.grad)
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(mean.item())
        if step % 50 == 0 and rank == 0:
            print(f"step {step}: {losses[-1]:.3f} nats per byte")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main(strategy=sys.argv[1] if len(sys.argv) > 1 else "all_to_all")
