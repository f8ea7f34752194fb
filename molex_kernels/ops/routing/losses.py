"""Auxiliary losses of a router: composites of PyTorch operators, and native on a CPU.

Over a process group each rank gets its own tokens' part of the loss of all tokens, times the number
of ranks. So the mean over the ranks is that loss, and gradients that are averaged over the ranks,
as DDP and FSDP average them, are its gradients. No gradient crosses ranks: what is summed over them
are numbers of assignments, tokens and sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from molex_kernels import _backends, _check
from molex_kernels.ops.routing import groups, op, reference
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
    sequence: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor:
    """Load balance: E sum_e f_e P_e, least when tokens spread evenly over the experts.

        f_e = assignments to e / (T K)
        P_e = sum_t softmax(logits / temperature)_te / T           kind="switch"
        P_e = sum_t softmax(logits / temperature)_te / (T K)       kind="published"

    "switch" is the loss of Switch Transformers (arXiv 2101.03961); "published" divides P by K too,
    as the FastMoE-based language-model code of ACMoE and MomentumSMoE does. transformers'
    `load_balancing_loss_func` does not divide f by K: it is K times "switch", with the mask, too.

    With `sequence` the loss is the mean of the sequences' own losses, each with its number of
    tokens in the place of T, as DeepSeek-V3's sequence-wise balance (arXiv 2412.19437; its P is of
    normalised scores). With `process_group` f is of all ranks' tokens (arXiv 2501.11873).

    Args:
        routing: expert_index [T, K] (ids outside [0, E) are counted nowhere) and logits [T, E].
        temperature: above 0; divides the logits.
        kind: "switch" or "published".
        mask: [T] bool, True for tokens that count: the loss is that of these alone, with their
            number in the place of T. Others may hold anything, NaN too, and get a gradient of 0.
            None counts all. An id of -1 is no mask: the token's probabilities count all the same.
        sequence: [T] int64 or int32, the sequence of each token: any numbers in any order, equal
            ones are one sequence. Sequences without a token that counts take no part in the mean.
            None: all tokens are one.
        process_group: of `torch.distributed`: the loss of the tokens of all its ranks, whose
            sequences are others on each. Every rank must call, and gets its own tokens' part times
            the number of ranks: the mean over the ranks is the loss of all tokens, and so are
            gradients averaged over the ranks, as DDP does, its gradients. Outside what
            `torch.compile` traces.
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
    experts = check_logits("routing.logits", logits)
    _check.index("routing.expert_index", index, "T, K", (logits.shape[0], None), logits)
    _check.number("temperature", temperature, 0.0, exclusive=True)
    _check.choice("kind", kind, _KINDS)
    _check_mask(mask, logits)
    if sequence is not None:
        _check.index("sequence", sequence, "T", (logits.shape[0],), logits)
    groups.check_group(process_group)
    chosen = _backends.select("load_balance_loss", impl, logits)
    totals, ranks = None, 1
    if process_group is not None:
        own = reference.balance_totals(index, experts, mask, sequence)
        (totals,), ranks = groups.summed(process_group, own), process_group.size()
    options = (temperature, kind == "published", ranks)
    arguments = (logits, index, mask, sequence, totals, *options)
    if chosen == "reference":
        return reference.load_balance(*arguments)
    return op.load_balance(impl, *arguments)


def router_z_loss(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906): mean over tokens of logsumexp(logits_t)^2.

    Args:
        logits: [T, E], floating.
        mask: [T] bool, True for tokens that count, as in `load_balance_loss`; None counts all.
        process_group: the mean over the tokens of all ranks, as in `load_balance_loss`: each rank
            gets a loss of which the mean over the ranks is that of all tokens.
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
    groups.check_group(process_group)
    chosen = _backends.select("router_z_loss", impl, logits)
    total, ranks = None, 1
    if process_group is not None:
        own = reference.token_number(logits, mask)
        (total,), ranks = groups.summed(process_group, own), process_group.size()
    if chosen == "reference":
        return reference.router_z(logits, mask, total, ranks)
    return op.router_z(impl, logits, mask, total, ranks)


def _check_mask(mask: Tensor | None, logits: Tensor) -> None:
    if mask is not None:
        _check.tensor("mask", mask, "T", (logits.shape[0],), (torch.bool,), logits)
