"""Rows of one head: where they are, which there are, and the threshold on them."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import Mat, at, int64, store


@triton.jit
def sign(a):
    """-1, 0 or 1; 0 for NaN."""
    return (a > 0).to(tl.float32) - (a < 0).to(tl.float32)


@triton.jit
def soft(a, bound):
    """sign(a) max(|a| - T, 0); NaN where either is."""
    # Of a = 0 there is no sign, and no need of one: T is 0 then, too.
    return tl.where(tl.abs(a) < bound, 0.0, a - tl.where(a > 0, bound, -bound))


@triton.jit
def block_of_head(num_tokens, BLOCK_I: tl.constexpr):
    """(block of tokens, head, number of heads) of this program; the heads are int64.

    The grid has one dimension: the others end at 65535, which batch times heads may exceed.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(num_tokens, BLOCK_I)
    num_all_heads = (tl.num_programs(0) // blocks).to(tl.int64)
    return pid % blocks, (pid // blocks).to(tl.int64), num_all_heads


@triton.jit
def of_head(x, head, num_heads):
    """Pointer to one head of a Heads: `Mat(of_head(x, ...), x.row, x.col)`."""
    return x.ptr + (head // num_heads * x.batch + head % num_heads * x.head)


@triton.jit
def load_rows(x, offs_n, mask_n, offs_d, num_features):
    """Rows of one head, a Mat, 0 where there is no token: [N, D] in their own dtype.

    mask_n: which tokens there are; None where all of them are there.
    """
    mask = (offs_d < num_features)[None, :]
    if mask_n is not None:
        mask = mask_n[:, None] & mask
    return tl.load(at(x, int64(offs_n)[:, None], offs_d[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, values, offs_n, mask_n, offs_d, num_features):
    """Into rows of one head of a contiguous tensor."""
    mask = mask_n[:, None] & (offs_d < num_features)[None, :]
    rows = Mat(ptr, num_features, 1)
    store(at(rows, int64(offs_n)[:, None], offs_d[None, :]), values, mask)


@triton.jit
def load_bound(bound_ptr, head, offs_n, mask_n, num_tokens, IS_PER_TOKEN: tl.constexpr):
    """T of the rows, to be broadcast over the features: [N, 1] or a scalar."""
    if IS_PER_TOKEN:
        bound_ptr += head * num_tokens
        if mask_n is None:
            bound = tl.load(bound_ptr + offs_n)[:, None]
        else:
            bound = tl.load(bound_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    else:
        bound = tl.load(bound_ptr + head)
    return bound


@triton.jit
def load_present(key_mask_ptr, batch, offs_n, num_tokens):
    """Which of these tokens there are; all of the sequence where there is no mask."""
    present = offs_n < num_tokens
    if key_mask_ptr is not None:
        there = tl.load(key_mask_ptr + batch * num_tokens + offs_n, mask=present, other=0)
        present = present & (there != 0)
    return present
