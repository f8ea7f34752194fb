"""One launcher per kernel. Nothing on the device is ever read here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from molex_kernels._dtypes import dot_precision
from molex_kernels._triton import tuning
from molex_kernels.ops.dispatch.kernels import config
from molex_kernels.ops.dispatch.kernels.combine import _dispatch_bwd_weight, _dispatch_fwd_combine
from molex_kernels.ops.dispatch.kernels.gemm import _dispatch_fwd_gemm
from molex_kernels.ops.dispatch.kernels.hidden import _dispatch_bwd_hidden
from molex_kernels.ops.dispatch.kernels.wgrad import _dispatch_bwd_bias, _dispatch_bwd_wgrad


@dataclass(frozen=True)
class Rows:
    """Rows in expert order. Without a permutation they are the tokens themselves."""

    offsets: Tensor
    num_rows: int
    permutation: Tensor | None = None
    inverse: Tensor | None = None
    top_k: int = 1

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0]

    @property
    def size_class(self) -> str:
        return config.rows_class(self.num_rows, self.num_experts)

    @property
    def block_e(self) -> int:
        """A power of two above the number of experts; one size serves all small numbers."""
        return max(32, triton.next_power_of_2(self.num_experts + 1))

    def tiles(self, block: int) -> int:
        """At least as many tiles of `block` rows as all experts' rows need."""
        return triton.cdiv(self.num_rows, block) + self.num_experts


def launch_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rows: Rows,
    *,
    gathered: bool = False,
    activation: str = "none",
    layout: str = "plain",
    hidden: Tensor | None = None,
    zero_tail: bool = False,
) -> None:
    if out.numel() == 0:
        return
    gated = layout != "plain"
    num_columns = out.shape[1]
    gate_step, up_shift = _halves(layout, num_columns)

    def launch(chosen: tuning.Config) -> None:
        num_row_tiles = rows.tiles(chosen.blocks["BLOCK_T"])
        grid = (num_row_tiles * triton.cdiv(num_columns, chosen.blocks["BLOCK_N"]),)
        _dispatch_fwd_gemm[grid](
            *(x, *x.stride()),
            *(weight, *weight.stride()),
            *_with_strides(bias, 2),
            *(out, *out.stride()),
            *_with_strides(hidden, 2),
            rows.offsets,
            rows.permutation,
            rows.num_rows,
            rows.num_experts,
            num_columns,
            x.shape[1],
            num_row_tiles,
            rows.top_k,
            gate_step,
            up_shift,
            IS_GATHERED=gathered,
            IS_GATED=gated,
            HAS_BIAS=bias is not None,
            HAS_HIDDEN=hidden is not None,
            HAS_ZERO_TAIL=zero_tail,
            ACTIVATION=activation,
            PRECISION=dot_precision(x.dtype),
            BLOCK_E=rows.block_e,
            GROUP=config.GROUP,
            **chosen.launch_options(),
        )

    is_aligned = tuning.aligned(x, weight, out)
    options = config.gemm(x.dtype, rows.size_class, is_aligned, gated=gated)
    key = (gathered, activation, layout, is_aligned)
    _launch("dispatch_fwd_gemm", key, options, launch, x, weight, rows)


def launch_hidden(
    dy: Tensor,
    w_down: Tensor,
    hidden: Tensor,
    expert_weight: Tensor,
    dhidden: Tensor | None,
    weighted: Tensor | None,
    rows: Rows,
    activation: str,
    layout: str,
    needs_partial: bool,
) -> Tensor | None:
    """Fills dhidden and weighted; returns the partial sums of the expert weights' gradient."""
    num_columns = w_down.shape[2]
    if hidden.numel() == 0:
        return dy.new_empty((rows.num_rows, 0), dtype=torch.float32) if needs_partial else None
    gate_step, up_shift = _halves(layout, num_columns)
    partial: Tensor | None = None

    def launch(chosen: tuning.Config) -> None:
        nonlocal partial
        num_row_tiles = rows.tiles(chosen.blocks["BLOCK_T"])
        num_column_tiles = triton.cdiv(num_columns, chosen.blocks["BLOCK_N"])
        if needs_partial:
            partial = dy.new_empty((rows.num_rows, num_column_tiles), dtype=torch.float32)
        _dispatch_bwd_hidden[(num_row_tiles * num_column_tiles,)](
            *(dy, *dy.stride()),
            *(w_down, *w_down.stride()),
            *(hidden, *hidden.stride()),
            *(expert_weight, *expert_weight.stride()),
            *_with_strides(dhidden, 2),
            *_with_strides(weighted, 2),
            *_with_strides(partial, 2),
            rows.offsets,
            rows.permutation,
            rows.num_rows,
            rows.num_experts,
            num_columns,
            dy.shape[1],
            num_row_tiles,
            rows.top_k,
            gate_step,
            up_shift,
            IS_GATED=layout != "plain",
            HAS_DHIDDEN=dhidden is not None,
            HAS_WEIGHTED=weighted is not None,
            HAS_PARTIAL=needs_partial,
            ACTIVATION=activation,
            PRECISION=dot_precision(dy.dtype),
            BLOCK_E=rows.block_e,
            GROUP=config.GROUP,
            **chosen.launch_options(),
        )

    is_aligned = tuning.aligned(dy, w_down, hidden)
    key = (activation, layout, is_aligned)
    options = config.hidden(dy.dtype, rows.size_class, is_aligned)
    _launch("dispatch_bwd_hidden", key, options, launch, dy, w_down, rows)
    return partial


def launch_wgrad(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    rows: Rows,
    *,
    left_gathered: bool = False,
    right_gathered: bool = False,
) -> None:
    if out.numel() == 0:
        return

    def launch(chosen: tuning.Config) -> None:
        tiles = triton.cdiv(out.shape[1], chosen.blocks["BLOCK_N"])
        tiles *= triton.cdiv(out.shape[2], chosen.blocks["BLOCK_D"])
        _dispatch_bwd_wgrad[(rows.num_experts * tiles,)](
            *(left, *left.stride()),
            *(right, *right.stride()),
            *(out, *out.stride()),
            rows.offsets,
            rows.permutation,
            rows.num_rows,
            out.shape[1],
            out.shape[2],
            rows.top_k,
            IS_LEFT_GATHERED=left_gathered,
            IS_RIGHT_GATHERED=right_gathered,
            PRECISION=dot_precision(left.dtype),
            **chosen.launch_options(),
        )

    is_aligned = tuning.aligned(left, right, out)
    options = config.wgrad(left.dtype, rows.size_class, is_aligned)
    key = (left_gathered, right_gathered, is_aligned)
    _launch("dispatch_bwd_wgrad", key, options, launch, left, out, rows)


def launch_bias(x: Tensor, expert_weight: Tensor | None, out: Tensor, rows: Rows) -> None:
    """Sums of x's rows; with `expert_weight`, x is gathered by token and weighted."""
    if out.numel() == 0:
        return
    grid = (rows.num_experts * triton.cdiv(out.shape[1], config.BIAS.blocks["BLOCK_N"]),)
    _dispatch_bwd_bias[grid](
        *(x, *x.stride()),
        *_with_strides(expert_weight, 2),
        *(out, *out.stride()),
        rows.offsets,
        rows.permutation,
        rows.num_rows,
        out.shape[1],
        rows.top_k,
        IS_GATHERED=expert_weight is not None,
        **config.BIAS.launch_options(),
    )


def launch_combine(packed: Tensor, expert_weight: Tensor | None, out: Tensor, rows: Rows) -> None:
    if out.numel() == 0:
        return
    chosen = config.combine(out.shape[1])
    tiles = triton.cdiv(out.shape[1], chosen.blocks["BLOCK_D"])
    _dispatch_fwd_combine[(triton.cdiv(out.shape[0], chosen.blocks["BLOCK_T"]) * tiles,)](
        *(packed, *packed.stride()),
        *_with_strides(expert_weight, 2),
        *(out, *out.stride()),
        rows.offsets,
        rows.inverse,
        out.shape[0],
        rows.num_experts,
        out.shape[1],
        rows.top_k,
        IS_WEIGHTED=expert_weight is not None,
        **chosen.launch_options(),
    )


def launch_weight(
    partial: Tensor, dy: Tensor, b_down: Tensor | None, out: Tensor, rows: Rows
) -> None:
    if out.numel() == 0:
        return
    _dispatch_bwd_weight[(triton.cdiv(rows.num_rows, config.WEIGHT.blocks["BLOCK_T"]),)](
        *(partial, *partial.stride()),
        *(dy, *dy.stride()),
        *_with_strides(b_down, 2),
        out,
        1,
        rows.offsets,
        rows.inverse,
        rows.num_rows,
        rows.num_experts,
        partial.shape[1],
        dy.shape[1],
        rows.top_k,
        HAS_BIAS=b_down is not None,
        BLOCK_E=rows.block_e,
        **config.WEIGHT.launch_options(),
    )


def _launch(
    kernel: str,
    variant: tuple[Any, ...],
    options: config.Options,
    launch: Callable[[tuning.Config], None],
    x: Tensor,
    weight: Tensor,
    rows: Rows,
) -> None:
    pinned, candidates = options
    shape_class = (*variant, x.dtype, tuple(weight.shape), rows.size_class)
    launch(tuning.choose(kernel, shape_class, pinned, candidates, launch, on_gpu=x.is_cuda))


def _halves(layout: str, num_columns: int) -> tuple[int, int]:
    """Rows from one gate to the next, and from a gate to its up half."""
    if layout == "interleaved":
        return 2, 1
    return 1, num_columns


def _with_strides(x: Tensor | None, dims: int) -> tuple[Any, ...]:
    return (None, *(0,) * dims) if x is None else (x, *x.stride())
