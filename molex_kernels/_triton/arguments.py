"""Tensors as kernel arguments: a pointer and its strides, in elements, are one named tuple.

An absent tensor is None, which a kernel tests at compile time (`if bias is not None`). Inside a
tuple Triton specialises as it does outside: a stride of 1 is a constant, and multiples of 16 are
known to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Vec(NamedTuple):
    """[N]"""

    ptr: Any
    step: Any


class Mat(NamedTuple):
    """[N, D]"""

    ptr: Any
    row: Any
    col: Any


class Stack(NamedTuple):
    """[S, N, D]"""

    ptr: Any
    outer: Any
    row: Any
    col: Any


class Heads(NamedTuple):
    """[B, H, N, D]"""

    ptr: Any
    batch: Any
    head: Any
    row: Any
    col: Any


_KINDS: dict[int, Any] = {1: Vec, 2: Mat, 3: Stack, 4: Heads}
STRIDED = frozenset(_KINDS.values())


def strided(x: Tensor | None) -> Any:
    """The tensor as a kernel's argument, by its number of dimensions; None where it is absent."""
    if x is None:
        return None
    kind = _KINDS[x.dim()]
    return kind(x, *x.stride())


def blocks_of(
    x: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]
) -> TensorDescriptor | None:
    """A descriptor of x's memory seen with this shape, of which the chip copies whole blocks.

    None where it cannot: blocks start and rows run in steps of 16 bytes, elements in steps of one.
    """
    step = 16 // x.itemsize
    is_possible = x.data_ptr() % 16 == 0 and strides[-1] == 1 and min(shape) > 0
    if not is_possible or any(stride % step or stride <= 0 for stride in strides[:-1]):
        return None
    return TensorDescriptor(x, list(shape), list(strides), list(block))


@triton.jit
def int64(number):
    """A stride or an index in int64, so that their product does not wrap."""
    return tl.cast(number, tl.int64)


@triton.jit
def along(index, stride):
    """Elements from the first to that of an index."""
    # A stride of 1 is known at compile time, and the index may stay as short as it is.
    return index if isinstance(stride, int) else int64(index) * int64(stride)


@triton.jit
def places(vec, offs):
    """Pointers to elements of a Vec."""
    return vec.ptr + along(offs, vec.step)


@triton.jit
def at(mat, rows, cols):
    """Pointers to elements of a Mat, or of a Stack's first, as `rows` and `cols` broadcast."""
    return mat.ptr + along(rows, mat.row) + along(cols, mat.col)


@triton.jit
def nth(stack, index):
    """Pointer to one matrix of a Stack: `Mat(nth(stack, e), stack.row, stack.col)`."""
    return stack.ptr + int64(index) * int64(stack.outer)


@triton.jit
def load_fp32(ptrs, mask):
    """The elements in fp32, 0 where masked."""
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptrs, values, mask):
    """Rounds once, to the dtype behind the pointers."""
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=mask)
