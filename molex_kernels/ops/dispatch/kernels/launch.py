"""The passes of the dispatch ops as launches. Nothing on the device is ever read here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from molex_kernels.ops.dispatch.kernels import starts
from molex_kernels.ops.dispatch.kernels.starts import Rows


def grouped_gemm_forward(a: Any) -> Tensor:
    rows = Rows(a.offsets.contiguous(), a.x.shape[0])
    out = a.x.new_empty(a.x.shape[0], a.weight.shape[1])
    starts.gemm(a.x, a.weight, a.bias, out, rows, zero_tail=True)
    return out


def grouped_gemm_backward(a: Any) -> tuple[Tensor, ...]:
    needs_x, needs_weight, needs_bias = a.needs
    rows = Rows(a.offsets.contiguous(), a.x.shape[0])
    dx = a.x.new_empty(a.x.shape if needs_x else (0,))
    dweight = a.x.new_empty(a.weight.shape if needs_weight else (0,))
    dbias = a.x.new_empty(a.weight.shape[:2] if needs_bias else (0,))
    if needs_x:
        starts.gemm(a.dy, a.weight.mT, None, dx, rows, zero_tail=True)
    if needs_weight:
        starts.wgrad(a.dy, a.x, dweight, rows)
    if needs_bias:
        starts.bias(a.dy, None, dbias, rows)
    return dx, dweight, dbias


def moe_experts_forward(a: Any) -> tuple[Tensor, Tensor]:
    """In expert order: the experts' outputs and the pre-activation, empty unless it is kept.

    Rows of experts that are not local are 0.
    """
    plan = (a.offsets.contiguous(), a.permutation.shape[0], a.permutation.contiguous())
    return _experts(a, Rows(*plan, top_k=a.top_k), zero_tail=True)


def _experts(a: Any, rows: Rows, *, zero_tail: bool) -> tuple[Tensor, Tensor]:
    kept = a.x.new_empty(rows.num_rows if a.keeps_pre_activation else 0, a.w_up.shape[1])
    acted = a.x.new_empty(rows.num_rows, a.w_down.shape[2])
    starts.gemm(
        a.x,
        a.w_up,
        a.b_up,
        acted,
        rows,
        gathered=True,
        activation=a.activation,
        layout=a.layout,
        numbers=a.numbers,
        hidden=kept if a.keeps_pre_activation else None,
        zero_tail=a.keeps_pre_activation,
    )
    expert_outputs = a.x.new_empty(rows.num_rows, a.x.shape[1])
    starts.gemm(acted, a.w_down, a.b_down, expert_outputs, rows, zero_tail=zero_tail)
    return expert_outputs, kept


def moe_mlp_forward(a: Any) -> tuple[Tensor, Tensor]:
    """The output and, in expert order, the pre-activation (empty unless `keeps_pre_activation`)."""
    rows = Rows.of_plan(a.offsets, a.permutation, a.inverse, a.expert_weight.shape[1])
    # The combine skips rows of experts that are not local, so they stay unwritten.
    expert_outputs, kept = _experts(a, rows, zero_tail=False)
    out = a.x.new_empty(a.x.shape)
    starts.combine(expert_outputs, a.expert_weight, out, rows)
    return out, kept


def moe_mlp_backward(a: Any) -> tuple[Tensor, ...]:
    """Gradients of x, expert_weight, w_up, w_down, b_up and b_down; those not needed are empty.

    With the row's token t and weight w:  dS = <w_down^T dy_t, A> + <dy_t, b_down>,
    dA = w w_down^T dy_t,  dH = dA act'(H),  A' = w A,
    dw_down = sum dy_t A'^T,  dw_up = sum dH x_t^T.
    """
    needs_x, needs_weight, needs_w_up, needs_w_down, needs_b_up, needs_b_down = a.needs
    rows = Rows.of_plan(a.offsets, a.permutation, a.inverse, a.expert_weight.shape[1])
    needs_dhidden = needs_x or needs_w_up or needs_b_up
    dhidden = a.pre_activation.new_empty(a.pre_activation.shape) if needs_dhidden else None
    weighted = a.x.new_empty(rows.num_rows, a.w_down.shape[2]) if needs_w_down else None
    partial = None
    if needs_dhidden or needs_w_down or needs_weight:
        partial = starts.hidden(
            a.dy,
            a.w_down,
            a.pre_activation,
            a.expert_weight,
            dhidden,
            weighted,
            rows,
            a.activation,
            a.layout,
            a.numbers,
            needs_weight,
        )

    dx = a.x.new_empty(a.x.shape if needs_x else (0,))
    dweight = a.expert_weight.new_empty(a.expert_weight.shape if needs_weight else (0,))
    dw_up = a.x.new_empty(a.w_up.shape if needs_w_up else (0,))
    dw_down = a.x.new_empty(a.w_down.shape if needs_w_down else (0,))
    db_up = a.x.new_empty(a.w_up.shape[:2] if needs_b_up else (0,))
    db_down = a.x.new_empty(a.w_down.shape[:2] if needs_b_down else (0,))
    if needs_weight:
        starts.weight(partial, a.dy, a.b_down, dweight, rows)
    if needs_w_down:
        starts.wgrad(a.dy, weighted, dw_down, rows, left_gathered=True)
    if needs_b_down:
        starts.bias(a.dy, a.expert_weight, db_down, rows)
    if needs_w_up:
        starts.wgrad(dhidden, a.x, dw_up, rows, right_gathered=True)
    if needs_b_up:
        starts.bias(dhidden, None, db_up, rows)
    if needs_x:
        expert_outputs = a.x.new_empty(rows.num_rows, a.x.shape[1])
        starts.gemm(dhidden, a.w_up.mT, None, expert_outputs, rows)
        starts.combine(expert_outputs, None, dx, rows)
    return dx, dweight, dw_up, dw_down, db_up, db_down
