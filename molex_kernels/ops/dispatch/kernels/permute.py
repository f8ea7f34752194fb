"""Tokens in expert order and back, as launches. Nothing on the device is ever read here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from molex_kernels._triton import chips
from molex_kernels._triton.arguments import strided
from molex_kernels._triton.launch import launch
from molex_kernels._triton.sizes import cdiv
from molex_kernels.ops.dispatch.kernels import config, starts
from molex_kernels.ops.dispatch.kernels.gather import _dispatch_fwd_gather
from molex_kernels.ops.dispatch.kernels.starts import Rows


def permute_forward(a: Any) -> Tensor:
    out = a.x.new_empty(a.permutation.shape[0], a.x.shape[1])
    _gather(a.x, None, None, out, None, _rows(a))
    return out


def permute_backward(a: Any) -> Tensor:
    return _combine(a.drows, None, _rows(a))


def unpermute_forward(a: Any) -> Tensor:
    return _combine(a.rows, a.expert_weight, _rows(a))


def unpermute_backward(a: Any) -> tuple[Tensor, Tensor]:
    """drows_r = w_tk dy_t,  dw_tk = <dy_t, rows_r>."""
    needs_rows, needs_weight = a.needs
    size = (a.permutation.shape[0], a.dy.shape[1])
    drows = a.dy.new_empty(size if needs_rows else (0,))
    given = a.dy if a.expert_weight is None else a.expert_weight
    dweight = given.new_empty(a.expert_weight.shape if needs_weight else (0,))
    if needs_rows or needs_weight:
        to_rows, to_weight = drows if needs_rows else None, dweight if needs_weight else None
        kept = a.kept if needs_weight else None
        _gather(a.dy, a.expert_weight, kept, to_rows, to_weight, _rows(a))
    return drows, dweight


def _rows(a: Any) -> Rows:
    return Rows.of_plan(a.offsets, a.permutation, a.inverse, a.top_k)


def _combine(packed: Tensor, expert_weight: Tensor | None, rows: Rows) -> Tensor:
    out = packed.new_empty(rows.num_rows // rows.top_k, packed.shape[1])
    starts.combine(packed, expert_weight, out, rows)
    return out


def _gather(
    x: Tensor,
    expert_weight: Tensor | None,
    packed: Tensor | None,
    out: Tensor | None,
    products: Tensor | None,
    rows: Rows,
) -> None:
    """out_r = w_tk x_t and products_tk = <x_t, packed_r>, where there is memory for them."""
    num_features = x.shape[1]
    if rows.num_rows == 0 or (products is None and num_features == 0):
        return
    weight = None if out is None else expert_weight
    launch(
        _dispatch_fwd_gather,
        lambda b: (cdiv(rows.num_rows, b["BLOCK_T"]),),
        (
            *map(strided, (x, weight, packed, out)),
            *(products, rows.offsets, rows.permutation),
            *(rows.num_rows, rows.num_experts, num_features, rows.top_k),
        ),
        {},
        config.combine(chips.of(x.device), num_features),
    )
