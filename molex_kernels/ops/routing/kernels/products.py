"""Products of an fp32 factor and one that has 16 bits, on tensor cores and without a loss."""

import triton
import triton.language as tl

from molex_kernels._triton.tiles import add_product


@triton.jit
def leading_bits(a, DROPPED: tl.constexpr):
    """a with the last bits of its fraction 0: what is left out is exact in fp32."""
    bits = a.to(tl.int32, bitcast=True) & -(2**DROPPED)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dot_parts(a, b, acc, PRECISION: tl.constexpr, WHOLE: tl.constexpr):
    """a b + acc, with a in fp32 and b in 16 bits, or in fp32 and then as PRECISION has it.

    With b in bf16, three bf16 parts of a, of 8 bits each, hold all of its 24. fp16 is exact in
    tf32, so that "tf32x3" needs a's parts alone, of 11 bits: two, or all 24 bits if WHOLE. Small
    parts are added first.
    """
    if b.dtype == tl.bfloat16:
        high = leading_bits(a, 16)
        middle = leading_bits(a - high, 16)
        acc = tl.dot((a - high - middle).to(tl.bfloat16), b, acc)
        acc = tl.dot(middle.to(tl.bfloat16), b, acc)
        acc = tl.dot(high.to(tl.bfloat16), b, acc)
    elif b.dtype == tl.float16 and PRECISION == "tf32x3":
        high = leading_bits(a, 13)
        rest = a - high
        b = b.to(tl.float32)
        if WHOLE:
            middle = leading_bits(rest, 13)
            acc = tl.dot(rest - middle, b, acc, input_precision="tf32")
            rest = middle
        acc = tl.dot(rest, b, acc, input_precision="tf32")
        acc = tl.dot(high, b, acc, input_precision="tf32")
    else:
        acc = add_product(acc, a, b.to(tl.float32), PRECISION)
    return acc
