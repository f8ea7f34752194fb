"""The start of each merging kernel: its grid, arguments and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molex_kernels._triton import chips, tuning
from molex_kernels._triton.arguments import Mat, strided
from molex_kernels._triton.launch import launch
from molex_kernels._triton.precision import of_product
from molex_kernels._triton.sizes import cdiv, next_power_of_2
from molex_kernels.ops.merging.kernels import config
from molex_kernels.ops.merging.kernels.linear import _merging_fwd_linear
from molex_kernels.ops.merging.kernels.mask import _merging_fwd_mask
from molex_kernels.ops.merging.kernels.modes import _merging_bwd_mode, _merging_fwd_mode
from molex_kernels.ops.merging.kernels.order import Mode
from molex_kernels.ops.merging.kernels.weights import _merging_bwd_weights


def mask(
    base: Tensor,
    experts: Tensor,
    source: Tensor | None,
    out: Tensor | None,
    dbase: Tensor | None,
    ties: bool,
) -> None:
    """out = mask * (source or tau); dbase = -sum_e of it."""
    if base.numel() == 0:
        return
    num_rows, num_features = base.shape
    launch(
        _merging_fwd_mask,
        lambda b: (cdiv(num_rows, b["BLOCK_O"]) * cdiv(num_features, b["BLOCK_D"]),),
        (
            *map(strided, (base, experts, source, out, dbase)),
            *(num_rows, num_features, experts.shape[0]),
        ),
        {"HAS_TIES": ties},
        config.mask(chips.of(base.device)),
    )


def product(
    precision: str,
    factor: Tensor,
    x: Tensor,
    mode: Mode,
    transposed: bool,
    out: Tensor,
    accumulate: bool,
) -> None:
    """`order.Product`."""
    if out.numel() == 0:
        return
    factor = factor.mT if transposed else factor
    num_ranks, num_experts = factor.shape[:2]
    summed = out.shape[1] == 1
    num_columns = mode.outer * mode.inner

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        tiles = cdiv(mode.size, blocks["BLOCK_I"])
        tiles *= cdiv(num_columns, blocks["BLOCK_N"])
        return (tiles * num_experts * (1 if summed else num_ranks),)

    launch(
        _merging_fwd_mode,
        grid,
        (
            *(strided(factor), _blocks(x), _blocks(out)),
            *(mode.size, mode.inner, num_columns, num_experts, num_ranks),
        ),
        {"IS_SUMMED": summed, "IS_ADDED": accumulate, "PRECISION": precision},
        config.mode(chips.of(out.device), mode.size, mode.inner, precision),
        updates=(out,) if accumulate else (),
    )


def contract(precision: str, left: Tensor, right: Tensor, mode: Mode, out: Tensor) -> None:
    """`order.Contract`."""
    if out.numel() == 0:
        return
    options = config.contraction(chips.of(out.device), mode.size, precision)
    blocks = options[0].blocks  # of all candidates: they differ in other things
    num_ranks, num_experts = out.shape[:2]
    num_columns = mode.outer * mode.inner
    num_parts = max(1, min(config.PARTS, cdiv(num_columns, blocks["BLOCK_N"])))
    partial = out.new_empty(num_parts, *out.shape)
    tiles = cdiv(mode.size, blocks["BLOCK_I"]) ** 2
    launch(
        _merging_bwd_mode,
        lambda _: (num_parts * tiles * num_ranks * num_experts,),
        (
            *(_blocks(left), _blocks(right), partial, mode.size, mode.inner, num_columns),
            *(num_experts, num_ranks, num_parts),
        ),
        {"PRECISION": precision},
        options,
    )
    torch.sum(partial, 0, out=out)


def linear(
    x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """out_s = x_s (base + sum_e gates_se deltas_e)^T + bias_s."""
    if out.numel() == 0:
        return
    num_segments, num_tokens, num_columns = out.shape
    num_experts = deltas.shape[0]
    is_aligned = tuning.aligned(x, base, deltas, out)
    paired = config.is_paired(x.dtype, num_segments, num_tokens, num_columns, is_aligned)

    def row_tiles(blocks: Mapping[str, int]) -> int:
        groups = cdiv(num_segments, 2) if paired else num_segments
        return cdiv(num_tokens, blocks["BLOCK_T"]) * groups

    launch(
        _merging_fwd_linear,
        lambda b: (row_tiles(b) * cdiv(num_columns, b["BLOCK_N"]),),
        lambda b: (
            *map(strided, (x, base, deltas, gates, bias, out)),
            *(num_segments, num_tokens, num_columns, x.shape[2], num_experts, row_tiles(b)),
        ),
        {
            "NUM_UNROLLED": num_experts if num_experts <= config.MAX_UNROLLED else 0,
            "IS_PAIRED": paired,
            "PRECISION": of_product(x, is_aligned),
        },
        config.linear(chips.of(x.device), x.dtype, num_tokens, is_aligned, paired),
    )


def weights(
    dy: Tensor,
    x: Tensor,
    deltas: Tensor,
    gates: Tensor,
    dbase: Tensor | None,
    ddeltas: Tensor | None,
    needs_gates: bool,
) -> Tensor | None:
    """Fills dbase and ddeltas; returns the gates' gradient where it is needed."""
    num_segments, num_tokens, num_columns = dy.shape
    num_features = x.shape[2]
    num_experts = deltas.shape[0]
    block_e = min(config.MAX_BLOCK_E, next_power_of_2(num_experts))
    is_aligned = tuning.aligned(dy, x, deltas)
    partial: Tensor | None = None
    if num_columns * num_features == 0:
        return torch.zeros_like(gates) if needs_gates else None

    def tiles(blocks: Mapping[str, int]) -> int:
        return cdiv(num_columns, blocks["BLOCK_N"]) * cdiv(num_features, blocks["BLOCK_D"])

    def arguments(blocks: Mapping[str, int]) -> tuple[Any, ...]:
        nonlocal partial
        if needs_gates:
            partial = gates.new_empty(num_segments, num_experts, tiles(blocks))
        return (
            *map(strided, (dy, x, deltas, gates, dbase, ddeltas, partial)),
            *(num_segments, num_tokens, num_columns, num_features, num_experts),
        )

    launch(
        _merging_bwd_weights,
        lambda b: (tiles(b) * cdiv(num_experts, block_e),),
        arguments,
        {"PRECISION": of_product(x, is_aligned), "BLOCK_E": block_e},
        config.weights(chips.of(x.device), x.dtype, is_aligned),
    )
    return None if partial is None else partial.sum(2)


def _blocks(x: Tensor) -> Mat:
    """[E, r, O, D] as a matrix of contiguous [O, D]; a stride of 0 where one serves all ranks."""
    return Mat(x, x.stride(0), 0 if x.shape[1] == 1 else x.stride(1))
