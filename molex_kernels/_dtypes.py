"""Supported dtypes, what they accumulate in, and what autocast makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (*HALF_DTYPES, torch.float32)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, as `F.linear` does it.

    fp64 tensors are left as they are, as autocast leaves them.
    """
    tensors = (x, *others)
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in KERNEL_DTYPES else t for t in tensors)


def parameter_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What an op's parameters may be: of x's dtype, or under autocast any that it casts."""
    if x.dtype in KERNEL_DTYPES and torch.is_autocast_enabled(x.device.type):
        return KERNEL_DTYPES
    return (x.dtype,)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: IEEE, or tf32 if `set_float32_matmul_precision` allows it."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"
