"""The dispatch ops in plain PyTorch: the specification.

Every token goes through every expert and what does not belong is masked out. That is easy to read,
differentiable and free of data-dependent shapes, and costs E / K times the FLOPs of the kernels.

What does not belong is selected away where it comes in and where it goes out, never multiplied by
0: 0 times an overflow is NaN, forward or backward. So tokens and experts touch only one another's
numbers and gradients, as in the kernels, and an expert that nobody chose may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels._dtypes import accumulate_dtype
from molex_kernels._masks import selected


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """y_t = weight_e x_t + bias_e for the expert e whose rows hold t; 0 past the last offset."""
    rows = torch.arange(x.shape[0], device=x.device)
    expert_of_row = (rows >= offsets[:, None]).sum(0)
    experts = torch.arange(weight.shape[0], device=x.device)
    mine = expert_of_row == experts[:, None]  # [E, T]
    every = torch.matmul(selected(x, mine), _used(mine, weight).mT)  # [E, T, N]
    if bias is not None:
        every = every + bias[:, None]
    return selected(every, mine).sum(0)


def moe_mlp(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    layout: str,
    numbers: Sequence[float],
) -> Tensor:
    """y_t = sum_k expert_weight_tk FFN_{expert_index_tk}(x_t).

    FFN_e(x) = w_down_e act(w_up_e x + b_up_e) + b_down_e. `layout` is "plain", or how a gated
    hidden vector holds its halves: "concat" or "interleaved". `numbers` belong to the activation.
    """
    dtype = accumulate_dtype(x.dtype)
    experts = torch.arange(w_up.shape[0], device=x.device)
    chosen = expert_index == experts[:, None, None]  # [E, T, K]
    mine = chosen.any(-1)  # [E, T]
    gates = torch.where(chosen, expert_weight.to(dtype), 0).sum(-1)  # [E, T]
    hidden = torch.matmul(selected(x, mine), _used(mine, w_up).mT)  # [E, T, I or 2I]
    if b_up is not None:
        hidden = hidden + _used(mine, b_up)[:, None]
    acted = _activate(hidden, activation, layout, numbers)
    out = torch.matmul(acted, _used(mine, w_down).mT)  # [E, T, D]
    if b_down is not None:
        out = out + b_down[:, None]
    return (gates[..., None] * selected(out, mine).to(dtype)).sum(0).to(x.dtype)


def permute(x: Tensor, offsets: Tensor, permutation: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """rows_r = x_t of the row's token t; 0 past the last offset."""
    local = torch.arange(permutation.shape[0], device=x.device) < offsets[-1]
    return selected(x.to(accumulate_dtype(x.dtype))[permutation // top_k], local).to(x.dtype)


def unpermute(
    rows: Tensor,
    expert_weight: Tensor | None,
    offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    top_k: int,
) -> Tensor:
    """y_t = sum_k w_tk rows_{inverse_tk} over the rows before the last offset."""
    dtype = accumulate_dtype(rows.dtype)
    place = inverse.unflatten(0, (inverse.shape[0] // top_k, top_k))
    local = place < offsets[-1]
    picked = selected(rows.to(dtype)[place], local)  # [T, K, D]
    if expert_weight is not None:
        picked = torch.where(local, expert_weight.to(dtype), 0)[..., None] * picked
    return picked.sum(1).to(rows.dtype)


def _used(mine: Tensor, parameter: Tensor) -> Tensor:
    """A parameter [E, ...], with 0 in the place of what no token uses."""
    used = mine.any(1)
    return torch.where(used.view(-1, *(1,) * (parameter.dim() - 1)), parameter, 0)


def _activate(hidden: Tensor, activation: str, layout: str, numbers: Sequence[float]) -> Tensor:
    """[..., I] or, when gated, [..., 2I] -> [..., I]."""
    if layout == "plain":
        return _pointwise(hidden, activation)
    if layout == "interleaved":
        gate, up = hidden[..., 0::2], hidden[..., 1::2]
    else:
        gate, up = hidden.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        alpha, limit, up_limit, up_shift = numbers
        gate, up = _clamp(gate, gate <= limit, limit), _clamp(up, up.abs() <= up_limit, up_limit)
        return (up + up_shift) * (gate * torch.sigmoid(alpha * gate))
    return _pointwise(gate, activation) * up


def _clamp(value: Tensor, inside: Tensor, limit: float) -> Tensor:
    """What is inside passes a gradient, the bound too: there releases of PyTorch differ."""
    return torch.where(inside, value, value.detach().clamp(-limit, limit))


def _pointwise(hidden: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(hidden)
    if activation == "relu_squared":
        return F.relu(hidden).square()
    if activation == "silu":
        return F.silu(hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
