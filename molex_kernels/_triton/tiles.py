"""Triton helpers used by two or more ops."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import at, int64, load_fp32


@triton.jit
def segment_of_tile(
    offsets_ptr, num_segments, tile, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Which rows a tile covers when every segment is cut into tiles of BLOCK_ROWS rows.

    offsets_ptr: [num_segments] int32 ends of the segments; BLOCK_E: a power of two above their
    number. Returns (segment, first row, end of the segment's rows); past the last tile, segment is
    num_segments.
    """
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < num_segments
    ends = tl.load(offsets_ptr + offs_e, mask=mask_e, other=0)
    starts = tl.load(offsets_ptr + offs_e - 1, mask=mask_e & (offs_e > 0), other=0)
    tiles = tl.where(mask_e, (ends - starts + BLOCK_ROWS - 1) // BLOCK_ROWS, 0)
    tile_ends = tl.cumsum(tiles, axis=0)
    is_before = mask_e & (tile_ends <= tile)
    before = tl.where(is_before, 1, 0), tl.where(is_before, tile_ends, 0)
    segment, first_tile = tl.reduce(before, 0, _sum_and_max)
    # What is behind it was just loaded, and is nearer than one more reduction.
    is_there = segment < num_segments
    start = tl.load(offsets_ptr + segment - 1, mask=is_there & (segment > 0), other=0)
    end = tl.load(offsets_ptr + segment, mask=is_there, other=0)
    return segment, start + (tile - first_tile) * BLOCK_ROWS, end


@triton.jit
def _sum_and_max(sum_a, max_a, sum_b, max_b):
    return sum_a + sum_b, tl.maximum(max_a, max_b)


@triton.jit
def sum_expert_rows(
    packed,  # [R, D]
    expert_weight,  # [T, K]; None: each row counts once
    offsets_ptr,  # [E] int32
    inverse_ptr,  # [R] int64
    offs_t,
    offs_d,
    mask_t,
    mask_d,
    num_experts,
    top_k,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum_k w_tk packed[inverse_tk] in fp32, in the order of k, over local experts."""
    num_local = tl.load(offsets_ptr + num_experts - 1)
    out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(top_k):
        row = tl.load(inverse_ptr + offs_t * top_k + k, mask=mask_t, other=0)
        is_local = mask_t & (row < num_local)
        packed_ptrs = at(packed, row[:, None], offs_d[None, :])
        rows = load_fp32(packed_ptrs, is_local[:, None] & mask_d[None, :])
        if expert_weight is not None:
            rows *= load_fp32(at(expert_weight, offs_t, int64(k)), is_local)[:, None]
        out += rows
    return out


@triton.jit
def keep_mask(seed, position, threshold):
    """Which elements dropout keeps, as `_philox.dropout` has it; `position` is int64."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = (position >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, 0, 0, 7)
    return word.to(tl.int64) >= threshold


@triton.jit
def rounded_product(left, right):
    """left * right element by element, in fp32, which the sum that comes next does not fuse.

    Where a thread has one element of a row, each of a row's threads would fuse its own product and
    round the others': they would hold, and write, sums that differ in the last bit.
    """
    return tl.fma(left, right, tl.zeros_like(left))


@triton.jit
def add_compensated(total, lost, term):
    """total + term by Kahan's compensated sum, and what its rounding lost.

    The error of a long chain of such sums stays about that of one.
    """
    term -= lost
    result = total + term
    return result, (result - total) - term


@triton.jit
def add_product(total, left, right, PRECISION: tl.constexpr):
    """total + left right, in fp32.

    fp32 tiles are summed by themselves first: one chain of fused multiply-adds through the whole
    depth, or of a tensor core's sums, which are cut off, would lose bits that a product in PyTorch
    keeps.
    """
    if left.dtype == tl.float32 and PRECISION != "tf32":
        # The last argument, which means nothing in fp32, keeps the compiler from making one chain.
        return total + tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)
