"""The gate that sees a task's description in place of the tokens: its sizes, checks and input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels import _check
from molex_kernels._dtypes import FLOAT_DTYPES, accumulate_dtype, without_autocast
from molex_kernels.ops.merging.gates import mean_of_tokens

REDUCTION = 16  # of the published GPT-2


def width(
    in_features: int, segment: int | None, task_dim: int | None, task_reduced: int | None
) -> int:
    """The width of what the gate sees; checks the task's sizes."""
    if task_dim is None:
        if task_reduced is not None:
            raise ValueError(f"task_reduced: expected None without task_dim, got {task_reduced!r}")
        return in_features
    _check.integer("task_dim", task_dim, 1)
    if segment is not None:
        raise ValueError(f"segment: expected None with task_dim, got {segment}")
    if task_reduced is None:
        return max(task_dim // REDUCTION, 1)
    _check.integer("task_reduced", task_reduced, 1)
    return task_reduced


def check(x: Tensor, weight: Tensor | None, task: Any, task_mask: Any, token_mask: Any) -> None:
    """What the gates are computed from is what the module has weights for."""
    if weight is None:
        for name, value in (("task", task), ("task_mask", task_mask)):
            if value is not None:
                got = type(value).__name__
                raise ValueError(f"{name}: expected None in a module without task_dim, got {got}")
        return
    if token_mask is not None:
        raise ValueError(
            "token_mask: expected None with task_dim, whose gates see no token of x, "
            f"got {type(token_mask).__name__}"
        )
    if task is None:
        raise ValueError("task: expected a tensor [B, N, Dt] with task_dim, got None")
    _check.tensor("task", task, "B, N, Dt", (None, None, weight.shape[1]), FLOAT_DTYPES, x)
    if task.shape[0] not in (1, x.shape[0]) or task.shape[1] < 1:
        raise ValueError(
            f"task: expected shape [B, N, Dt] with B={x.shape[0]} or 1 and N at least 1, "
            f"got {list(task.shape)}"
        )
    if task_mask is not None:
        _check.tensor("task_mask", task_mask, "B, N", task.shape[:2], (torch.bool,), x)


def projected_mean(task: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over a description's tokens, [B, N, Dt] -> [B, Dg], through a linear layer.

    In fp32 (fp64 for fp64), whatever autocast says, as the gate that sees it.

    Args:
        task: [B, N, Dt].
        weight: [Dg, Dt].
        bias: [Dg].
        mask: [B, N] bool, as in `mean_of_tokens`.

    Returns:
        [B, Dg].
    """
    dtype = accumulate_dtype(weight.dtype)
    with without_autocast(task):
        return F.linear(mean_of_tokens(task.to(dtype), mask), weight.to(dtype), bias.to(dtype))
