"""The passes of the momentum ops as launches. Nothing on the device is ever read here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from molex_kernels import _philox
from molex_kernels._triton import chips
from molex_kernels._triton.arguments import strided
from molex_kernels._triton.launch import launch
from molex_kernels._triton.sizes import cdiv
from molex_kernels._triton.tuning import Options
from molex_kernels.ops.momentum import types
from molex_kernels.ops.momentum.kernels import config
from molex_kernels.ops.momentum.kernels.backward import _momentum_bwd
from molex_kernels.ops.momentum.kernels.correction import (
    _momentum_bwd_correction,
    _momentum_fwd_squares,
)
from molex_kernels.ops.momentum.kernels.forward import _momentum_fwd


def momentum_forward(a: Any) -> tuple[Tensor, ...]:
    """y, three states (those that the rule lacks are empty), f and the squares of norms.

    f is empty unless `returns_f`, the squares are but for the rule that takes norms first.
    """
    tokens, width = a.x.shape
    state_dtype = torch.float32 if a.s0 is None else a.s0.dtype
    y = a.x.new_empty(a.x.shape)
    new = [
        a.x.new_empty(a.x.shape if i < a.num_states else (0,), dtype=state_dtype) for i in range(3)
    ]
    kept = a.f.new_empty(a.x.shape if a.returns_f else (0,))
    squares = _squares(a) if a.kind == "mars" and a.x.numel() > 0 else None
    states = [state if i < a.num_states else None for i, state in enumerate(new)]
    if a.x.numel() > 0:
        launch(
            _momentum_fwd,
            lambda b: (_tiles(a.x, b),),
            (
                *map(
                    strided,
                    (
                        a.x,
                        a.f,
                        a.f_prev,
                        a.s0,
                        a.s1,
                        a.s2,
                        y,
                        *states,
                        kept if a.returns_f else None,
                    ),
                ),
                strided(a.expert_weight),
                None if a.offsets is None else a.offsets.contiguous(),
                None if a.inverse is None else a.inverse.contiguous(),
                *map(strided, (a.norm_weight, a.norm_bias)),
                *(a.mu, a.gamma, a.seed, squares, tokens, width),
                0 if a.offsets is None else a.offsets.shape[0],
                0 if a.expert_weight is None else a.expert_weight.shape[1],
                a.sample_tokens if a.kind == "mars" else None,
                *_scalars(a),
            ),
            {
                "KIND": a.kind,
                "NUM_STATES": a.num_states,
                "HAS_NORM": a.norm_eps is not None,
            },
            _options(a.x, a.num_states, a.norm_eps, backward=False),
        )
    if squares is None:
        squares = a.x.new_empty(0, dtype=torch.float32)
    return y, *new, kept, squares


def _squares(a: Any) -> Tensor:
    """The sum of squares over each sample of the corrected f, [samples]."""
    tokens, width = a.x.shape
    weight = _weight(a)
    options = config.update(chips.of(a.x.device), width, 1, has_norm=False, backward=False)
    parts = a.x.new_empty(0, dtype=torch.float32)

    def arguments(blocks: Mapping[str, int]) -> tuple[Any, ...]:
        nonlocal parts
        parts = a.x.new_empty(cdiv(width, blocks["BLOCK_D"]), tokens, dtype=torch.float32)
        return strided(a.f), strided(a.f_prev), parts, tokens, width, weight

    launch(_momentum_fwd_squares, lambda b: (_tiles(a.x, b),), arguments, {}, options)
    return _by_sample(parts, a.sample_tokens)


def _weight(a: Any) -> float:
    return float(types.Coefficients(*a.numbers).variance_reduction)


def _by_sample(parts: Tensor, sample_tokens: int) -> Tensor:
    """[tiles, T] summed over tiles and each sample's rows."""
    return parts.view(parts.shape[0], -1, sample_tokens).sum((0, 2))


def momentum_backward(a: Any) -> tuple[Tensor, ...]:
    """Gradients of x, f, three states, the norm's weight and bias [2, D], and mu and gamma [2].

    `like` is any tensor of the result's shape. Those not needed are empty.
    """
    tokens, width = a.like.shape
    dtypes = (a.x_dtype, a.f_dtype, a.state_dtype, a.state_dtype, a.state_dtype)
    out = [
        a.like.new_empty(a.like.shape if need else (0,), dtype=dtype)
        for need, dtype in zip(a.needs, dtypes, strict=False)
    ]
    needs_norm, needs_numbers = a.needs[5:]
    corrects = a.squares is not None and a.needs[1]
    pushed = list(out)  # with the gradient of the corrected f in place of that of f
    if corrects and a.f_dtype != torch.float32:
        pushed[1] = a.like.new_empty(a.like.shape, dtype=torch.float32)
    products = None
    parts: Any = {"dtype": torch.float32, "device": a.like.device}
    norm_parts = torch.empty(2, 0, width, **parts) if needs_norm else None
    number_parts = torch.empty(2, 0, **parts) if needs_numbers else None

    def programs(blocks: Mapping[str, int]) -> int:
        tiles = _tiles(a.like, blocks)
        if not (needs_norm or needs_numbers):
            return tiles
        return config.programs(chips.of(a.like.device), tiles, blocks)

    def arguments(blocks: Mapping[str, int]) -> tuple[Any, ...]:
        nonlocal norm_parts, number_parts, products
        if needs_norm:
            norm_parts = torch.empty(2, programs(blocks), width, **parts)
        if needs_numbers:
            number_parts = torch.empty(2, programs(blocks), **parts)
        if corrects:
            products = torch.empty(cdiv(width, blocks["BLOCK_D"]), tokens, **parts)
        gradients = (g if need else None for g, need in zip(pushed, a.needs, strict=False))
        tensors = (
            a.dy,
            a.g0,
            a.g1,
            a.g2,
            a.x,
            a.f,
            a.f_prev,
            a.s0,
            a.s1,
            a.s2,
            *gradients,
            a.norm_weight,
        )
        return (
            *map(strided, tensors),
            *(
                norm_parts,
                number_parts,
                a.mu,
                a.gamma,
                a.seed,
                a.squares,
                products,
                tokens,
                width,
                _tiles(a.like, blocks),
                a.sample_tokens if a.kind == "mars" else None,
            ),
            *_scalars(a),
        )

    if a.like.numel() > 0:
        launch(
            _momentum_bwd,
            lambda b: (programs(b),),
            arguments,
            {
                "KIND": a.kind,
                "NUM_STATES": a.num_states,
                "HAS_NORM": a.norm_eps is not None,
                "FROM_STATE": a.from_state,
            },
            _options(a.like, a.num_states, a.norm_eps, backward=True),
        )
    if products is not None:
        _correct(a, pushed[1], out[1], _by_sample(products, a.sample_tokens))
    dnorm = a.like.new_empty(0, dtype=torch.float32) if norm_parts is None else norm_parts.sum(1)
    dnumbers = a.like.new_empty(0, dtype=torch.float32)
    if number_parts is not None:
        dnumbers = number_parts.sum(1, dtype=torch.float64).float()
    return *out, dnorm, dnumbers


def _correct(a: Any, g: Tensor, df: Tensor, products: Tensor) -> None:
    """The gradient of f from that of the corrected f."""
    width = g.shape[1]
    launch(
        _momentum_bwd_correction,
        lambda b: (_tiles(g, b),),
        (
            *map(strided, (g, a.f, a.f_prev, df)),
            *(a.squares, products, g.shape[0], width, a.sample_tokens, _weight(a)),
        ),
        {},
        config.update(chips.of(g.device), width, 1, has_norm=False, backward=True),
        updates=(df,),
    )


def _tiles(x: Tensor, blocks: Mapping[str, int]) -> int:
    tokens, width = x.shape
    return cdiv(tokens, blocks["BLOCK_T"]) * cdiv(width, blocks["BLOCK_D"])


def _options(x: Tensor, num_states: int, norm_eps: float | None, *, backward: bool) -> Options:
    chip, has_norm = chips.of(x.device), norm_eps is not None
    return config.update(chip, x.shape[1], num_states, has_norm=has_norm, backward=backward)


def _scalars(a: Any) -> tuple[Any, ...]:
    """In the kernels' order; an int would be compiled in, so all but the threshold are floats."""
    scale = 1.0 / (1.0 - a.dropout_p)
    coefficients: Any = types.Coefficients(*map(float, a.numbers))
    if a.kind != "mars":  # what is absent changes no other rule's machine code
        coefficients = coefficients._replace(variance_reduction=None)
    return _philox.threshold(a.dropout_p), scale, float(a.norm_eps or 0.0), coefficients
