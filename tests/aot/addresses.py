"""Products in addresses, read from Triton's IR: int32 must not wrap where a tensor is large."""

from __future__ import annotations

import re

_SPLAT = re.compile(r"\s*(%\S+) = tt\.splat (%\S+) : i32 ")
_PRODUCT = re.compile(r"\s*%\S+ = arith\.muli (%\S+), (%\S+?)(?: overflow\S+)? : (\S+)")
# A stride of the tensor, or of one that the kernel makes of it: the argument's name shows.
_STRIDE = re.compile(r"%(stride_|up_shift|gate_step)")


def narrow_products(ir: str) -> list[str]:
    """The int32 products with a stride, of numbers or of tensors; strides have no small bound."""
    strides = set()
    found = []
    for line in ir.splitlines():
        splat, product = _SPLAT.match(line), _PRODUCT.match(line)
        if splat and (splat[2] in strides or _STRIDE.match(splat[2])):
            strides.add(splat[1])
        if product and "i32" in product[3]:
            operands = (product[1], product[2])
            if any(o in strides or _STRIDE.match(o) for o in operands):
                found.append(line.split(" loc(")[0].strip())
    return found
