"""The passes of the momentum ops as launches. Nothing on the device is ever read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from molex_kernels.ops.momentum.kernels.forward import _momentum_fwd


def momentum_forward(a: Any) -> tuple[Tensor, ...]:
    """y, three states (those that the rule lacks are empty), and f (empty unless `keeps_f`)."""
    tokens, width = a.x.shape
    state_dtype = torch.float32 if a.s0 is None else a.s0.dtype
    y = a.x.new_empty(a.x.shape)
    new = [
        a.x.new_empty(a.x.shape if i < a.num_states else (0,), dtype=state_dtype) for i in range(3)
    ]
    kept = a.f.new_empty(a.x.shape if a.returns_f else (0,))
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
                *(a.mu, a.gamma, a.seed, tokens, width),
                0 if a.offsets is None else a.offsets.shape[0],
                0 if a.expert_weight is None else a.expert_weight.shape[1],
                *_scalars(a.numbers, a.norm_eps, a.dropout_p),
            ),
            {
                "KIND": a.kind,
                "NUM_STATES": a.num_states,
                "HAS_NORM": a.norm_eps is not None,
            },
            _options(a.x, a.num_states, a.norm_eps, backward=False),
        )
    return y, *new, kept


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
    parts: Any = {"dtype": torch.float32, "device": a.like.device}
    norm_parts = torch.empty(2, 0, width, **parts) if needs_norm else None
    number_parts = torch.empty(2, 0, **parts) if needs_numbers else None

    def programs(blocks: Mapping[str, int]) -> int:
        tiles = _tiles(a.like, blocks)
        if not (needs_norm or needs_numbers):
            return tiles
        return config.programs(chips.of(a.like.device), tiles, blocks)

    def arguments(blocks: Mapping[str, int]) -> tuple[Any, ...]:
        nonlocal norm_parts, number_parts
        if needs_norm:
            norm_parts = torch.empty(2, programs(blocks), width, **parts)
        if needs_numbers:
            number_parts = torch.empty(2, programs(blocks), **parts)
        gradients = (g if need else None for g, need in zip(out, a.needs, strict=False))
        tensors = (
            a.dy,
            a.g0,
            a.g1,
            a.g2,
            a.x,
            a.f,
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
                tokens,
                width,
                _tiles(a.like, blocks),
            ),
            *_scalars(a.numbers, a.norm_eps, a.dropout_p),
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
    dnorm = a.like.new_empty(0, dtype=torch.float32) if norm_parts is None else norm_parts.sum(1)
    dnumbers = a.like.new_empty(0, dtype=torch.float32)
    if number_parts is not None:
        dnumbers = number_parts.sum(1, dtype=torch.float64).float()
    return *out, dnorm, dnumbers


def _tiles(x: Tensor, blocks: Mapping[str, int]) -> int:
    tokens, width = x.shape
    return cdiv(tokens, blocks["BLOCK_T"]) * cdiv(width, blocks["BLOCK_D"])


def _options(x: Tensor, num_states: int, norm_eps: float | None, *, backward: bool) -> Options:
    chip, has_norm = chips.of(x.device), norm_eps is not None
    return config.update(chip, x.shape[1], num_states, has_norm=has_norm, backward=backward)


def _scalars(numbers: Sequence[float], norm_eps: float | None, dropout_p: float) -> tuple[Any, ...]:
    """In the kernels' order; an int would be compiled in, so all but the threshold are floats."""
    scale = 1.0 / (1.0 - dropout_p)
    coefficients = types.Coefficients(*map(float, numbers))
    return _philox.threshold(dropout_p), scale, float(norm_eps or 0.0), coefficients
