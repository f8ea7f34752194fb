"""Activations and their derivatives on fp32 tiles. All of them are 0 at 0, so padding stays 0.

`numbers` are those of `ClampedSwiGLU`, as arguments of the kernel: other values need no other
machine code. The rest have none.
"""

import triton
import triton.language as tl


@triton.jit
def activate(hidden, numbers, ACTIVATION: tl.constexpr):
    """act(hidden)."""
    if ACTIVATION == "relu":
        return tl.where(hidden < 0, 0.0, hidden)
    elif ACTIVATION == "relu_squared":
        return tl.where(hidden < 0, 0.0, hidden * hidden)
    elif ACTIVATION == "clamped_swiglu":
        clamped = tl.where(hidden > numbers.limit, numbers.limit, hidden)
        return clamped * tl.sigmoid(numbers.alpha * clamped)
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
def activate_with_slope(hidden, numbers, ACTIVATION: tl.constexpr):
    """act(hidden) and act'(hidden)."""
    if ACTIVATION == "relu":
        return tl.where(hidden < 0, 0.0, hidden), tl.where(hidden > 0, 1.0, 0.0)
    elif ACTIVATION == "relu_squared":
        positive = tl.where(hidden < 0, 0.0, hidden)
        return positive * positive, 2.0 * positive
    elif ACTIVATION == "clamped_swiglu":
        clamped = tl.where(hidden > numbers.limit, numbers.limit, hidden)
        gate, rest = _sigmoids(numbers.alpha * clamped)
        return clamped * gate, gate * (1.0 + numbers.alpha * clamped * rest)
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


@triton.jit
def up_half(up, numbers, ACTIVATION: tl.constexpr):
    """What the gate multiplies."""
    if ACTIVATION == "clamped_swiglu":
        low, high = -numbers.up_limit, numbers.up_limit
        return tl.where(up > high, high, tl.where(up < low, low, up)) + numbers.up_shift
    else:
        return up


@triton.jit
def through_gate(gradient, gate, numbers, ACTIVATION: tl.constexpr):
    """What a clamp lets through: at its bound the gradient, for NaN 0."""
    if ACTIVATION == "clamped_swiglu":
        return tl.where(gate <= numbers.limit, gradient, 0.0)
    else:
        return gradient


@triton.jit
def through_up(gradient, up, numbers, ACTIVATION: tl.constexpr):
    """As `through_gate`."""
    if ACTIVATION == "clamped_swiglu":
        return tl.where(tl.abs(up) <= numbers.up_limit, gradient, 0.0)
    else:
        return gradient
