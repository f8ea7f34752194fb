"""The product with merged weights, a bounded piece of them at a time.

A piece is what several segments have of some rows of the weight. It stays in the L2 cache, and its
product is the grouped one of the dispatch op: segments are its experts, with as many rows each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from molex_kernels._triton import chips, tuning
from molex_kernels._triton.arguments import strided
from molex_kernels._triton.launch import launch
from molex_kernels._triton.sizes import cdiv, next_power_of_2
from molex_kernels.ops.dispatch.kernels import starts as grouped
from molex_kernels.ops.merging.kernels import config
from molex_kernels.ops.merging.kernels.merge import _merging_fwd_merge
from molex_kernels.ops.merging.kernels.weights import _merging_bwd_segments


def is_possible(*tensors: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """Of [S, T, ...] tensors whose rows are to follow each other, and weights."""
    first = tensors[0]
    num_segments, num_tokens = first.shape[:2]
    return (
        config.is_merged_first(first.dtype, num_tokens, tuning.aligned(*tensors, *weights))
        and all(num_segments == 1 or t.stride(0) == num_tokens * t.stride(1) for t in tensors)
        and num_segments * num_tokens < 2**31
        and min(t.numel() for t in (*tensors, *weights)) > 0
    )


def linear(
    x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """out_s = x_s (base + sum_e gates_se deltas_e)^T + bias_s."""
    num_segments, _, num_columns = out.shape
    num_features = x.shape[2]
    size, columns, _ = config.slices(num_segments, num_columns, num_features, gradient=False)
    chip = chips.of(x.device)
    is_transposed = base.stride(0) == 1 and base.stride(1) != 1
    for rows in _pieces(num_columns, columns):
        width = rows.stop - rows.start
        shape = (num_features, width) if is_transposed else (width, num_features)
        merged = x.new_empty(size, *shape)
        for mine in _pieces(num_segments, size):
            part = merged[: mine.stop - mine.start]
            if is_transposed:
                _merge(base[rows].mT, deltas[:, rows].mT, gates[mine], part)
                part = part.mT
            else:
                _merge(base[rows], deltas[:, rows], gates[mine], part)
            grouped.gemm(
                _rows(x[mine]),
                part,
                None if bias is None else bias[mine, rows],
                _rows(out[mine])[:, rows],
                _even(x[mine]),
                may_be_wide=config.has_wide_tiles(chip, *out[mine, :, rows].shape),
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
    """As `starts.weights`; of a piece of the weight every segment's gradient is there at once."""
    num_segments, _, num_columns = dy.shape
    num_features, num_experts = x.shape[2], deltas.shape[0]
    _, height, width = _gradient(dy, x)
    block_e = min(config.MAX_BLOCK_E, next_power_of_2(num_experts))
    rows, left, right = _even(x), _rows(dy), _rows(x)
    dweights = x.new_empty(num_segments * height * width, dtype=torch.float32)
    dgates: list[Tensor] = []
    for up in _pieces(num_columns, height):
        for across in _pieces(num_features, width):
            shape = (num_segments, up.stop - up.start, across.stop - across.start)
            part = dweights[: shape[0] * shape[1] * shape[2]].view(shape)
            grouped.wgrad(left[:, up], right[:, across], part, rows)
            dbase_part = None if dbase is None else dbase[up, across]
            ddeltas_part = None if ddeltas is None else ddeltas[:, up, across]

            def tiles(blocks: Mapping[str, int], of: tuple[int, ...] = shape) -> int:
                return cdiv(of[1], blocks["BLOCK_N"]) * cdiv(of[2], blocks["BLOCK_D"])

            blocks = config.segments(chips.of(x.device))[0].blocks  # of all candidates
            partial = None
            if needs_gates:
                partial = gates.new_empty(num_segments, num_experts, tiles(blocks))
            tensors = (part, deltas[:, up, across], gates, dbase_part, ddeltas_part, partial)
            launch(
                _merging_bwd_segments,
                lambda b, tiles=tiles: (tiles(b) * cdiv(num_experts, block_e),),
                (*map(strided, tensors), *shape, num_experts),
                {"BLOCK_E": block_e},
                config.segments(chips.of(x.device)),
            )
            if partial is not None:
                dgates.append(partial.sum(2))
    return torch.stack(dgates).sum(0) if needs_gates else None


def fits(dy: Tensor, x: Tensor) -> bool:
    """Whether a piece holds all segments: their sums would have to be continued otherwise."""
    return _gradient(dy, x)[0] == dy.shape[0]


def _gradient(dy: Tensor, x: Tensor) -> tuple[int, int, int]:
    return config.slices(dy.shape[0], dy.shape[2], x.shape[2], gradient=True)


def _merge(base: Tensor, deltas: Tensor, gates: Tensor, out: Tensor) -> None:
    num_segments, num_rows, num_features = out.shape
    num_experts = deltas.shape[0]
    block_s = min(config.MAX_BLOCK_S, next_power_of_2(num_segments))

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        tiles = cdiv(num_rows, blocks["BLOCK_N"]) * cdiv(num_features, blocks["BLOCK_D"])
        return (tiles * cdiv(num_segments, block_s),)

    launch(
        _merging_fwd_merge,
        grid,
        (*map(strided, (base, deltas, gates, out)), *out.shape, num_experts),
        {
            "NUM_UNROLLED": num_experts if num_experts <= config.MAX_UNROLLED else 0,
            "BLOCK_S": block_s,
        },
        config.merge(chips.of(out.device)),
    )


def _pieces(size: int, most: int) -> Iterator[slice]:
    for first in range(0, size, most):
        yield slice(first, min(first + most, size))


def _rows(x: Tensor) -> Tensor:
    """[S T, D] of [S, T, D], in place."""
    return x.flatten(0, 1) if x.shape[0] == 1 else x.view(-1, x.shape[2])


def _even(x: Tensor) -> grouped.Rows:
    """Segments as experts."""
    num_segments, num_tokens = x.shape[:2]
    num_rows = num_segments * num_tokens
    ends = torch.arange(num_tokens, num_rows + 1, num_tokens, dtype=torch.int32, device=x.device)
    return grouped.Rows(ends, num_rows, is_even=True)
