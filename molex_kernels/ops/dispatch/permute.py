"""Tokens in the order of their experts, and back: what stands around a grouped product."""

from __future__ import annotations

import torch
from torch import Tensor

from molex_kernels import _check, _dtypes
from molex_kernels._backends import CPU, REFERENCE, TRITON, declare, select
from molex_kernels.ops.dispatch import op, reference
from molex_kernels.ops.dispatch.api import check_plan
from molex_kernels.ops.routing.types import RoutePlan

declare("permute", TRITON, CPU, REFERENCE)
declare("unpermute", TRITON, CPU, REFERENCE)


def permute(
    x: Tensor, plan: RoutePlan, *, top_k: int | None = None, impl: str | None = None
) -> Tensor:
    """The tokens in the order of their experts, once for each assignment.

    rows_r = x_t,  t = plan.permutation_r // K  for r < offsets[E-1];  else 0.

    With `plan = route_plan(expert_index, E)` the rows of each expert stand together, as
    `grouped_gemm(rows, weight, plan.offsets)` takes them. Rows of ids outside [0, E) (experts of
    other ranks) come last and are 0, whatever their tokens hold.

    Differentiable in x, once: dx_t = sum_k drows of its rows, in fp32 and in the order of k.
    Deterministic. Never waits for the device.

    Args:
        x: [T, D]. fp16, bf16, fp32 (fp64: reference only). Any strides.
        plan: `route_plan(expert_index, E)` of ids [T, K]; that it belongs to x is not checked.
        top_k: K; None is the plan's assignments / T.
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports x.

    Returns:
        [T * K, D] in x's dtype, also under autocast.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, or a plan of another number of tokens.
        NotImplementedError: the explicit `impl` cannot run.
    """
    _check.floating("x", x, "T, D", (None, None))
    check_plan(plan, None, None, x)
    tokens, assignments = x.shape[0], plan.permutation.shape[0]
    if top_k is not None:
        _check.integer("top_k", top_k, 1)
    else:
        top_k = max(assignments // max(tokens, 1), 1)
    if assignments != tokens * top_k:
        raise ValueError(
            f"top_k: expected T * K = {assignments}, the plan's assignments, got {top_k} for "
            f"x of shape {list(x.shape)}"
        )
    arguments = (x, *plan[1:], top_k)
    if select("permute", impl, x) == "reference":
        return reference.permute(*arguments)
    return op.permute(impl, *arguments)


def unpermute(
    rows: Tensor,
    plan: RoutePlan,
    expert_weight: Tensor | None = None,
    *,
    top_k: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """The rows of each token, in the order of their experts, summed: back from `permute`.

    y_t = sum_k w_tk rows_r,  r = plan.inverse_{t K + k},  over r < offsets[E-1];
    w = expert_weight, or 1.

    Rows of ids outside [0, E), and the weights of such ids, may hold anything, NaN too: they change
    nothing and get a gradient of 0. `moe_mlp` is `permute`, two grouped products with the
    activation between them, and this.

    Differentiable in rows and expert_weight, once; the rows are kept for the gradient of weights
    alone. Deterministic. Never waits for the device.

    Args:
        rows: [T * K, D]. fp16, bf16, fp32 (fp64: reference only). Any strides.
        plan: `route_plan(expert_index, E)` of ids [T, K].
        expert_weight: [T, K], fp32 or of rows' dtype; None sums the rows as they are.
        top_k: K, needed without expert_weight.
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports the rows.

    Returns:
        [T, D] in rows' dtype, summed in fp32 and in the order of k. Under autocast rows keep their
        dtype and expert_weight its precision.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, or a plan of another number of rows.
        NotImplementedError: the explicit `impl` cannot run.
    """
    _check.floating("rows", rows, "T * K, D", (None, None))
    (expert_weight,) = _dtypes.kept(rows, expert_weight)
    check_plan(plan, None, None, rows)
    assignments = plan.permutation.shape[0]
    if expert_weight is not None:
        dtypes = (rows.dtype, torch.float32)
        _check.tensor("expert_weight", expert_weight, "T, K", (None, None), dtypes, rows)
        width = expert_weight.shape[1]
        if top_k is not None and top_k != width:
            raise ValueError(
                f"top_k: expected {width}, as expert_weight has columns, got {top_k!r}"
            )
        if expert_weight.dtype != rows.dtype:
            expert_weight = expert_weight.to(_dtypes.accumulate_dtype(rows.dtype))
        top_k = width
    _check.integer("top_k", top_k, 1)
    assert top_k is not None  # for the type checker alone
    tokens = assignments // top_k if expert_weight is None else expert_weight.shape[0]
    if tokens * top_k != assignments:
        raise ValueError(
            f"top_k: expected T * K = {assignments}, the plan's assignments, got {top_k}"
            + ("" if expert_weight is None else f" for T={tokens}")
        )
    if rows.shape[0] != assignments:
        raise ValueError(
            f"rows: expected shape [T * K, D] with T * K = {assignments}, the plan's assignments, "
            f"got {list(rows.shape)}"
        )
    if select("unpermute", impl, rows) == "reference":
        return reference.unpermute(rows, expert_weight, *plan[1:], top_k)
    # The gradient of the weights needs the rows; nothing else does.
    weighs = expert_weight is not None and expert_weight.requires_grad
    kept = rows.detach() if weighs else None
    return op.unpermute(impl, rows, kept, expert_weight, *plan[1:], top_k)
