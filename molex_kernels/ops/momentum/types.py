"""The update rules: small frozen dataclasses that check their ranges.

A rule turns the experts' output f of a layer, seen as a gradient, into a step that is subtracted
from the layer's input x. Its state goes from layer to layer. `mu` and `gamma` may be tensors of one
element (learned parameters); they are not read by the host, so their ranges are not checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from molex_kernels import _check

Number = float | Tensor


class Coefficients(NamedTuple):
    """What a step is computed from; each rule uses some of them. `keep` is 1 - decay.

    `rest` are 1 - beta in double precision, `scale` the bias corrections 1 / (1 - beta^t),
    `variance_reduction` is the weight of f - f_prev.
    """

    mu: float = 0.0
    gamma: float = 1.0
    beta1: float = 0.0
    rest1: float = 0.0
    beta2: float = 0.0
    rest2: float = 0.0
    beta3: float = 0.0
    rest3: float = 0.0
    alpha: float = 0.0
    eps: float = 0.0
    keep: float = 1.0
    scale1: float = 1.0
    scale2: float = 1.0
    variance_reduction: float = 0.0


@dataclass(frozen=True)
class Rule:
    """Base of the rules. `kind` names the step's formula, `states` the tensors it carries."""

    kind: ClassVar[str]
    states: ClassVar[tuple[str, ...]]

    def coefficients(self, step: int) -> Coefficients:
        """The numbers of an update; a learned one stands at 1.

        Args:
            step: the number of the update, from 1.

        Returns:
            The coefficients of the rule's formula.
        """
        raise NotImplementedError

    @property
    def learned_mu(self) -> Tensor | None:
        """`mu` where it is a tensor."""
        return _tensor(getattr(self, "mu", None))

    @property
    def learned_gamma(self) -> Tensor | None:
        """`gamma` where it is a tensor."""
        return _tensor(getattr(self, "gamma", None))

    def lookahead(self, x: Tensor, state: Any) -> Tensor:
        """The point at which to evaluate the experts: x itself for all rules but RobustMomentum.

        Args:
            x: [..., D], the layer's input.
            state: of the rule, or None in the first layer.

        Returns:
            Like x.
        """
        del state
        return x


@dataclass(frozen=True)
class HeavyBall(Rule):
    """m' = mu m + gamma f;  y = x - m'.  State (m,).

    Attributes:
        mu: the momentum, -1 < mu < 1 (the scripts of MomentumSMoE use 0.7; negative momentum is
            allowed), or a tensor of one element, which is learned.
        gamma: the step size, finite, or a tensor of one element.
    """

    mu: Number
    gamma: Number = 1.0
    kind: ClassVar[str] = "linear"
    states: ClassVar[tuple[str, ...]] = ("m",)

    def __post_init__(self) -> None:
        _check_mu(self.mu)
        _check_gamma(self.gamma)

    def coefficients(self, step: int) -> Coefficients:
        return Coefficients(mu=_float(self.mu), gamma=_float(self.gamma))


@dataclass(frozen=True)
class Nesterov(HeavyBall):
    """m' = mu m + gamma f;  y = x - (mu m' + gamma f).  State (m,).

    Attributes:
        mu: as in `HeavyBall`.
        gamma: as in `HeavyBall`.
    """

    kind: ClassVar[str] = "nesterov"


@dataclass(frozen=True)
class Adam(Rule):
    """Adam over the outputs of layers, without bias correction.

    p' = beta1 p + (1 - beta1) f;  v' = beta2 v + (1 - beta2) f^2;
    y = (1 - decay) x - gamma p' / sqrt(v' + eps).  State (p, v).

    AdamSMoE runs Adam in its first layer and heavy ball in the others; `heavy_ball_state` carries
    over.

    Attributes:
        gamma: the step size, finite, or a tensor of one element, which is learned.
        beta1: of the first moment, 0 <= beta1 < 1.
        beta2: of the second moment, 0 <= beta2 < 1.
        eps: above 0; it stands inside the root, as in the published code.
        decay: at least 0; `decay=1` is the published layer: there the input cancels.
    """

    gamma: Number = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0
    kind: ClassVar[str] = "adam"
    states: ClassVar[tuple[str, ...]] = ("p", "v")

    def __post_init__(self) -> None:
        _check_adam(self)

    def coefficients(self, step: int) -> Coefficients:
        return _adam(self)

    def heavy_ball_state(self, state: tuple[Tensor, ...], gamma: float = 1.0) -> tuple[Tensor]:
        """(gamma f,) from the state after the first layer, where p' = (1 - beta1) f.

        The published code updates m beside p and v there, and goes on with it in the next layers.

        Args:
            state: after the first layer.
            gamma: of the heavy ball.

        Returns:
            A state of `HeavyBall`.
        """
        return (state[0] * (gamma / (1 - self.beta1)),)


@dataclass(frozen=True)
class RobustMomentum(Rule):
    """The robust momentum method (Cyrus et al., arXiv 1710.04753).

    For gradients of `smoothness` L and `convexity` m_c, with kappa = L / m_c:

    m' = mu m + gamma f(x + alpha (x - x_prev));  y = x - m'.  State (m, x_prev), x_prev' = x.
    mu = kappa rho^3 / (kappa - 1);  gamma = kappa (1 - rho)^2 (1 + rho) / L;
    alpha = rho^3 / ((kappa - 1) (1 - rho)^2 (1 + rho)).

    `lookahead(x, state)` gives the point at which to evaluate the experts; in the first layer
    (state None) that is x. x_prev has the dtype of x.

    Attributes:
        smoothness: L, above `convexity`.
        convexity: m_c, above 0.
        rho: 1 - 1/sqrt(kappa) <= rho < 1: the smaller, the faster; the larger, the more robust.
    """

    smoothness: float
    convexity: float
    rho: float
    kind: ClassVar[str] = "linear"
    states: ClassVar[tuple[str, ...]] = ("m", "x_prev")

    def __post_init__(self) -> None:
        _check.number("convexity", self.convexity, 0.0, exclusive=True)
        _check.number("smoothness", self.smoothness, self.convexity, exclusive=True)
        _check.number("rho", self.rho, 1 - 1 / math.sqrt(self.kappa))
        _below_one("rho", self.rho)

    @property
    def kappa(self) -> float:
        """The condition number."""
        return self.smoothness / self.convexity

    @property
    def mu(self) -> float:
        """The momentum."""
        return self.kappa * self.rho**3 / (self.kappa - 1)

    @property
    def gamma(self) -> float:
        """The step size."""
        return self.kappa * (1 - self.rho) ** 2 * (1 + self.rho) / self.smoothness

    @property
    def alpha(self) -> float:
        """How far the look-ahead goes along the last displacement."""
        return self.rho**3 / ((self.kappa - 1) * (1 - self.rho) ** 2 * (1 + self.rho))

    def coefficients(self, step: int) -> Coefficients:
        return Coefficients(mu=self.mu, gamma=self.gamma)

    def lookahead(self, x: Tensor, state: Any) -> Tensor:
        """x + alpha (x - x_prev), differentiable in both.

        Args:
            x: [..., D], the layer's input.
            state: of the rule, or None in the first layer, where x itself is the point.

        Returns:
            Like x.
        """
        if state is None:
            return x
        return torch.lerp(state[1].to(x.dtype), x, 1 + self.alpha)


@dataclass(frozen=True)
class AdEMAMix(Rule):
    """Adam with a second, slower average (Pagliardini et al., arXiv 2409.03137).

    With the number t of this update, from 1:

    m1' = beta1 m1 + (1 - beta1) f;  v' = beta2 v + (1 - beta2) f^2;
    m2' = beta3(t) m2 + (1 - beta3(t)) f;
    y = (1 - decay) x
        - gamma (m1' / (1 - beta1^t) + alpha(t) m2') / (sqrt(v' / (1 - beta2^t)) + eps).

    State (m1, v, m2, step): the last is an int, the number of updates done. The slope of the root
    is taken as 0 where v' = 0.

    Attributes:
        gamma: as in `Adam`.
        beta1: as in `Adam`.
        beta2: as in `Adam`.
        beta3: of the slower average, 0 <= beta3 < 1.
        alpha: the weight of the slower average, at least 0.
        eps: above 0, outside the root.
        decay: at least 0.
        alpha_warmup: W, with which alpha(t) = alpha min(t / W, 1); None is no warm-up.
        beta3_warmup: W, with which beta3(t) = min(beta3, exp(log beta1 log beta3 / ((1 - t/W) log
            beta3 + t/W log beta1))), which makes the half-life grow linearly; it needs 0 < beta1 <=
            beta3. None is no warm-up.
    """

    gamma: Number = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.9999
    alpha: float = 5.0
    eps: float = 1e-8
    decay: float = 0.0
    alpha_warmup: int | None = None
    beta3_warmup: int | None = None
    kind: ClassVar[str] = "ademamix"
    states: ClassVar[tuple[str, ...]] = ("m1", "v", "m2")

    def __post_init__(self) -> None:
        _check_adam(self)
        _check.probability("beta3", self.beta3)
        _check.number("alpha", self.alpha, 0.0)
        for name in ("alpha_warmup", "beta3_warmup"):
            if getattr(self, name) is not None:
                _check.integer(name, getattr(self, name), 1)
        if self.beta3_warmup is not None and not 0 < self.beta1 <= self.beta3:
            raise ValueError(
                f"beta3_warmup: expected 0 < beta1 <= beta3, got {self.beta1} and {self.beta3}"
            )

    def coefficients(self, step: int) -> Coefficients:
        alpha, beta3 = self.alpha, self.beta3
        if self.alpha_warmup is not None:
            alpha *= min(step / self.alpha_warmup, 1.0)
        if self.beta3_warmup is not None and step < self.beta3_warmup:
            done = step / self.beta3_warmup
            low, high = math.log(self.beta1), math.log(self.beta3)
            beta3 = min(beta3, math.exp(low * high / ((1 - done) * high + done * low)))
        return _adam(self)._replace(
            beta3=beta3,
            rest3=1 - beta3,
            alpha=alpha,
            scale1=1 / (1 - self.beta1**step),
            scale2=1 / (1 - self.beta2**step),
        )


@dataclass(frozen=True)
class Signum(Rule):
    """v' = beta v + (1 - beta) sign(f);  y = x - v'.  State (v,).

    The sign has no slope: neither the experts nor the router get a gradient through it.

    Attributes:
        beta: of the average, 0 <= beta < 1.
    """

    beta: float
    kind: ClassVar[str] = "signum"
    states: ClassVar[tuple[str, ...]] = ("v",)

    def __post_init__(self) -> None:
        _check.probability("beta", self.beta)

    def coefficients(self, step: int) -> Coefficients:
        return Coefficients(mu=self.beta, gamma=1 - self.beta)


@dataclass(frozen=True)
class Mars(Rule):
    """Adam on a variance-reduced gradient (MARS, arXiv 2411.10438), as published for expert layers.

    c = f + correction beta1 / (1 - beta1) (f - f_prev);  c^ = c / max(1, ||c||_F);
    p' = beta1 p + (1 - beta1) c^;  v' = beta2 v + (1 - beta2) c^^2;
    y = (1 - decay) x - gamma p' / sqrt(v' + eps).  State (p, v, f_prev), f_prev' = f.

    The norm is over a sample, the last two dimensions [M, D] of f. No gradient goes through f_prev,
    as published. f_prev has the dtype of f, and is 0 before the first layer, as published: MARS
    itself would have c = f there. The published code writes both f and its step with the opposite
    sign, which is the same update.

    On a CPU and under Triton, a first pass over f and f_prev sums the squares of c; the update
    corrects and clips what it reads, so neither c nor c^ is written. The backward pass is two more:
    the update's, which sums c^ times its gradient over a sample, and one from that to df.

    Attributes:
        gamma: as in `Adam`.
        beta1: as in `Adam`.
        beta2: as in `Adam`.
        eps: above 0, inside the root.
        decay: at least 0.
        correction: the weight of the variance reduction, at least 0.
    """

    gamma: Number = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0
    correction: float = 1.0
    kind: ClassVar[str] = "mars"
    states: ClassVar[tuple[str, ...]] = ("p", "v", "f_prev")

    def __post_init__(self) -> None:
        _check_adam(self)
        _check.number("correction", self.correction, 0.0)

    @property
    def _weight(self) -> float:
        return self.correction * self.beta1 / (1 - self.beta1)

    def coefficients(self, step: int) -> Coefficients:
        return _adam(self)._replace(variance_reduction=self._weight)

    def corrected(self, f: Tensor, f_prev: Tensor | None) -> Tensor:
        """The clipped c^ of the equations, in at least fp32.

        Args:
            f: the experts' output.
            f_prev: that of the layer before; None is 0.

        Returns:
            Like f.
        """
        return corrected(f, f_prev, self._weight)


def corrected(f: Tensor, f_prev: Tensor | None, weight: float) -> Tensor:
    """c^ of `Mars` in plain PyTorch, which specifies it; `weight` is that of f - f_prev."""
    wide = f.to(torch.promote_types(f.dtype, torch.float32))
    c = (1 + weight) * wide
    if f_prev is not None:
        c = c - weight * f_prev.detach().to(wide.dtype)
    dims = tuple(range(max(c.dim() - 2, 0), c.dim()))
    # The clamp keeps the root's slope finite for a sample of zeros, where it does not count.
    norm = c.square().sum(dims, keepdim=True).clamp_min(1.0).sqrt()
    return c / norm


def _adam(rule: Any) -> Coefficients:
    return Coefficients(
        gamma=_float(rule.gamma),
        beta1=rule.beta1,
        rest1=1 - rule.beta1,
        beta2=rule.beta2,
        rest2=1 - rule.beta2,
        eps=rule.eps,
        keep=1 - rule.decay,
    )


def _tensor(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _float(value: Number) -> float:
    return 1.0 if isinstance(value, Tensor) else float(value)


def _check_learned(name: str, value: Tensor) -> None:
    _check.trailing(name, value, "1", 0)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a tensor of one element, got {list(value.shape)}")


def _check_mu(mu: Number) -> None:
    if isinstance(mu, Tensor):
        _check_learned("mu", mu)
        return
    _check.number("mu", mu, -1.0, exclusive=True)
    _below_one("mu", mu)


def _check_gamma(gamma: Number) -> None:
    if isinstance(gamma, Tensor):
        _check_learned("gamma", gamma)
    else:
        _check.number("gamma", gamma, -math.inf)


def _below_one(name: str, value: float) -> None:
    if value >= 1:
        raise ValueError(f"{name}: expected below 1, got {value}")


def _check_adam(rule: Any) -> None:
    _check_gamma(rule.gamma)
    _check.probability("beta1", rule.beta1)
    _check.probability("beta2", rule.beta2)
    _check.number("eps", rule.eps, 0.0, exclusive=True)
    _check.number("decay", rule.decay, 0.0)
