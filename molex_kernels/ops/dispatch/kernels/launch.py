"""The passes of the dispatch ops as launches. Nothing on the device is ever read here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from molex_kernels.ops.dispatch.kernels import starts
from molex_kernels.ops.dispatch.kernels.starts import Rows


def grouped_gemm_forward(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    rows = Rows(offsets.contiguous(), x.shape[0])
    out = x.new_empty(x.shape[0], weight.shape[1])
    starts.gemm(x, weight, bias, out, rows, zero_tail=True)
    return out


def grouped_gemm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    needs_x, needs_weight, needs_bias = needs
    rows = Rows(offsets.contiguous(), x.shape[0])
    dx = x.new_empty(x.shape if needs_x else (0,))
    dweight = x.new_empty(weight.shape if needs_weight else (0,))
    dbias = x.new_empty(weight.shape[:2] if needs_bias else (0,))
    if needs_x:
        starts.gemm(dy, weight.mT, None, dx, rows, zero_tail=True)
    if needs_weight:
        starts.wgrad(dy, x, dweight, rows)
    if needs_bias:
        starts.bias(dy, None, dbias, rows)
    return dx, dweight, dbias


def moe_experts_forward(
    x: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    top_k: int,
    activation: str,
    layout: str,
    keeps_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """In expert order: the experts' outputs and the pre-activation (empty unless `keeps_hidden`).

    Rows of experts that are not local are 0.
    """
    plan = (offsets.contiguous(), permutation.shape[0], permutation.contiguous())
    weights = (w_up, w_down, b_up, b_down)
    rows = Rows(*plan, top_k=top_k)
    return _experts(x, *weights, rows, activation, layout, keeps_hidden, zero_tail=True)


def _experts(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    rows: Rows,
    activation: str,
    layout: str,
    keeps_hidden: bool,
    *,
    zero_tail: bool,
) -> tuple[Tensor, Tensor]:
    kept = x.new_empty(rows.num_rows if keeps_hidden else 0, w_up.shape[1])
    acted = x.new_empty(rows.num_rows, w_down.shape[2])
    starts.gemm(
        x,
        w_up,
        b_up,
        acted,
        rows,
        gathered=True,
        activation=activation,
        layout=layout,
        hidden=kept if keeps_hidden else None,
        zero_tail=keeps_hidden,
    )
    packed = x.new_empty(rows.num_rows, x.shape[1])
    starts.gemm(acted, w_down, b_down, packed, rows, zero_tail=zero_tail)
    return packed, kept


def moe_mlp_forward(
    x: Tensor,
    expert_weight: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    layout: str,
    keeps_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """The output and, in expert order, the pre-activation (empty unless `keeps_hidden`)."""
    rows = Rows.of_plan(offsets, permutation, inverse, expert_weight.shape[1])
    weights = (w_up, w_down, b_up, b_down)
    # The combine skips rows of experts that are not local, so they stay unwritten.
    packed, kept = _experts(x, *weights, rows, activation, layout, keeps_hidden, zero_tail=False)
    out = x.new_empty(x.shape)
    starts.combine(packed, expert_weight, out, rows)
    return out, kept


def moe_mlp_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    expert_weight: Tensor,
    offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str,
    layout: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, expert_weight, w_up, w_down, b_up and b_down; those not needed are empty.

    With the row's token t and weight w:  dS = <w_down^T dy_t, A> + <dy_t, b_down>,
    dA = w w_down^T dy_t,  dH = dA act'(H),  A' = w A,
    dw_down = sum dy_t A'^T,  dw_up = sum dH x_t^T.
    """
    needs_x, needs_weight, needs_w_up, needs_w_down, needs_b_up, needs_b_down = needs
    rows = Rows.of_plan(offsets, permutation, inverse, expert_weight.shape[1])
    needs_dhidden = needs_x or needs_w_up or needs_b_up
    dhidden = hidden.new_empty(hidden.shape) if needs_dhidden else None
    weighted = x.new_empty(rows.num_rows, w_down.shape[2]) if needs_w_down else None
    partial = None
    if needs_dhidden or needs_w_down or needs_weight:
        partial = starts.hidden(
            dy,
            w_down,
            hidden,
            expert_weight,
            dhidden,
            weighted,
            rows,
            activation,
            layout,
            needs_weight,
        )

    dx = x.new_empty(x.shape if needs_x else (0,))
    dweight = expert_weight.new_empty(expert_weight.shape if needs_weight else (0,))
    dw_up = x.new_empty(w_up.shape if needs_w_up else (0,))
    dw_down = x.new_empty(w_down.shape if needs_w_down else (0,))
    db_up = x.new_empty(w_up.shape[:2] if needs_b_up else (0,))
    db_down = x.new_empty(w_down.shape[:2] if needs_b_down else (0,))
    if needs_weight:
        starts.weight(partial, dy, b_down, dweight, rows)
    if needs_w_down:
        starts.wgrad(dy, weighted, dw_down, rows, left_gathered=True)
    if needs_b_down:
        starts.bias(dy, expert_weight, db_down, rows)
    if needs_w_up:
        starts.wgrad(dhidden, x, dw_up, rows, right_gathered=True)
    if needs_b_up:
        starts.bias(dhidden, None, db_up, rows)
    if needs_x:
        packed = x.new_empty(rows.num_rows, x.shape[1])
        starts.gemm(dhidden, w_up.mT, None, packed, rows)
        starts.combine(packed, None, dx, rows)
    return dx, dweight, dw_up, dw_down, db_up, db_down
