"""Auxiliary losses of a router: composites of PyTorch operators, and native on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from molex_kernels import _backends, _check
from molex_kernels.ops.routing import op, reference
from molex_kernels.ops.routing.choice import check_logits
from molex_kernels.ops.routing.types import Routing

for _name in ("load_balance_loss", "router_z_loss"):
    _backends.declare(_name, _backends.CPU, _backends.REFERENCE)

_KINDS = ("switch", "published")


def load_balance_loss(
    routing: Routing,
    *,
    temperature: float = 1.0,
    kind: str = "switch",
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Load balance: E sum_e f_e P_e, least when tokens spread evenly over the experts.

        f_e = assignments to e / (T K)
        P_e = sum_t softmax(logits / temperature)_te / T           kind="switch"
        P_e = sum_t softmax(logits / temperature)_te / (T K)       kind="published"

    "switch" is the loss of Switch Transformers (arXiv 2101.03961); "published" divides P by K too,
    as the FastMoE-based language-model code of ACMoE and MomentumSMoE does. transformers'
    `load_balancing_loss_func` does not divide f by K: it is K times "switch", with the mask, too.

    Args:
        routing: expert_index [T, K] (ids outside [0, E) are counted nowhere) and logits [T, E].
        temperature: above 0; divides the logits.
        kind: "switch" or "published".
        mask: [T] bool, True for tokens that count: the loss is that of these alone, with their
            number in the place of T. Others may hold anything, NaN too, and get a gradient of 0.
            None counts all. An id of -1 is no mask: the token's probabilities count all the same.
        impl: "cpu" or "reference"; None takes the fastest that supports the logits.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits); 0 where no token counts. Differentiable in the logits
        (twice with impl="reference"); f is constant. Deterministic, no host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: the explicit `impl` cannot run.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
    index, _, logits = routing
    check_logits("routing.logits", logits)
    _check.index("routing.expert_index", index, "T, K", (logits.shape[0], None), logits)
    _check.number("temperature", temperature, 0.0, exclusive=True)
    _check.choice("kind", kind, _KINDS)
    _check_mask(mask, logits)
    arguments = (logits, index, mask, temperature, kind == "published")
    if _backends.select("load_balance_loss", impl, logits) == "reference":
        return reference.load_balance(*arguments)
    return op.load_balance(impl, *arguments)


def router_z_loss(logits: Tensor, *, mask: Tensor | None = None, impl: str | None = None) -> Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906): mean over tokens of logsumexp(logits_t)^2.

    Args:
        logits: [T, E], floating.
        mask: [T] bool, True for tokens that count, as in `load_balance_loss`; None counts all.
        impl: "cpu" or "reference"; None takes the fastest that supports the logits.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits); 0 where no token counts. Differentiable (twice with
        impl="reference"). Deterministic, no host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: the explicit `impl` cannot run.
    """
    check_logits("logits", logits)
    _check_mask(mask, logits)
    if _backends.select("router_z_loss", impl, logits) == "reference":
        return reference.router_z(logits, mask)
    return op.router_z(impl, logits, mask)


def _check_mask(mask: Tensor | None, logits: Tensor) -> None:
    if mask is not None:
        _check.tensor("mask", mask, "T", (logits.shape[0],), (torch.bool,), logits)
