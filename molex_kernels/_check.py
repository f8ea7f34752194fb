"""Argument checks. Each error names the argument, what was expected and what came.

`TypeError` for a wrong type or dtype, `ValueError` for shape, range and device. All of them read
metadata only: nothing is allocated and no device is waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from molex_kernels._dtypes import FLOAT_DTYPES, INDEX_DTYPES

_STRIDED = torch.strided
_MOST = 2**63 - 1
_LARGEST = sys.float_info.max
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def tensor(
    name: str,
    value: Any,
    letters: str,
    sizes: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    like: Tensor | None = None,
) -> None:
    """A tensor of these sizes (`None`: any), one of these dtypes, on the device of `like`.

    `letters` names the sizes for the message: "T, D".
    """
    # The texts of messages cost more than the checks, and so do calls: a good call makes neither.
    if not isinstance(value, Tensor) or value.layout is not _STRIDED or value.dtype not in dtypes:
        _type(name, value, f"[{letters}]", dtypes)
    try:
        shape = value.shape
    except RuntimeError:  # a nested tensor has none
        _type(name, value, f"[{letters}]", dtypes)
        raise
    if shape != sizes:
        if len(shape) != len(sizes):
            _shape(name, shape, letters, sizes)
        for got, want in zip(shape, sizes):  # noqa: B905  (the cure takes twice the time)
            if want is not None and want != got:
                _shape(name, shape, letters, sizes)
    # Two flags are read in half the time of two devices.
    if like is not None and not (value.is_cpu and like.is_cpu) and value.device != like.device:
        device(name, value, like)


def _shape(name: str, got: torch.Size, letters: str, sizes: Sequence[int | None]) -> NoReturn:
    raise ValueError(f"{name}: expected shape [{letters}]{_known(letters, sizes)}, got {list(got)}")


def trailing(
    name: str,
    value: Any,
    letters: str,
    least: int = 1,
    width: int | None = None,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
) -> None:
    """A tensor of `least` dimensions or more, the last one of `width` (`None`: any)."""
    if not isinstance(value, Tensor) or not _is_dense(value) or value.dtype not in dtypes:
        _type(name, value, f"[{letters}]", dtypes)
    shape = value.shape
    if len(shape) < least or (width is not None and shape[-1] != width):
        last = "" if width is None else f" with {letters.split(', ')[-1]}={width}"
        raise ValueError(f"{name}: expected shape [{letters}]{last}, got {list(shape)}")


def _is_dense(value: Tensor) -> bool:
    return value.layout is _STRIDED and not value.is_nested


def same_shape(
    name: str, value: Any, dtypes: Sequence[torch.dtype], like: Tensor, like_name: str
) -> None:
    """A tensor of the shape and on the device of `like`, one of these dtypes."""
    if not isinstance(value, Tensor) or not _is_dense(value) or value.dtype not in dtypes:
        _type(name, value, f"of the shape of {like_name}", dtypes)
    if value.shape != like.shape:
        raise ValueError(
            f"{name}: expected the shape of {like_name}, {list(like.shape)}, "
            f"got {list(value.shape)}"
        )
    device(name, value, like)


def device(name: str, value: Tensor, like: Tensor) -> None:
    """A tensor on the device of `like`."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")


def floating(
    name: str, value: Any, letters: str, sizes: Sequence[int | None], like: Tensor | None = None
) -> None:
    """A floating tensor; of the dtype and on the device of `like`, where given."""
    tensor(name, value, letters, sizes, FLOAT_DTYPES if like is None else (like.dtype,), like)


def index(
    name: str, value: Any, letters: str, sizes: Sequence[int | None], like: Tensor | None = None
) -> None:
    """An int64 or int32 tensor, on the device of `like`."""
    tensor(name, value, letters, sizes, INDEX_DTYPES, like)


def integer(name: str, value: Any, low: int, high: int | None = None, of: str = "") -> None:
    """A Python integer in [low, high]; `of` says where the bound comes from."""
    if isinstance(value, Tensor) and torch.jit.is_tracing():
        return  # a size: torch.jit.trace has a tensor for it
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}{of}"
        raise ValueError(f"{name}: expected at least {low}{upper}, got {_short(value)}")
    if isinstance(value, int) and value > _MOST:
        raise ValueError(f"{name}: expected an int of 64 bits, got {_short(value)}")


def number(name: str, value: Any, low: float | None = None, *, exclusive: bool = False) -> None:
    """A finite Python number at least (`exclusive`: above) `low`, which a double can hold."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Comparisons, unlike `math.isfinite`, can be traced where the number is a symbol.
    below = low is not None and (value < low or (exclusive and value == low))
    if not -_LARGEST <= value <= _LARGEST or below:
        bound = "" if low is None else f" {'above' if exclusive else 'at least'} {low}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {_short(value)}")
    if isinstance(value, int) and not -_MOST <= value <= _MOST:
        raise ValueError(f"{name}: expected a float or an int of 64 bits, got {_short(value)}")


def finite(name: str, value: Any) -> None:
    """A finite Python number, which a double can hold."""
    number(name, value, -_LARGEST)


def probability(name: str, value: Any) -> None:
    """A number in [0, 1)."""
    number(name, value, 0.0)
    if value >= 1:
        raise ValueError(f"{name}: expected at least 0 and below 1, got {value}")


def choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """One of the allowed values."""
    try:
        known = value in allowed
    except (TypeError, ValueError, RuntimeError):  # what has no hash, or compares by element
        known = False
    if not known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def flags(**values: Any) -> None:
    """Each is True or False: any other value has a truth, too, but not the one that was meant."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _type(name: str, value: Any, shape: str, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if not _is_dense(value):
        layout = "a nested one" if value.is_nested else f"layout {_name(value.layout)}"
        raise TypeError(f"{name}: expected a dense tensor {shape}, got {layout}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {_name(value.dtype)}")


def _short(value: Any) -> str:
    """The number, unless it has hundreds of digits, for which Python has no text."""
    huge = isinstance(value, int) and value.bit_length() > 1024
    return f"an int of {value.bit_length()} bits" if huge else f"{value}"


def _name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(dict.fromkeys(map(_name, dtypes)))


def _known(letters: str, sizes: Sequence[int | None]) -> str:
    known = [
        f"{n.strip()}={s}" for n, s in zip(letters.split(","), sizes, strict=False) if s is not None
    ]
    return f" with {', '.join(known)}" if known else ""
