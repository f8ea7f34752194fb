"""The corrected and clipped output of the rule Mars, and its gradient.

c = f + weight (f - f_prev);  c^ = c / max(1, ||c||) over a sample, `sample_tokens` rows in turn.
The norm comes from a pass of its own; every other kernel computes c^ from what it reads.
"""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32, store
from molex_kernels._triton.tiles import rounded_product


@triton.jit
def corrected(f, f_prev, rows, columns, mask, weight):
    """c, 0 where masked."""
    c = (1.0 + weight) * load_fp32(at(f, rows, columns), mask)
    if f_prev is not None:
        c -= weight * load_fp32(at(f_prev, rows, columns), mask)
    return c


@triton.jit
def per_sample(ptr, offs_t, mask_t, num_tokens, sample_tokens):
    """Of each row what there is one of for its sample."""
    # In 32 bits where the number of tokens is: a chip divides 64 bits in many instructions.
    row = offs_t if isinstance(num_tokens, int) else tl.cast(offs_t, num_tokens.dtype)
    return tl.load(ptr + row // sample_tokens, mask=mask_t, other=0.0)


@triton.jit
def inverse_norm(squares):
    """1 / max(1, ||c||) from the sum of squares; NaN stays, which a maximum would drop."""
    return 1.0 / tl.sqrt(tl.where(squares < 1.0, 1.0, squares))


@triton.jit
def clipped(
    f, f_prev, squares_ptr, offs_t, mask_t, columns, mask, num_tokens, sample_tokens, weight
):
    """c^, 0 where masked."""
    c = corrected(f, f_prev, offs_t[:, None], columns, mask, weight)
    squares = per_sample(squares_ptr, offs_t, mask_t, num_tokens, sample_tokens)
    return c * inverse_norm(squares)[:, None]


@triton.jit
def _momentum_fwd_squares(
    f,  # [T, D]
    f_prev,
    parts_ptr,  # [tiles, T] fp32
    num_tokens,
    num_features,
    weight,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of c^2 over a tile's part of each row."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    offs_t = int64(pid // tiles_d) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = int64(pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask = mask_t[:, None] & (offs_d < num_features)[None, :]
    c = corrected(f, f_prev, offs_t[:, None], offs_d[None, :], mask, weight)
    ptrs = parts_ptr + int64(pid % tiles_d) * num_tokens + offs_t
    tl.store(ptrs, tl.sum(rounded_product(c, c), axis=1), mask=mask_t)


@triton.jit
def _momentum_bwd_correction(
    g,  # [T, D] the gradient of c^; so are f to df
    f,
    f_prev,
    df,  # g itself where that has its dtype
    squares_ptr,  # [samples] fp32, of ||c||
    products_ptr,  # [samples] fp32: the sum of c^ times g
    num_tokens,
    num_features,
    sample_tokens,
    weight,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """df from the gradient of c^; where the norm is above 1, c^ itself is what it cannot move."""
    pid = tl.program_id(0)
    tiles_d = tl.cdiv(num_features, BLOCK_D)
    offs_t = int64(pid // tiles_d) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = int64(pid % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_tokens
    mask = mask_t[:, None] & (offs_d < num_features)[None, :]
    rows, columns = offs_t[:, None], offs_d[None, :]
    squares = per_sample(squares_ptr, offs_t, mask_t, num_tokens, sample_tokens)
    product = per_sample(products_ptr, offs_t, mask_t, num_tokens, sample_tokens)
    product = tl.where(squares < 1.0, 0.0, product)
    inverse = inverse_norm(squares)[:, None]
    c = corrected(f, f_prev, rows, columns, mask, weight) * inverse
    d = load_fp32(at(g, rows, columns), mask) - product[:, None] * c
    store(at(df, rows, columns), (1.0 + weight) * inverse * d, mask)
