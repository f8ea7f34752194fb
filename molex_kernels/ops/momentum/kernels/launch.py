"""The passes of the momentum ops as launches. Nothing on the device is ever read here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from molex_kernels import _philox
from molex_kernels._triton.tuning import Config
from molex_kernels.ops.momentum.kernels import config
from molex_kernels.ops.momentum.kernels.backward import _momentum_bwd
from molex_kernels.ops.momentum.kernels.forward import _momentum_fwd


def forward(
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
    chosen = _config(width, num_states, norm_eps, backward=False)
    tiles = triton.cdiv(tokens, chosen.blocks["BLOCK_T"])
    tiles *= triton.cdiv(width, chosen.blocks["BLOCK_D"])
    if x.numel() > 0:
        _momentum_fwd[(tiles,)](
            *_strided(x),
            *_strided(f),
            *_strided(s0),
            *_strided(s1),
            *_strided(s2),
            *_strided(y),
            *(argument for state in new for argument in _strided(state)),
            *_strided(kept),
            *_strided(expert_weight),
            None if offsets is None else offsets.contiguous(),
            None if inverse is None else inverse.contiguous(),
            *_strided(norm_weight, 1),
            *_strided(norm_bias, 1),
            mu,
            gamma,
            seed,
            tokens,
            width,
            0 if offsets is None else offsets.shape[0],
            0 if expert_weight is None else expert_weight.shape[1],
            *_scalars(numbers, norm_eps, dropout_p),
            KIND=kind,
            NUM_STATES=num_states,
            HAS_STATE=s0 is not None,
            HAS_NORM=norm_eps is not None,
            HAS_DROPOUT=seed is not None,
            HAS_KEPT=keeps_f,
            IS_COMBINED=expert_weight is not None,
            **chosen.launch_options(),
        )
    return y, *new, kept


def backward(
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
    chosen = _config(width, num_states, norm_eps, backward=True)
    tiles = triton.cdiv(tokens, chosen.blocks["BLOCK_T"])
    tiles *= triton.cdiv(width, chosen.blocks["BLOCK_D"])
    has_sums = needs_norm or needs_numbers
    programs = min(tiles, config.MAX_PROGRAMS) if has_sums else tiles
    parts = {"dtype": torch.float32, "device": like.device}
    norm_parts = torch.empty(2, programs, width, **parts) if needs_norm else None
    number_parts = torch.empty(2, programs, **parts) if needs_numbers else None
    if like.numel() > 0:
        _momentum_bwd[(programs,)](
            *_strided(dy),
            *_strided(g0),
            *_strided(g1),
            *_strided(g2),
            *_strided(x),
            *_strided(f),
            *_strided(s0),
            *_strided(s1),
            *_strided(s2),
            *(
                argument
                for gradient, need in zip(out, needs, strict=False)
                for argument in _strided(gradient if need else None)
            ),
            *_strided(norm_weight, 1),
            norm_parts,
            number_parts,
            mu,
            gamma,
            seed,
            tokens,
            width,
            tiles,
            *_scalars(numbers, norm_eps, dropout_p),
            KIND=kind,
            NUM_STATES=num_states,
            HAS_STATE=s0 is not None,
            HAS_FORWARD=f is not None,
            HAS_NORM=norm_eps is not None,
            HAS_DROPOUT=seed is not None,
            FROM_STATE=from_state,
            **chosen.launch_options(),
        )
    dnorm = like.new_empty(0, dtype=torch.float32) if norm_parts is None else norm_parts.sum(1)
    dnumbers = like.new_empty(0, dtype=torch.float32)
    if number_parts is not None:
        dnumbers = number_parts.sum(1, dtype=torch.float64).float()
    return *out, dnorm, dnumbers


def _config(width: int, num_states: int, norm_eps: float | None, *, backward: bool) -> Config:
    if norm_eps is None:
        return config.tiles(width, num_states)
    return config.rows(width, num_states, backward=backward)


def _scalars(numbers: Sequence[float], norm_eps: float | None, dropout_p: float) -> tuple[Any, ...]:
    """In the kernels' order; an int would be compiled in, so all but the threshold are floats."""
    scale = 1.0 / (1.0 - dropout_p)
    return _philox.threshold(dropout_p), scale, float(norm_eps or 0.0), *map(float, numbers)


def _strided(x: Tensor | None, dims: int = 2) -> tuple[Any, ...]:
    return (None, *(0,) * dims) if x is None else (x, *_strides(x, dims))


def _strides(x: Tensor, dims: int) -> tuple[int, ...]:
    return x.stride() if x.dim() == dims else (0,) * dims
