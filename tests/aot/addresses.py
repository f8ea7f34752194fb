"""Products in addresses, read from Triton's IR: int32 must not wrap where a tensor is large."""

from __future__ import annotations

import re

from aot.launches import Launch

_SPLAT = re.compile(r"\s*(%\S+) = tt\.splat (%\S+) : i32 ")
_PRODUCT = re.compile(r"\s*%\S+ = arith\.muli (%\S+), (%\S+?)(?: overflow\S+)? : (\S+)")
_ARGUMENT = re.compile(r"(%\w+): ")
# Numbers of the caller's that have no small bound either.
_SHIFT = re.compile(r"stride_|up_shift|gate_step")


def narrow_products(ir: str, launch: Launch) -> list[str]:
    """The int32 products with a stride, of numbers or of tensors; strides have no small bound."""
    strides = _strides(ir, launch)
    found = []
    for line in ir.splitlines():
        splat, product = _SPLAT.match(line), _PRODUCT.match(line)
        if splat and splat[2] in strides:
            strides.add(splat[1])
        if product and "i32" in product[3] and strides & {product[1], product[2]}:
            found.append(line.split(" loc(")[0].strip())
    return found


def _strides(ir: str, launch: Launch) -> set[str]:
    """What the kernel's strides are called in the IR, whose arguments stand as the launch's do."""
    head = next(line for line in ir.splitlines() if "tt.func public" in line)
    leaves = [leaf for leaf in launch.leaves if leaf[1] != "constexpr"]
    names = _ARGUMENT.findall(head)
    return {
        place
        for place, (name, _, is_stride) in zip(names, leaves, strict=True)
        if is_stride or _SHIFT.match(name)
    }
