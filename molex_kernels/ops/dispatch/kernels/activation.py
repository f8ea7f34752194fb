"""Activations and their derivatives on fp32 tiles. All of them are 0 at 0, so padding stays 0."""

import triton
import triton.language as tl


@triton.jit
def activate(hidden, ACTIVATION: tl.constexpr):
    """act(hidden)."""
    if ACTIVATION == "relu":
        return tl.where(hidden < 0, 0.0, hidden)
    elif ACTIVATION == "silu":
        return hidden * tl.sigmoid(hidden)
    elif ACTIVATION == "gelu":
        return 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))
    else:
        # 0.5 (1 + tanh(u)) = sigmoid(2 u), which cannot overflow.
        inner = 1.5957691216057308 * (hidden + 0.044715 * hidden * hidden * hidden)
        return hidden * tl.sigmoid(inner)


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and 1 - sigmoid(x), each to the last bits also where it is next to 0."""
    power = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + power)
    small = power * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def activate_with_slope(hidden, ACTIVATION: tl.constexpr):
    """act(hidden) and act'(hidden)."""
    if ACTIVATION == "relu":
        return tl.where(hidden < 0, 0.0, hidden), tl.where(hidden > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        gate, rest = _sigmoids(hidden)
        return hidden * gate, gate * (1.0 + hidden * rest)
    elif ACTIVATION == "gelu":
        gate = 0.5 * (1.0 + tl.erf(hidden * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * hidden * hidden)
        return hidden * gate, gate + hidden * density
    else:
        square = hidden * hidden
        gate, rest = _sigmoids(1.5957691216057308 * hidden * (1.0 + 0.044715 * square))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        return hidden * gate, gate + hidden * gate * rest * slope
