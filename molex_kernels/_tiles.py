"""Triton helpers used by two or more ops."""

import triton
import triton.language as tl


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
    segment = tl.sum((mask_e & (tile_ends <= tile)).to(tl.int32), axis=0)
    here = offs_e == segment
    start = tl.sum(tl.where(here, starts, 0), axis=0)
    end = tl.sum(tl.where(here, ends, 0), axis=0)
    first_tile = tl.sum(tl.where(here, tile_ends - tiles, 0), axis=0)
    return segment, start + (tile - first_tile) * BLOCK_ROWS, end
