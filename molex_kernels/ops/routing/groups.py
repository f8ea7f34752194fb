"""Sums over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def check_group(group: Any) -> None:
    """A group of torch.distributed, or None."""
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup or None, got "
            f"{type(group).__name__}"
        )


def summed(group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, into which the sums over the ranks of the group are written."""
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)
    return tensors
