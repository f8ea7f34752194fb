"""Supported dtypes, what they accumulate in, and what autocast makes of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


# Under autocast an op brings its arguments into the dtypes that it takes, by one of the three
# functions below, and checks them after that. fp64 stays, as autocast leaves it; what is no
# tensor is for the checks.


def autocast(x: Any, *others: Any) -> tuple[Any, ...]:
    """The operands of a product in autocast's dtype, where it is on, as `F.linear` has them."""
    values = (x, *others)
    if not _is_autocast(x):
        return values
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(v.to(dtype) if _is_cast(v) else v for v in values)


def kept(x: Tensor, *values: Any) -> tuple[Any, ...]:
    """What stays precise beside x: under autocast in fp32, unless it is of x's dtype."""
    if not _is_autocast(x):
        return values
    return tuple(v.float() if _is_cast(v) and v.dtype != x.dtype else v for v in values)


def promoted(x: Any, *others: Any) -> tuple[Any, ...]:
    """The terms of a sum in their widest dtype under autocast, as `x + y` has them."""
    values = (x, *others)
    if not _is_autocast(x):
        return values
    dtypes = {v.dtype for v in values if _is_cast(v)}
    if len(dtypes) < 2:
        return values
    return tuple(v.float() if _is_cast(v) else v for v in values)


def parameter_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What parameters used before they are cast may be: of x's dtype, or any to be cast."""
    return KERNEL_DTYPES if _is_autocast(x) and _is_cast(x) else (x.dtype,)


def f_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What is subtracted from x may be: of any kernel dtype where x is, else of x's."""
    return KERNEL_DTYPES if x.dtype in KERNEL_DTYPES else (x.dtype,)


def _is_autocast(x: Any) -> bool:
    try:
        return isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)
    except RuntimeError:  # a device without autocast, such as meta
        return False


def _is_cast(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in KERNEL_DTYPES


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, the operators of PyTorch compute in the dtypes that they are given."""
    if x.device.type == "meta":  # which has no autocast
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: IEEE, or tf32 if `set_float32_matmul_precision` allows it."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"
