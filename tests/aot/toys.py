"""Small kernels with a fault or without; `python -m aot.toys` prints what is seen of each."""

from __future__ import annotations

import json
from typing import Any

import triton
import triton.language as tl

from aot import addresses, compiler, machine_code
from aot.launches import Launch
from molex_kernels._triton.arguments import Vec, places

_TARGET = compiler.TARGETS["sm_90"]


@triton.jit
def _start_early(table_ptr, layer):
    if table_ptr is None:
        return layer * 16
    start = tl.load(table_ptr + layer) - table_ptr.to(tl.int64)
    return start


@triton.jit
def _start_once(table_ptr, layer):
    if table_ptr is None:  # noqa: SIM108
        start = layer * 16
    else:
        start = tl.load(table_ptr + layer) - table_ptr.to(tl.int64)
    return start


@triton.jit
def returns_early(x_ptr, table_ptr, n):
    tl.store(x_ptr + _start_early(table_ptr, n), 1)


@triton.jit
def returns_once(x_ptr, table_ptr, n):
    tl.store(x_ptr + _start_once(table_ptr, n), 1)


@triton.jit
def narrow_stride(x, n):
    tl.store(x.ptr + (n + tl.arange(0, 16)) * x.step, 1)


@triton.jit
def narrow_step(x, n):
    ptr = x.ptr
    for _ in range(n):
        tl.store(ptr, 1)
        ptr += 64 * x.step


@triton.jit
def wide_stride(x, n):
    tl.store(places(x, n + tl.arange(0, 16)), 1)


@triton.jit
def product(x_ptr, w_ptr, y_ptr, n, divisor, DIVIDES: tl.constexpr):
    offs = tl.arange(0, 64)
    out = tl.zeros((64, 64), tl.float32)
    for start in range(0, n, 64):
        row = (start // divisor) * 64 if DIVIDES else start
        x = tl.load(x_ptr + offs[:, None] * 4096 + (row + offs)[None, :])
        w = tl.load(w_ptr + (start + offs)[:, None] * 64 + offs[None, :])
        out = tl.dot(x, w, out)
    tl.store(y_ptr + offs[:, None] * 64 + offs[None, :], out)


def _launch(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> Launch:
    known = {n: "constexpr" if n in constants else t for n, t in signature.items()}
    names = list(signature)
    aligned = (("tt.divisibility", 16),)
    places = [i for i, t in enumerate(known.values()) if str(t).startswith("*")]
    return Launch(
        kernel.fn.__name__,
        "bf16",
        tuple(known.items()),
        tuple(((names.index(n),), value) for n, value in constants.items()),
        tuple(((i,), aligned) for i in places),
        (("num_stages", 3), ("num_warps", 4)),
        kernel,
    )


def _narrow(kernel: Any, types: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    launch = _launch(kernel, dict(zip(kernel.arg_names, types, strict=True)), constants)
    try:
        ir = compiler.front_end(launch, _TARGET)
    except Exception as error:
        return str(error.__cause__ or error)
    return addresses.narrow_products(ir, launch)


def _figures(divides: bool) -> dict[str, Any]:
    types = ("*bf16", "*bf16", "*fp32", "i32", "i32", "constexpr")
    signature = dict(zip(product.arg_names, types, strict=True))
    launch = _launch(product, signature, {"DIVIDES": divides})
    return machine_code.figures(compiler.compile_launch(launch, _TARGET), "sm_90", 4)


if __name__ == "__main__":
    found = {
        "returns_early": _narrow(returns_early, ("*i32", "*i64", "i32"), {"table_ptr": None}),
        "returns_once": _narrow(returns_once, ("*i32", "*i64", "i32"), {"table_ptr": None}),
        "product": _figures(False),
        "product_with_division": _figures(True),
    }
    for kernel in (narrow_stride, narrow_step, wide_stride):
        found[kernel.fn.__name__] = _narrow(kernel, (Vec("*i32", "i32"), "i32"), {})
    print(json.dumps(found))
