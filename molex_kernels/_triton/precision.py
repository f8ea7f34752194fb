"""How `tl.dot` multiplies fp32 tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from molex_kernels._backends import interpreted
from molex_kernels._dtypes import dot_precision
from molex_kernels._triton import chips


def of_product(x: Tensor, is_aligned: bool, *, over_rows: bool = False) -> str:
    """`input_precision` of a product of tiles of x's dtype.

    fp32 is multiplied in parts on NVIDIA's tensor cores, several times as fast as by multiply-adds:
    each operand as the sum of two numbers of tf32, and of their products the largest three
    ("tf32x3"), so that at most 2^-21 of a product is left out. Summed block by block
    (`tiles.add_product`) that is inside the error budget of fp32. Rows that start anywhere leave no
    registers for the parts.

    over_rows: both operands are summed over their rows, as for a gradient of weights. Of tf32 a
        tensor core takes no such operand from shared memory; of bf16 it does, in three parts each
        and six products ("bf16x6").
    """
    precision = dot_precision(x.dtype)
    takes_parts = precision == "ieee" and x.dtype == torch.float32 and is_aligned
    if not takes_parts or chips.of(x.device).is_amd:
        return precision
    # Triton's interpreter, which multiplies fp32 as it is, has no name for it.
    return "bf16x6" if over_rows and not interpreted() else "tf32x3"
