"""Operators of the momentum ops and their gradient.

One pair of operators serves every rule, with the experts' outputs already summed or not. `numbers`
are a rule's coefficients; `mu` and `gamma` take the place of the first two where they are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molex_kernels import _operators
from molex_kernels._differentiable import Differentiable
from molex_kernels._dtypes import HALF_DTYPES
from molex_kernels.ops.dispatch import op as dispatch
from molex_kernels.ops.momentum import reference
from molex_kernels.ops.momentum.types import Coefficients, corrected

Tensors = tuple[Tensor, ...]

KEEP = 10  # where 1 - decay stands among the numbers
_PLACES: Any = {"triton": "molex_kernels.ops.momentum.kernels.launch", "native": ("cpu",)}
_STATES = "Tensor? s0, Tensor? s1, Tensor? s2"
_OPTIONS = (
    "float[] numbers, str kind, int num_states, float? norm_eps, float dropout_p, "
    "SymInt sample_tokens"
)


class Arguments(NamedTuple):
    """Of an update: f, or the experts that give it; x, f and f_prev are [T, D].

    The kind "mars" alone takes f_prev, and a norm over each `sample_tokens` rows in turn.
    """

    x: Tensor
    f: Tensor | None
    s0: Tensor | None
    s1: Tensor | None
    s2: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    mu: Tensor | None
    gamma: Tensor | None
    numbers: tuple[float, ...]
    kind: str
    num_states: int
    norm_eps: float | None
    dropout_p: float
    sample_tokens: int = 0
    f_prev: Tensor | None = None
    seed: Tensor | None = None
    expert_input: Any = None
    expert_weight: Any = None
    w_up: Tensor | None = None
    w_down: Tensor | None = None
    b_up: Tensor | None = None
    b_down: Tensor | None = None
    offsets: Tensor | None = None
    permutation: Tensor | None = None
    inverse: Tensor | None = None
    activation: str = ""
    layout: str = ""
    activation_numbers: tuple[float, ...] = ()

    @property
    def acts(self) -> tuple[Any, ...]:
        """How the experts act, as the operators take it."""
        return self[-3:]

    @property
    def options(self) -> tuple[Any, ...]:
        """As the operators take them."""
        return self[9:15]

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What may want a gradient."""
        return (*self[:9], *self[17:23])

    @property
    def from_state(self) -> bool:
        """Whether the new state, which lives on anyway, stands in for f in the backward pass.

        One of 16 bits has been rounded since the norm saw it, which f as it was given has not.
        """
        rounded = self.f is not None and self.s0 is not None and self.s0.dtype in HALF_DTYPES
        return self.num_states == 1 and self.gamma is None and not (rounded and self.norm_eps)

    @property
    def needs_step(self) -> bool:
        """Whether the backward pass computes the step anew: a fixed linear one, it does not."""
        learned = self.mu is not None or self.gamma is not None
        return self.num_states > 1 or self.norm_eps is not None or learned

    @property
    def passes_x(self) -> bool:
        """Whether x goes through as it is, without a norm and decay; so does its gradient."""
        return self.norm_eps is None and self.numbers[KEEP] == 1.0


_arguments: Any = Arguments  # of other values, in the same places


def num_samples(kind: str, tokens: int, sample_tokens: int) -> int:
    """How many norms an update takes first."""
    return tokens // sample_tokens if kind == "mars" and tokens > 0 else 0


def _forward_fake(a: Any) -> Tensors:
    dtype = torch.float32 if a.s0 is None else a.s0.dtype
    sizes = [a.x.shape if index < a.num_states else (0,) for index in range(3)]
    new = [a.x.new_empty(size, dtype=dtype) for size in sizes]
    kept = a.f.new_empty(a.x.shape if a.returns_f else (0,))
    samples = num_samples(a.kind, a.x.shape[0], a.sample_tokens)
    return a.x.new_empty(a.x.shape), *new, kept, a.x.new_empty((samples,), dtype=torch.float32)


def _backward_fake(a: Any) -> Tensors:
    sizes = (*(a.like.shape,) * 5, (2, a.like.shape[1]), (2,))
    dtypes = (a.x_dtype, a.f_dtype, *(a.state_dtype,) * 3, torch.float32, torch.float32)
    return tuple(
        a.like.new_empty(size if need else (0,), dtype=dtype)
        for size, dtype, need in zip(sizes, dtypes, a.needs, strict=True)
    )


def _reference(a: Any) -> Tensors:
    f, numbers = a.f, Coefficients(*a.numbers)
    if a.expert_weight is not None:
        zeros = f.new_zeros(1, f.shape[1])  # in the rows of experts that live on another rank
        rows = torch.cat([f, zeros])[a.inverse.where(a.inverse < a.offsets[-1], f.shape[0])]
        rows = rows.view(*a.expert_weight.shape, -1).float()
        f = (rows * a.expert_weight.float()[:, :, None]).sum(1)
        f = reference.dropout(f.to(a.f.dtype), a.dropout_p, a.seed)
    if samples := num_samples(a.kind, a.x.shape[0], a.sample_tokens):
        previous = None if a.f_prev is None else a.f_prev.unflatten(0, (samples, -1))
        c = corrected(f.unflatten(0, (samples, -1)), previous, numbers.variance_reduction)
        f = c.view(a.x.shape)
    state = [s for s in (a.s0, a.s1, a.s2) if s is not None]
    norm = None if a.norm_eps is None else (a.norm_weight, a.norm_bias, a.norm_eps)
    return reference.update(a.x, f, state, a.kind, numbers, a.mu, a.gamma, norm, a.num_states)


_forward = _operators.operator(
    "momentum_fwd",
    f"(Tensor x, Tensor f, Tensor? f_prev, {_STATES}, Tensor? expert_weight, Tensor? offsets, "
    "Tensor? inverse, Tensor? norm_weight, Tensor? norm_bias, Tensor? mu, Tensor? gamma, "
    f"Tensor? seed, {_OPTIONS}, bool returns_f) -> (Tensor y, Tensor n0, Tensor n1, "
    "Tensor n2, Tensor kept, Tensor squares)",
    _forward_fake,
    function="momentum_forward",
    reference=_reference,
    **_PLACES,
)
_backward = _operators.operator(
    "momentum_bwd",
    "(Tensor like, Tensor? dy, Tensor? g0, Tensor? g1, Tensor? g2, Tensor? x, Tensor? f, "
    f"{_STATES}, Tensor? norm_weight, Tensor? mu, Tensor? gamma, Tensor? f_prev, Tensor? squares, "
    f"Tensor? seed, {_OPTIONS}, bool from_state, ScalarType x_dtype, ScalarType f_dtype, "
    "ScalarType state_dtype, bool[] needs) -> (Tensor dx, Tensor df, Tensor ds0, Tensor ds1, "
    "Tensor ds2, Tensor dnorm, Tensor dnumbers)",
    _backward_fake,
    function="momentum_backward",
    **_PLACES,
)


def _run(a: Arguments, impl: tuple[str, ...], keeps: bool) -> tuple[Tensors, Tensor, Any, Tensor]:
    """y and the new state; f, or what is kept; the pre-activations; squares of norms."""
    f, pre_activation = a.f, None
    if f is None:
        experts = (a.w_up, a.w_down, a.b_up, a.b_down, a.expert_weight.shape[1])
        f, pre_activation = dispatch.moe_experts.forward(
            *(a.expert_input, a.offsets, a.permutation, *experts, *a.acts, keeps),
            *impl,
        )
    returns_f = keeps and a.f is None and a.needs_step and not a.from_state
    *results, kept, squares = _forward(
        *(a.x, f, a.f_prev, a.s0, a.s1, a.s2, a.expert_weight, a.offsets, a.inverse),
        *(a.norm_weight, a.norm_bias, a.mu, a.gamma, a.seed, *a.options, returns_f),
        *impl,
    )
    return tuple(results[: 1 + a.num_states]), kept if returns_f else f, pre_activation, squares


class _Momentum(Differentiable):
    def call(self, impl: tuple[str, ...], *given: Any) -> tuple[Any, ...]:
        a = _arguments(*given)
        results, f, pre_activation, squares = _run(a, impl, True)
        rule: tuple[Tensor | None, ...] = (None,) * 10
        learned: Any = (None,) * 4
        from_state = False
        if a.needs_step:
            x = a.x if a.norm_eps is not None else None
            from_state = a.from_state
            f = results[1] if from_state else f
            rule = (x, f, a.s0, a.s1, a.s2, a.norm_weight, a.mu, a.gamma)
            rule = (*rule, a.f_prev, squares if a.kind == "mars" else None)
            parameters = (a.norm_weight, a.norm_bias, a.mu, a.gamma)
            learned = [None if p is None else (p.dtype, p.shape) for p in parameters]
        experts: tuple[Tensor | None, ...] = ()
        if a.f is None:
            plan = (a.offsets, a.permutation, a.inverse)
            experts = (
                *(
                    a.expert_input,
                    pre_activation,
                    a.expert_weight,
                    *plan,
                    a.w_up,
                    a.w_down,
                    a.b_down,
                ),
            )
        source = a.expert_input if a.f is None else a.f
        dtypes = (a.x.dtype, source.dtype, results[1].dtype)
        constants = ((*a.options, from_state), dtypes, learned, a.passes_x)
        return results, (*rule, a.seed, *experts), (impl, a.acts, constants)

    def gradients(
        self, upstream: Any, saved: Any, constants: Any, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        impl, acts, rule = constants
        named = _arguments(*needs[1:])  # what wants a gradient
        experts = [*named[17:23]]
        found = self._rule(impl, upstream, saved[:11], rule, named, named.f or any(experts))
        gradients: list[Tensor | None] = [None] * len(needs)
        gradients[1:10] = found
        if found[1] is not None and any(experts):
            gradients[2] = None
            inner = dispatch.moe_mlp.backward(found[1], *saved[11:], *acts, experts, *impl)
            gradients[18:24] = [g if n else None for g, n in zip(inner, experts, strict=True)]
        return gradients

    def _rule(
        self, impl: Any, upstream: Any, saved: Any, constants: Any, needs: Any, needs_f: bool
    ) -> list[Tensor | None]:
        """Gradients of x, f, the three states, the norm's weight and bias, mu and gamma."""
        options, dtypes, learned, passes_x = constants
        dy, *states = upstream
        like = next((g for g in upstream if g is not None), None)
        if like is None:
            return [None] * 9
        wanted = [
            needs.x and not passes_x and dy is not None,
            needs_f,
            *needs[2:5],
            (needs.norm_weight or needs.norm_bias) and dy is not None,
            needs.mu or needs.gamma,
        ]
        dx = dy if needs.x and passes_x else None
        if not any(wanted):
            return [dx] + [None] * 8
        padded = (*states, *(None,) * (3 - len(states)))
        found = _backward(like, dy, *padded, *saved, *options, *dtypes, wanted, *impl)
        found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        rows = [(found[5], 0), (found[5], 1), (found[6], 0), (found[6], 1)]
        return [
            *(found[0] if dx is None else dx, *found[1:5]),
            *(
                sums[row].to(meta[0]).view(meta[1]) if sums is not None and meta and need else None
                for (sums, row), meta, need in zip(rows, learned, needs[5:9], strict=True)
            ),
        ]


_momentum = _Momentum("momentum_update, moe_mlp_momentum")


def update(impl: str | None, a: Arguments) -> Tensors:
    """y and the new state, through autograd where a gradient is wanted."""
    name = (impl,) if impl else ()
    _momentum.refuse_tangents(a)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in a.differentiable):
        return _momentum.apply(name, *(a if a.f is None else a[:16]))
    return _run(a, name, False)[0]
