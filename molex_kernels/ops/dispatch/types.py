"""Argument types of the dispatch ops."""

from __future__ import annotations

from dataclasses import dataclass

from molex_kernels import _check


@dataclass(frozen=True)
class ClampedSwiGLU:
    """The gated activation of gpt-oss, for `activation=`.

    act(gate, up) = (clamp(up, -up_limit, up_limit) + up_shift) g sigmoid(alpha g),
    g = min(gate, limit).

    A value at its bound passes the gradient, one beyond it and NaN do not. (`torch.clamp` agrees up
    to PyTorch 2.13; from 2.14 its gradient at the bound is 0.)

    Args:
        alpha: factor inside the sigmoid.
        limit: the largest gate, above 0.
        up_limit: the largest |up|, above 0. None is `limit`.
        up_shift: added to up behind the clamp.

    Raises:
        TypeError: what is no number.
        ValueError: a number that is not finite or not above 0.
    """

    alpha: float = 1.702
    limit: float = 7.0
    up_limit: float | None = None
    up_shift: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        _check.finite("alpha", self.alpha)
        _check.number("limit", self.limit, 0.0, exclusive=True)
        if self.up_limit is not None:
            _check.number("up_limit", self.up_limit, 0.0, exclusive=True)
        _check.finite("up_shift", self.up_shift)

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """alpha, limit, up_limit and up_shift, as the operators take them."""
        up_limit = self.limit if self.up_limit is None else self.up_limit
        return float(self.alpha), float(self.limit), float(up_limit), float(self.up_shift)


# Name -> (pointwise function, whether it acts on a gate that then multiplies the up half).
ACTIVATIONS = {
    "relu": ("relu", False),
    "relu_squared": ("relu_squared", False),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "silu": ("silu", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "geglu_tanh": ("gelu_tanh", True),
    "reglu": ("relu", True),
}
Activation = str | ClampedSwiGLU


def activation_of(activation: Activation) -> tuple[str, bool, tuple[float, ...]]:
    """The pointwise function, whether it is gated, and its numbers."""
    if isinstance(activation, ClampedSwiGLU):
        return "clamped_swiglu", True, activation.numbers
    _check.choice("activation", activation, ACTIVATIONS)
    return *ACTIVATIONS[activation], ()
