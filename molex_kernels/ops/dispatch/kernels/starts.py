"""The start of each dispatch kernel: its grid, arguments and configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molex_kernels._triton import chips, tuning
from molex_kernels._triton.arguments import blocks_of, strided
from molex_kernels._triton.chips import Chip
from molex_kernels._triton.launch import launch
from molex_kernels._triton.precision import of_product
from molex_kernels._triton.sizes import cdiv, next_power_of_2
from molex_kernels.ops.dispatch.kernels import config
from molex_kernels.ops.dispatch.kernels.combine import _dispatch_bwd_weight, _dispatch_fwd_combine
from molex_kernels.ops.dispatch.kernels.gemm import _dispatch_fwd_gemm
from molex_kernels.ops.dispatch.kernels.hidden import _dispatch_bwd_hidden
from molex_kernels.ops.dispatch.kernels.wgrad import (
    _dispatch_bwd_bias,
    _dispatch_bwd_pieces,
    _dispatch_bwd_wgrad,
)


class Numbers(NamedTuple):
    """Those of `ClampedSwiGLU`, for a kernel."""

    alpha: float
    limit: float
    up_limit: float
    up_shift: float


@dataclass(frozen=True)
class Rows:
    """Rows in expert order. Without a permutation they are the tokens themselves."""

    offsets: Tensor
    num_rows: int
    permutation: Tensor | None = None
    inverse: Tensor | None = None
    top_k: int = 1
    is_even: bool = False  # all experts have as many rows

    @classmethod
    def of_plan(cls, offsets: Tensor, permutation: Tensor, inverse: Tensor, top_k: int) -> Rows:
        plan = (permutation.contiguous(), inverse.contiguous())
        return cls(offsets.contiguous(), permutation.shape[0], *plan, top_k)

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0]

    @property
    def size_class(self) -> int:
        return config.rows_class(self.num_rows, self.num_experts)

    @property
    def block_e(self) -> int:
        """A power of two above the number of experts; one size serves all small numbers."""
        return max(32, next_power_of_2(self.num_experts + 1))

    def tiles(self, block: int) -> int:
        """At least as many tiles of `block` rows as all experts' rows need."""
        return cdiv(self.num_rows, block) + self.num_experts


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rows: Rows,
    *,
    gathered: bool = False,
    activation: str = "none",
    layout: str = "plain",
    numbers: Sequence[float] = (),
    hidden: Tensor | None = None,
    zero_tail: bool = False,
    may_be_wide: bool = True,
) -> None:
    """out_r = act(weight_e x_r + bias_e), with the pre-activation in `hidden`.

    may_be_wide: whether there are tiles enough for such that hold a multiprocessor alone.
    """
    if out.numel() == 0:
        return
    num_weight_rows, num_features = weight.shape[1:]
    is_aligned = tuning.aligned(x, weight, out)
    chip = chips.of(x.device)
    launch(
        _dispatch_fwd_gemm,
        lambda b: (rows.tiles(b["BLOCK_T"]) * cdiv(num_weight_rows, b["BLOCK_N"]),),
        lambda b: (
            *(strided(x), strided(weight)),
            _weight_blocks(weight, layout, chip, is_aligned, b),
            *map(strided, (bias, out, hidden)),
            *(rows.offsets, rows.permutation, rows.num_rows, rows.num_experts),
            *(out.shape[1], num_features, rows.tiles(b["BLOCK_T"])),
            Numbers(*numbers) if numbers else None,
        ),
        {
            "IS_GATHERED": gathered,
            "IS_TRANSPOSED": weight.stride(1) == 1,
            "LAYOUT": layout,
            "HAS_ZERO_TAIL": zero_tail,
            "ACTIVATION": activation,
            "TOP_K": rows.top_k,
            "PRECISION": of_product(x, is_aligned),
            "BLOCK_E": rows.block_e,
            "GROUP": config.GROUP,
        },
        config.gemm(
            chip,
            x.dtype,
            rows.size_class,
            num_weight_rows,
            is_aligned,
            may_be_wide=may_be_wide,
        ),
    )


def _weight_blocks(
    weight: Tensor, layout: str, chip: Chip, aligned: bool, blocks: Mapping[str, int]
) -> Any:
    """The descriptor of [E, 1, N, D] or [E, D, 1, N]; of [E, 2, N / 2, D] with gates before ups.

    None where the kernel reads the weights by pointers.
    """
    if not (aligned and config.takes_blocks(chip, weight.dtype, blocks)):
        return None
    experts, rows, features = weight.shape
    outer, row, column = weight.stride()
    halves = 2 if layout == "concat" else 1
    half, half_block = rows // halves, blocks["BLOCK_N"] // halves
    if row == 1:
        to_up = half if halves == 2 else outer
        shape, strides = (experts, features, halves, half), (outer, column, to_up, 1)
        return blocks_of(weight, shape, strides, (1, blocks["BLOCK_D"], halves, half_block))
    shape, strides = (experts, halves, half, features), (outer, half * row, row, 1)
    return blocks_of(weight, shape, strides, (1, halves, half_block, blocks["BLOCK_D"]))


def hidden(
    dy: Tensor,
    w_down: Tensor,
    hidden: Tensor,
    expert_weight: Tensor,
    dhidden: Tensor | None,
    weighted: Tensor | None,
    rows: Rows,
    activation: str,
    layout: str,
    numbers: Sequence[float],
    needs_partial: bool,
) -> Tensor | None:
    """Fills dhidden and weighted; returns the partial sums of the expert weights' gradient."""
    num_columns = w_down.shape[2]
    if hidden.numel() == 0:
        return dy.new_empty((rows.num_rows, 0), dtype=torch.float32) if needs_partial else None
    partial: Tensor | None = None
    weight = w_down.mT
    is_aligned = tuning.aligned(dy, w_down, hidden)
    chip = chips.of(dy.device)

    def tiles(blocks: Mapping[str, int]) -> tuple[int, int]:
        return rows.tiles(blocks["BLOCK_T"]), cdiv(num_columns, blocks["BLOCK_N"])

    def arguments(blocks: Mapping[str, int]) -> tuple[object, ...]:
        nonlocal partial
        num_row_tiles, num_column_tiles = tiles(blocks)
        if needs_partial:
            partial = dy.new_empty((rows.num_rows, num_column_tiles), dtype=torch.float32)
        tensors = (hidden, expert_weight, dhidden, weighted, partial)
        return (
            *(strided(dy), strided(weight)),
            _weight_blocks(weight, "plain", chip, is_aligned, blocks),
            *map(strided, tensors),
            *(rows.offsets, rows.permutation, rows.num_rows, rows.num_experts),
            *(num_columns, dy.shape[1], num_row_tiles),
            *_halves(layout, num_columns),
            Numbers(*numbers) if numbers else None,
        )

    launch(
        _dispatch_bwd_hidden,
        lambda b: (tiles(b)[0] * tiles(b)[1],),
        arguments,
        {
            "IS_TRANSPOSED": weight.stride(1) == 1,
            "IS_GATED": layout != "plain",
            "ACTIVATION": activation,
            "TOP_K": rows.top_k,
            "PRECISION": of_product(dy, is_aligned),
            "BLOCK_E": rows.block_e,
            "GROUP": config.GROUP,
        },
        config.hidden(chip, dy.dtype, rows.size_class, is_aligned),
    )
    return partial


def wgrad(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    rows: Rows,
    *,
    left_gathered: bool = False,
    right_gathered: bool = False,
) -> None:
    """out_e = sum over the expert's rows r of left_r^T right_r."""
    if out.numel() == 0:
        return
    num_experts, num_columns, num_features = out.shape
    is_aligned = tuning.aligned(left, right, out)
    chunk = 0
    if not rows.is_even:
        chunk = config.chunk(rows.num_rows, num_experts, num_columns, num_features)
    cuts = (rows.num_rows - 1) // chunk if chunk else 0
    partial = out.new_empty((cuts, *out.shape[1:]), dtype=torch.float32) if cuts else None

    def tiles(blocks: Mapping[str, int]) -> int:
        return cdiv(num_columns, blocks["BLOCK_N"]) * cdiv(num_features, blocks["BLOCK_D"])

    launch(
        _dispatch_bwd_wgrad,
        lambda b: ((num_experts + cuts) * tiles(b),),
        (
            *map(strided, (left, right, out, partial)),
            *(rows.offsets, rows.permutation, rows.num_rows, num_experts),
            *(num_columns, num_features, chunk),
        ),
        {
            "IS_LEFT_GATHERED": left_gathered,
            "IS_RIGHT_GATHERED": right_gathered,
            "TOP_K": rows.top_k,
            "PRECISION": of_product(left, is_aligned, over_rows=True),
            "BLOCK_E": rows.block_e if cuts else 1,
        },
        config.wgrad(
            chips.of(out.device),
            left.dtype,
            cdiv(rows.num_rows, num_experts),
            num_features,
            is_aligned,
        ),
    )
    if partial is not None:
        launch(
            _dispatch_bwd_pieces,
            lambda b: (num_experts * tiles(b),),
            (
                *map(strided, (partial, out)),
                *(rows.offsets, rows.num_rows, num_columns, num_features, chunk),
            ),
            {},
            config.pieces(chips.of(out.device)),
        )


def bias(x: Tensor, expert_weight: Tensor | None, out: Tensor, rows: Rows) -> None:
    """Sums of x's rows; with `expert_weight`, x is gathered by token and weighted."""
    if out.numel() == 0:
        return
    num_columns = out.shape[1]
    launch(
        _dispatch_bwd_bias,
        lambda b: (rows.num_experts * cdiv(num_columns, b["BLOCK_N"]),),
        (
            *map(strided, (x, expert_weight, out)),
            *(rows.offsets, rows.permutation, rows.num_rows, num_columns),
        ),
        {"TOP_K": rows.top_k},
        config.bias(chips.of(out.device)),
    )


def combine(packed: Tensor, expert_weight: Tensor | None, out: Tensor, rows: Rows) -> None:
    """out_t = sum_k w_tk packed_tk; without `expert_weight`, w is 1."""
    if out.numel() == 0:
        return
    num_tokens, num_features = out.shape

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        tiles = cdiv(num_features, blocks["BLOCK_D"])
        return (cdiv(num_tokens, blocks["BLOCK_T"]) * tiles,)

    launch(
        _dispatch_fwd_combine,
        grid,
        (
            *map(strided, (packed, expert_weight, out)),
            *(rows.offsets, rows.inverse, num_tokens, rows.num_experts, num_features, rows.top_k),
        ),
        {},
        config.combine(chips.of(out.device), num_features),
    )


def weight(partial: Tensor, dy: Tensor, b_down: Tensor | None, out: Tensor, rows: Rows) -> None:
    """Gradient of the expert weights: sums of `partial`, plus <dy_t, b_down_e>."""
    if out.numel() == 0:
        return
    launch(
        _dispatch_bwd_weight,
        lambda b: (cdiv(rows.num_rows, b["BLOCK_T"]),),
        (
            *map(strided, (partial, dy, b_down)),
            *(out, rows.offsets, rows.inverse, rows.num_rows, rows.num_experts),
            *(partial.shape[1], dy.shape[1], rows.top_k),
        ),
        {"BLOCK_E": rows.block_e},
        config.weight(chips.of(out.device)),
    )


def _halves(layout: str, num_columns: int) -> tuple[int, int]:
    """Rows from one gate to the next, and from a gate to its up half."""
    if layout == "interleaved":
        return 2, 1
    return 1, num_columns
