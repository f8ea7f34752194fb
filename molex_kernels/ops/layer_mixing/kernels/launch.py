"""The passes of layer mixing as launches. Nothing on the device is ever read here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molex_kernels._dtypes import dot_precision
from molex_kernels._triton import chips, tuning
from molex_kernels._triton.arguments import Stack, strided
from molex_kernels._triton.launch import launch
from molex_kernels._triton.precision import of_product
from molex_kernels._triton.sizes import cdiv, next_power_of_2
from molex_kernels.ops.layer_mixing import types
from molex_kernels.ops.layer_mixing.kernels import config
from molex_kernels.ops.layer_mixing.kernels.layers import _layer_mixing_fwd_table
from molex_kernels.ops.layer_mixing.kernels.linear import _layer_mixing_fwd_linear
from molex_kernels.ops.layer_mixing.kernels.mix import _layer_mixing_bwd_mix, _layer_mixing_fwd_mix
from molex_kernels.ops.layer_mixing.kernels.vote import (
    _layer_mixing_fwd_vote,
    _layer_mixing_fwd_winner,
)
from molex_kernels.ops.layer_mixing.kernels.wgrad import (
    _layer_mixing_bwd_bias,
    _layer_mixing_bwd_pieces,
    _layer_mixing_bwd_wgrad,
)

ADDRESSES = 16  # to a launch of the table's kernel


class Group(NamedTuple):
    """The stack, or the first layer's tensor with the table of all addresses."""

    tensor: Tensor
    table: Tensor | None
    is_aligned: bool  # whether every layer starts at a multiple of 16 bytes


def layer_vote_forward(given: Any) -> Tensor:
    """The layer with the largest sum of scores over all tokens, [] int64."""
    logits = given.logits
    tokens, layers = logits.shape
    out = logits.new_empty((), dtype=torch.int64)
    options = config.vote(chips.of(logits.device), layers)
    block_t = options[0].blocks["BLOCK_T"]  # which its candidates have, too
    programs = config.voters(tokens, block_t)
    scores = logits.new_empty(programs, layers, dtype=torch.float32) if programs > 1 else None
    launch(
        _layer_mixing_fwd_vote,
        lambda _: (programs,),
        (
            *map(strided, (logits, given.mask)),
            *(out if scores is None else scores, tokens, layers),
            cdiv(tokens, programs * block_t) * block_t,
        ),
        {"MODE": given.mode, "IS_PART": scores is not None},
        options,
    )
    if scores is not None:
        launch(
            _layer_mixing_fwd_winner,
            lambda _: (1,),
            (scores, out, programs, layers),
            {},
            config.winner(chips.of(logits.device), layers),
        )
    return out


def layer_linear_forward(given: Any) -> Tensor:
    """A branch's product each, [G, T, N]; x is [G, T, D], or [T, D] where shared."""
    x = given.x
    weights = given.weights
    biases = given.biases
    a = given.a
    b = given.b
    x = types.branches(x, given.index, given.shared)
    weights, biases, a, b = map(_alike, (weights, biases, a, b))
    out = x.new_empty(*x.shape[:2], weights[0].shape[-2])
    groups = (_table(weights, 3), _table(biases, 2), _table(a, 3), _table(b, 3))
    _linear(x, given.index, *groups, types.num_layers(weights, 3), given.scaling, out)
    return out


def layer_linear_backward(given: Any) -> tuple[Tensor, ...]:
    """Gradients of x, weights, biases, a and b, stacked; those not needed are empty."""
    x = given.x
    weights = given.weights
    biases = given.biases
    a = given.a
    b = given.b
    needs_x, needs_weight, needs_bias, needs_a, needs_b = given.needs
    weights, biases, a, b = map(_alike, (weights, biases, a, b))
    num_layers = types.num_layers(weights, 3)
    dx = x.new_empty(x.shape if needs_x else (0,))
    x = types.branches(x, given.index, given.shared)
    groups = ((weights, 3, needs_weight), (biases, 2, needs_bias), (a, 3, needs_a), (b, 3, needs_b))
    dweight, dbias, da, db = (
        torch.zeros(
            types.gradient_size(group, dims) if need else (0,),
            dtype=group[0].dtype if group else x.dtype,
            device=x.device,
        )
        for group, dims, need in groups
    )
    a_group, b_group = _table(a, 3), _table(b, 3)
    if needs_x:
        weight = _transposed(_table(weights, 3))
        out = dx[None] if given.shared else dx
        adapters = (_transposed(b_group), _transposed(a_group))
        _linear(given.dy, given.index, weight, None, *adapters, num_layers, given.scaling, out)
    if needs_weight:
        _wgrad(given.dy, x, given.index, dweight, 1.0)
    if needs_bias:
        _bias(given.dy, given.index, dbias)
    rank = a[0].shape[-2] if a else 0
    if needs_a:
        up = given.dy.new_empty(*given.dy.shape[:2], rank)
        _linear(given.dy, given.index, _transposed(b_group), None, None, None, num_layers, 1.0, up)
        _wgrad(up, x, given.index, da, given.scaling)
    if needs_b:
        down = given.dy.new_empty(*given.dy.shape[:2], rank)
        _linear(x, given.index, a_group, None, None, None, num_layers, 1.0, down)
        _wgrad(given.dy, down, given.index, db, given.scaling)
    return dx, dweight, dbias, da, db


def layer_mix_forward(given: Any) -> tuple[Tensor, Tensor]:
    branches, tokens, features = given.outputs.shape
    y = given.outputs.new_empty(tokens, features)
    normed = given.outputs.new_empty((0,) if given.eps is None else (tokens, features))
    if y.numel() > 0:
        launch(
            _layer_mixing_fwd_mix,
            lambda b: (_tiles(y, b),),
            (
                *(strided(given.outputs), strided(given.residual), given.coeff.contiguous()),
                None if given.weight is None else given.weight.contiguous(),
                None if given.bias is None else given.bias.contiguous(),
                *(y, None if given.eps is None else normed, float(given.eps or 0.0)),
                *(branches, tokens, features),
            ),
            {},
            config.mix(chips.of(y.device), features, given.eps is not None, backward=False),
        )
    return y, normed


def layer_mix_backward(given: Any) -> tuple[Tensor, ...]:
    """Gradients of outputs (the residual's is the same), coeff, and the norm's pair [2, D]."""
    needs_outputs, needs_coeff, needs_norm = given.needs
    branches, tokens, features = given.outputs.shape
    doutputs = given.outputs.new_empty(given.outputs.shape if needs_outputs else (0,))
    single: Any = {"dtype": torch.float32, "device": given.outputs.device}
    coeff_parts = torch.empty(0, branches, **single) if needs_coeff else None
    norm_parts = torch.empty(2, 0, features, **single) if needs_norm else None

    def programs(blocks: Mapping[str, int]) -> int:
        return min(_tiles(given.outputs[0], blocks), config.MAX_PROGRAMS)

    def arguments(blocks: Mapping[str, int]) -> tuple[Any, ...]:
        nonlocal coeff_parts, norm_parts
        if needs_coeff:
            coeff_parts = torch.empty(programs(blocks), branches, **single)
        if needs_norm:
            norm_parts = torch.empty(2, programs(blocks), features, **single)
        return (
            *map(strided, (given.dy, given.dnormed, given.outputs, given.residual)),
            given.coeff.contiguous(),
            None if given.weight is None else given.weight.contiguous(),
            *(
                doutputs if needs_outputs else None,
                coeff_parts,
                norm_parts,
                float(given.eps or 0.0),
            ),
            *(branches, tokens, features, _tiles(given.outputs[0], blocks)),
        )

    if given.outputs.numel() > 0:
        launch(
            _layer_mixing_bwd_mix,
            lambda b: (programs(b),),
            arguments,
            {"BLOCK_G": next_power_of_2(branches)},
            config.mix(
                chips.of(given.outputs.device), features, given.dnormed is not None, backward=True
            ),
        )
    dcoeff = torch.empty(0, **single) if coeff_parts is None else coeff_parts.sum(0)
    dnorm = torch.empty(0, **single) if norm_parts is None else norm_parts.sum(1)
    return doutputs, dcoeff, dnorm


def _linear(
    x: Tensor,
    index: Tensor,
    weight: Group | None,
    bias: Group | None,
    a: Group | None,
    b: Group | None,
    num_layers: int,
    scaling: float,
    out: Tensor,
) -> None:
    """out [G, T, N], or the sum over branches [1, T, N]."""
    if out.numel() == 0:
        return
    assert weight is not None
    num_tokens, num_columns = out.shape[1:]
    rank = 0 if a is None else a.tensor.shape[-2]
    # Adapters are small: what they allow decides how they move, not the tile of the product.
    is_aligned = tuning.aligned(x, weight.tensor) and weight.is_aligned
    launch(
        _layer_mixing_fwd_linear,
        lambda b: (out.shape[0] * _tiles(out[0], b, "BLOCK_N"),),
        (
            *(strided(x), strided(index)),
            *(argument for group in (weight, bias, a, b) for argument in _of_layers(group)),
            *(strided(out), float(scaling), num_layers),
            *(x.shape[0] // out.shape[0], num_tokens, num_columns, x.shape[2], rank),
        ),
        {
            "IS_ALIGNED": is_aligned,
            "ADAPTERS_ALIGNED": all(g is None or g.is_aligned for g in (a, b)),
            "STEP": _step(rank, *(g.tensor for g in (a, b) if g is not None)),
            "PRECISION": of_product(x, is_aligned),
            "BLOCK_R": config.rank_block(rank, is_aligned),
        },
        config.linear(chips.of(x.device), x.dtype, num_tokens, num_columns, is_aligned, rank),
    )


def _wgrad(left: Tensor, right: Tensor, index: Tensor, out: Tensor, scaling: float) -> None:
    if out.numel() == 0:
        return
    num_columns, num_features = out.shape[1:]

    def tiles(blocks: Mapping[str, int]) -> int:
        return cdiv(num_columns, blocks["BLOCK_N"]) * cdiv(num_features, blocks["BLOCK_D"])

    _by_pieces(
        _layer_mixing_bwd_wgrad,
        tiles,
        (*map(strided, (left, right, index, out)),),
        (float(scaling),),
        out,
        index,
        left.shape[1],
        scaling,
        {"PRECISION": dot_precision(left.dtype)},
        config.wgrad(chips.of(out.device), left.dtype, tuning.aligned(left, right, out)),
    )


def _bias(dy: Tensor, index: Tensor, out: Tensor) -> None:
    if out.numel() == 0:
        return
    _by_pieces(
        _layer_mixing_bwd_bias,
        lambda blocks: cdiv(out.shape[1], blocks["BLOCK_N"]),
        (*map(strided, (dy, index, out)),),
        (),
        out,
        index,
        dy.shape[1],
        1.0,
        {},
        config.bias(chips.of(out.device)),
    )


def _by_pieces(
    kernel: Any,
    tiles: Callable[[Mapping[str, int]], int],
    matrices: tuple[Any, ...],
    scalars: tuple[Any, ...],
    out: Tensor,
    index: Tensor,
    num_tokens: int,
    scaling: float,
    flags: dict[str, Any],
    options: tuning.Options,
) -> None:
    """Sums over each branch's rows into its layer of `out`; by pieces of rows if `out` is small."""
    branches = index.shape[0]
    parts: Tensor | None = None

    def pieces(blocks: Mapping[str, int]) -> int:
        return config.pieces(branches * tiles(blocks), num_tokens)

    def arguments(blocks: Mapping[str, int]) -> tuple[Any, ...]:
        nonlocal parts
        many = pieces(blocks)
        rows = cdiv(cdiv(num_tokens, many), blocks["BLOCK_T"]) * blocks["BLOCK_T"]
        size = (many * branches, *out.shape[1:])
        parts = None if many == 1 else out.new_empty(size, dtype=torch.float32)
        given = (None if parts is None else strided(parts), rows, *scalars)
        return (*matrices, *given, out.shape[0], branches, num_tokens, *out.shape[1:])

    launch(kernel, lambda b: (pieces(b) * branches * tiles(b),), arguments, flags, options)
    if parts is None:
        return
    if out.dim() == 2:  # biases are matrices of one row
        parts, out = parts[:, None], out[:, None]
    launch(
        _layer_mixing_bwd_pieces,
        lambda b: (branches * cdiv(out.shape[1], b["BLOCK_N"]) * cdiv(out.shape[2], b["BLOCK_D"]),),
        (
            *map(strided, (parts, index, out)),
            *(float(scaling), parts.shape[0] // branches, out.shape[0], branches, *out.shape[1:]),
        ),
        {},
        config.sums(chips.of(out.device)),
    )


def _alike(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The layers' tensors with the same strides: a kernel has one set of them."""
    if any(t.stride() != tensors[0].stride() for t in tensors):
        return [t.contiguous() for t in tensors]
    return tensors


def _table(tensors: Sequence[Tensor], dims: int) -> Group | None:
    if not tensors:
        return None
    if tensors[0].dim() == dims:
        return Group(tensors[0], None, tensors[0].data_ptr() % 16 == 0)
    count = cdiv(len(tensors), ADDRESSES) * ADDRESSES
    table = tensors[0].new_empty(count, dtype=torch.int64)
    padded = [*tensors, *[tensors[0]] * (count - len(tensors))]
    for first in range(0, count, ADDRESSES):
        launch(
            _layer_mixing_fwd_table,
            lambda _: (1,),
            (table[first:], *padded[first : first + ADDRESSES]),
            {},
            config.TABLE,
        )
    return Group(tensors[0], table, all(t.data_ptr() % 16 == 0 for t in tensors))


def _transposed(group: Group | None) -> Group | None:
    return None if group is None else group._replace(tensor=group.tensor.mT)


def _of_layers(group: Group | None) -> tuple[Stack | None, Tensor | None]:
    """The layers as a kernel's argument, and their table; a bias is a matrix of one row."""
    if group is None:
        return None, None
    strides = group.tensor.stride()
    strides = strides if group.table is None else (0, *strides)
    outer, *inner = strides
    row, col = inner if len(inner) == 2 else (0, *inner)
    return Stack(group.tensor, outer, row, col), group.table


def _step(rank: int, *adapters: Tensor) -> int:
    """What divides the rank and all strides that are not 1, up to 16."""
    strides = (stride for adapter in adapters for stride in adapter.stride() if stride != 1)
    return math.gcd(16, rank, *strides)


def _tiles(x: Tensor, blocks: Mapping[str, int], columns: str = "BLOCK_D") -> int:
    """Tiles of a matrix."""
    num_rows, num_columns = x.shape
    return cdiv(num_rows, blocks["BLOCK_T"]) * cdiv(num_columns, blocks[columns])
