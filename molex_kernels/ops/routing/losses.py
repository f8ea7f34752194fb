"""Auxiliary losses of a router: composites of PyTorch operators, and native on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from molex_kernels import _backends, _check
from molex_kernels._dtypes import accumulate_dtype
from molex_kernels.ops.routing import op
from molex_kernels.ops.routing.types import Routing

for _name in ("load_balance_loss", "router_z_loss"):
    _backends.declare(_name, _backends.CPU, _backends.REFERENCE)

_KINDS = ("switch", "published")


def load_balance_loss(
    routing: Routing, *, temperature: float = 1.0, kind: str = "switch", impl: str | None = None
) -> Tensor:
    """Load balance: E sum_e f_e P_e, least when tokens spread evenly over the experts.

        f_e = assignments to e / (T K)
        P_e = sum_t softmax(logits / temperature)_te / T           kind="switch"
        P_e = sum_t softmax(logits / temperature)_te / (T K)       kind="published"

    "switch" is the loss of Switch Transformers (arXiv 2101.03961); "published" divides P by K too,
    as the FastMoE-based language-model code of ACMoE and MomentumSMoE does.

    Args:
        routing: expert_index [T, K] (ids outside [0, E) are counted nowhere) and logits [T, E].
        temperature: above 0; divides the logits.
        kind: "switch" or "published".
        impl: "cpu" or "reference"; None takes the fastest that supports the logits.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits); 0 for T = 0. Differentiable in the logits (twice with
        impl="reference"); f is constant. Deterministic, no host synchronisation.

    Raises:
        TypeError, ValueError: a bad argument, which the message names.
        NotImplementedError: the explicit `impl` cannot run.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    index, _, logits = routing
    _check.floating("routing.logits", logits, "T, E", (None, None))
    tokens, experts = logits.shape
    _check.index("routing.expert_index", index, "T, K", (tokens, None), logits)
    _check.number("temperature", temperature, 0.0, exclusive=True)
    _check.choice("kind", kind, _KINDS)
    chosen = _backends.select("load_balance_loss", impl, logits)
    if chosen == "cpu":
        return op.load_balance(logits, index, temperature, kind == "published")
    counts = _counts(index, experts)
    probability = (logits.to(accumulate_dtype(logits.dtype)) / temperature).softmax(1)
    assignments = max(tokens * index.shape[1], 1)
    f = counts.to(probability.dtype) / assignments
    p = probability.sum(0) / (max(tokens, 1) if kind == "switch" else assignments)
    return experts * (f * p).sum()


def _counts(index: Tensor, experts: int) -> Tensor:
    """Assignments to each expert; integers, so that their order does not matter."""
    inside = (index >= 0) & (index < experts)
    ids = torch.where(inside, index, experts).flatten().long()
    return ids.new_zeros(experts + 1).scatter_add(0, ids, torch.ones_like(ids))[:experts]


def router_z_loss(logits: Tensor, *, impl: str | None = None) -> Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906): mean over tokens of logsumexp(logits_t)^2.

    Args:
        logits: [T, E], floating.
        impl: "cpu" or "reference"; None takes the fastest that supports the logits.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits); 0 for T = 0. Differentiable (twice with
        impl="reference"). Deterministic, no host synchronisation.

    Raises:
        TypeError, ValueError: a bad argument, which the message names.
        NotImplementedError: the explicit `impl` cannot run.
    """
    _check.floating("logits", logits, "T, E", (None, None))
    if _backends.select("router_z_loss", impl, logits) == "cpu":
        return op.router_z(logits)
    z = logits.to(accumulate_dtype(logits.dtype)).logsumexp(1)
    return (z * z).sum() / max(logits.shape[0], 1)
