"""Where a chosen layer's tensors are."""

import triton
import triton.language as tl

from molex_kernels._triton.arguments import int64, places


@triton.jit
def chosen_layer(index, g, num_layers):
    """The layer of branch g, clamped into range."""
    given = int64(tl.load(places(index, g)))
    return tl.minimum(tl.maximum(given, 0), num_layers - 1)


@triton.jit
def layer_ptr(layers, table_ptr, layer, IS_ALIGNED: tl.constexpr):
    """Where a layer's tensor starts: `layers` is the stack, or the first layer's with a table."""
    # One return: Triton compiles what follows a return inside a compile-time `if`.
    if table_ptr is None:
        start = layer * layers.outer
    else:
        start = tl.load(table_ptr + layer) - layers.ptr.to(tl.int64)
        start = start // (layers.ptr.dtype.element_ty.primitive_bitwidth // 8)
        if IS_ALIGNED:
            start = tl.multiple_of(start, 16)
    return layers.ptr + start


@triton.jit
def along_steps(index, stride, STEP: tl.constexpr):
    """`along`, for a stride that is 1 or a multiple of STEP."""
    if isinstance(stride, int):
        return index
    else:
        # The hint would be lost on what another function returns.
        return int64(index) * tl.multiple_of(tl.cast(stride, tl.int64), STEP)


@triton.jit
def _layer_mixing_fwd_table(
    table_ptr,  # int64, contiguous
    p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15,
):  # fmt: skip
    """Sixteen addresses: they travel as arguments, so nothing waits and graphs can capture it."""
    tl.store(table_ptr + 0, p0.to(tl.int64))
    tl.store(table_ptr + 1, p1.to(tl.int64))
    tl.store(table_ptr + 2, p2.to(tl.int64))
    tl.store(table_ptr + 3, p3.to(tl.int64))
    tl.store(table_ptr + 4, p4.to(tl.int64))
    tl.store(table_ptr + 5, p5.to(tl.int64))
    tl.store(table_ptr + 6, p6.to(tl.int64))
    tl.store(table_ptr + 7, p7.to(tl.int64))
    tl.store(table_ptr + 8, p8.to(tl.int64))
    tl.store(table_ptr + 9, p9.to(tl.int64))
    tl.store(table_ptr + 10, p10.to(tl.int64))
    tl.store(table_ptr + 11, p11.to(tl.int64))
    tl.store(table_ptr + 12, p12.to(tl.int64))
    tl.store(table_ptr + 13, p13.to(tl.int64))
    tl.store(table_ptr + 14, p14.to(tl.int64))
    tl.store(table_ptr + 15, p15.to(tl.int64))
