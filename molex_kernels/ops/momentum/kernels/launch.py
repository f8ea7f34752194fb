"""The passes of the momentum ops as launches. Nothing on the device is ever read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from molex_kernels import _philox
from molex_kernels._triton import chips
from molex_kernels._triton.arguments import strided
from molex_kernels._triton.launch import launch
from molex_kernels._triton.tuning import Options
from molex_kernels.ops.momentum import types
from molex_kernels.ops.momentum.kernels import config
from molex_kernels.ops.momentum.kernels.backward import _momentum_bwd
from molex_kernels.ops.momentum.kernels.forward import _momentum_fwd


def momentum_forward(
    x: Tensor,
    f: Tensor,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    expert_weight: Tensor | None,
    offsets: Tensor | None,
    inverse: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mu: Tensor | None,
    gamma: Tensor | None,
    seed: Tensor | None,
    numbers: Sequence[float],
    kind: str,
    num_states: int,
    norm_eps: float | None,
    dropout_p: float,
    keeps_f: bool,
) -> tuple[Tensor, ...]:
    """y, three states (those that the rule lacks are empty), and f (empty unless `keeps_f`)."""
    tokens, width = x.shape
    state_dtype = torch.float32 if s0 is None else s0.dtype
    y = x.new_empty(x.shape)
    new = [x.new_empty(x.shape if i < num_states else (0,), dtype=state_dtype) for i in range(3)]
    kept = f.new_empty(x.shape if keeps_f else (0,))
    states = [state if i < num_states else None for i, state in enumerate(new)]
    if x.numel() > 0:
        launch(
            _momentum_fwd,
            lambda b: (_tiles(x, b),),
            (
                *map(strided, (x, f, s0, s1, s2, y, *states, kept if keeps_f else None)),
                strided(expert_weight),
                None if offsets is None else offsets.contiguous(),
                None if inverse is None else inverse.contiguous(),
                *map(strided, (norm_weight, norm_bias)),
                *(mu, gamma, seed, tokens, width),
                0 if offsets is None else offsets.shape[0],
                0 if expert_weight is None else expert_weight.shape[1],
                *_scalars(numbers, norm_eps, dropout_p),
            ),
            {"KIND": kind, "NUM_STATES": num_states, "HAS_NORM": norm_eps is not None},
            _options(x, num_states, norm_eps, backward=False),
        )
    return y, *new, kept


def momentum_backward(
    like: Tensor,
    dy: Tensor | None,
    g0: Tensor | None,
    g1: Tensor | None,
    g2: Tensor | None,
    x: Tensor | None,
    f: Tensor | None,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    norm_weight: Tensor | None,
    mu: Tensor | None,
    gamma: Tensor | None,
    seed: Tensor | None,
    numbers: Sequence[float],
    kind: str,
    num_states: int,
    norm_eps: float | None,
    dropout_p: float,
    from_state: bool,
    x_dtype: torch.dtype,
    f_dtype: torch.dtype,
    state_dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, f, three states, the norm's weight and bias [2, D], and mu and gamma [2].

    `like` is any tensor of the result's shape. Those not needed are empty.
    """
    tokens, width = like.shape
    dtypes = (x_dtype, f_dtype, state_dtype, state_dtype, state_dtype)
    out = [
        like.new_empty(like.shape if need else (0,), dtype=dtype)
        for need, dtype in zip(needs, dtypes, strict=False)
    ]
    needs_norm, needs_numbers = needs[5:]
    parts: Any = {"dtype": torch.float32, "device": like.device}
    norm_parts = torch.empty(2, 0, width, **parts) if needs_norm else None
    number_parts = torch.empty(2, 0, **parts) if needs_numbers else None

    def programs(blocks: Mapping[str, int]) -> int:
        tiles = _tiles(like, blocks)
        return min(tiles, config.MAX_PROGRAMS) if needs_norm or needs_numbers else tiles

    def arguments(blocks: Mapping[str, int]) -> tuple[Any, ...]:
        nonlocal norm_parts, number_parts
        if needs_norm:
            norm_parts = torch.empty(2, programs(blocks), width, **parts)
        if needs_numbers:
            number_parts = torch.empty(2, programs(blocks), **parts)
        gradients = (g if need else None for g, need in zip(out, needs, strict=False))
        tensors = (dy, g0, g1, g2, x, f, s0, s1, s2, *gradients, norm_weight)
        return (
            *map(strided, tensors),
            *(norm_parts, number_parts, mu, gamma, seed, tokens, width, _tiles(like, blocks)),
            *_scalars(numbers, norm_eps, dropout_p),
        )

    if like.numel() > 0:
        launch(
            _momentum_bwd,
            lambda b: (programs(b),),
            arguments,
            {
                "KIND": kind,
                "NUM_STATES": num_states,
                "HAS_NORM": norm_eps is not None,
                "FROM_STATE": from_state,
            },
            _options(like, num_states, norm_eps, backward=True),
        )
    dnorm = like.new_empty(0, dtype=torch.float32) if norm_parts is None else norm_parts.sum(1)
    dnumbers = like.new_empty(0, dtype=torch.float32)
    if number_parts is not None:
        dnumbers = number_parts.sum(1, dtype=torch.float64).float()
    return *out, dnorm, dnumbers


def _tiles(x: Tensor, blocks: Mapping[str, int]) -> int:
    tokens, width = x.shape
    return triton.cdiv(tokens, blocks["BLOCK_T"]) * triton.cdiv(width, blocks["BLOCK_D"])


def _options(x: Tensor, num_states: int, norm_eps: float | None, *, backward: bool) -> Options:
    chip, has_norm = chips.of(x.device), norm_eps is not None
    return config.update(chip, x.shape[1], num_states, has_norm=has_norm, backward=backward)


def _scalars(numbers: Sequence[float], norm_eps: float | None, dropout_p: float) -> tuple[Any, ...]:
    """In the kernels' order; an int would be compiled in, so all but the threshold are floats."""
    scale = 1.0 / (1.0 - dropout_p)
    coefficients = types.Coefficients(*map(float, numbers))
    return _philox.threshold(dropout_p), scale, float(norm_eps or 0.0), coefficients
