"""Balance without a loss: a bias that decides the choice of experts and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from molex_kernels import _backends, _check
from molex_kernels._dtypes import FLOAT_DTYPES, INDEX_DTYPES
from molex_kernels.ops.routing import groups

_backends.declare("update_expert_bias", _backends.REFERENCE)


def update_expert_bias(
    expert_bias: Tensor,
    counts: Tensor,
    *,
    rate: float,
    process_group: ProcessGroup | None = None,
    impl: str | None = None,
) -> None:
    """Moves the bias of `topk_route`'s choice, in place: up for experts that got too little.

        bias_e += rate sign(mean(counts) - counts_e)

    This is the balance without a loss of DeepSeek-V3 (arXiv 2408.15664), one call after each
    optimiser step; `TopKRouter(expert_bias=True)` has bias and counts as buffers. Whole counts are
    compared exactly, as sum(counts) - E counts_e. A bias in 16 bits soon loses steps of the usual
    rate, 0.001: keep it in fp32.

    Args:
        expert_bias: [E], floating; modified in place.
        counts: [E], integer or floating: assignments to each expert since the last call, as
            `route_plan(expert_index, E).counts` has them, or the sum of several calls'.
        rate: at least 0.
        process_group: the counts are summed over the ranks of this `torch.distributed` group, so
            that equal biases stay equal; every rank must call. Outside what `torch.compile` traces.
        impl: None or "reference", the only implementation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: another `impl`.
    """
    _check.floating("expert_bias", expert_bias, "E", (None,))
    dtypes = (*INDEX_DTYPES, *FLOAT_DTYPES)
    _check.tensor("counts", counts, "E", expert_bias.shape, dtypes, expert_bias)
    _check.number("rate", rate, 0.0)
    groups.check_group(process_group)
    _backends.select("update_expert_bias", impl, expert_bias)
    with torch.no_grad():
        exact = counts.double() if counts.is_floating_point() else counts.long()
        if process_group is not None:
            (exact,) = groups.summed(process_group, exact.clone())
        missing = exact.sum() - exact.shape[0] * exact
        expert_bias.add_(missing.sign().to(expert_bias.dtype), alpha=rate)
