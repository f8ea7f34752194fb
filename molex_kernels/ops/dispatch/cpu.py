"""The dispatch ops on a CPU: expert by expert over sorted tokens, on ATen's matrix products.

Each expert's gather, products and activation run one after the other on its own rows, so that they
stay in the cache. Reading the offsets costs nothing here: no device has to be waited for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def segments(offsets: Tensor, num_rows: int) -> list[tuple[int, int]]:
    """First and last-plus-one row of each expert; ends outside [0, num_rows] are clamped."""
    bounds = [0]
    for end in offsets.tolist():
        bounds.append(min(max(end, bounds[-1]), num_rows))
    return list(itertools.pairwise(bounds))


def grouped_gemm_forward(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    end = 0
    for expert, (start, end) in enumerate(segments(offsets, x.shape[0])):
        _linear(
            x[start:end], weight[expert], None if bias is None else bias[expert], out[start:end]
        )
    out[end:].zero_()
    return out


def grouped_gemm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those not needed are empty."""
    needs_x, needs_weight, needs_bias = needs
    dx = dy.new_empty(x.shape if needs_x else (0,))
    dweight = dy.new_empty(weight.shape if needs_weight else (0,))
    dbias = dy.new_empty(weight.shape[:2] if needs_bias else (0,))
    end = 0
    for expert, (start, end) in enumerate(segments(offsets, x.shape[0])):
        upstream = dy[start:end]
        if needs_x:
            torch.mm(upstream, weight[expert], out=dx[start:end])
        if needs_weight:
            torch.mm(upstream.mT, x[start:end], out=dweight[expert])
        if needs_bias:
            dbias[expert] = _sum_rows(upstream)
    if needs_x:
        dx[end:].zero_()
    return dx, dweight, dbias


def experts_forward(
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

    Rows of what is not here are 0.
    """
    num_rows = permutation.shape[0]
    token_of_row = permutation // top_k
    kept = x.new_empty(num_rows if keeps_hidden else 0, w_up.shape[1])
    packed = x.new_empty(num_rows, x.shape[1])
    end = 0
    for expert, (start, end) in enumerate(segments(offsets, num_rows)):
        if start == end:
            continue
        mine = x.index_select(0, token_of_row[start:end])
        hidden = kept[start:end] if keeps_hidden else x.new_empty(end - start, w_up.shape[1])
        _linear(mine, w_up[expert], None if b_up is None else b_up[expert], hidden)
        acted = _activate(hidden, activation, layout)
        _linear(
            acted, w_down[expert], None if b_down is None else b_down[expert], packed[start:end]
        )
    packed[end:].zero_()
    kept[end:].zero_()
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
    experts = (w_up, w_down, b_up, b_down, expert_weight.shape[1], activation, layout)
    packed, kept = experts_forward(x, offsets, permutation, *experts, keeps_hidden)
    return _combine(packed, inverse.view(expert_weight.shape), expert_weight), kept


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, expert_weight, w_up, w_down, b_up and b_down; those not needed are empty.

    With the row's token t and weight w:  dS = <w_down^T dy_t, A> + <dy_t, b_down>  and
    dA = w w_down^T dy_t,  so neither the experts' outputs nor their gradients are ever made.
    """
    needs_x, needs_weight, needs_w_up, needs_w_down, needs_b_up, needs_b_down = needs
    num_rows = permutation.shape[0]
    token_of_row = permutation // expert_weight.shape[1]
    weight_of_row = expert_weight.flatten().index_select(0, permutation)
    dpacked = x.new_empty(num_rows if needs_x else 0, x.shape[1])
    dweight = weight_of_row.new_zeros(num_rows if needs_weight else 0)
    dw_up = x.new_empty(w_up.shape if needs_w_up else (0,))
    dw_down = x.new_empty(w_down.shape if needs_w_down else (0,))
    db_up = x.new_empty(w_up.shape[:2] if needs_b_up else (0,))
    db_down = x.new_empty(w_down.shape[:2] if needs_b_down else (0,))
    needs_hidden = needs_x or needs_w_up or needs_b_up
    end = 0
    for expert, (start, end) in enumerate(segments(offsets, num_rows)):
        rows = token_of_row[start:end]
        scale = weight_of_row[start:end, None]
        upstream = dy.index_select(0, rows)
        weighted = (upstream * scale).to(x.dtype)
        mine = hidden[start:end]
        if needs_weight or needs_w_down:
            acted = _activate(mine, activation, layout)
        if needs_weight:
            inner = torch.mm(upstream, w_down[expert])
            products = (inner.float() * acted.float()).sum(1)
            if b_down is not None:
                products += torch.mv(upstream.float(), b_down[expert].float())
            dweight[permutation[start:end]] = products.to(dweight.dtype)
        if needs_w_down:
            torch.mm(weighted.mT, acted, out=dw_down[expert])
        if needs_b_down:
            db_down[expert] = _sum_rows(weighted)
        if needs_hidden:
            dacted = inner.mul_(scale) if needs_weight else torch.mm(weighted, w_down[expert])
            dhidden = _activate_backward(dacted, mine, activation, layout)
            if needs_x:
                torch.mm(dhidden, w_up[expert], out=dpacked[start:end])
            if needs_w_up:
                torch.mm(dhidden.mT, x.index_select(0, rows), out=dw_up[expert])
            if needs_b_up:
                db_up[expert] = _sum_rows(dhidden)
    dx = x.new_empty(0)
    if needs_x:
        dpacked[end:].zero_()
        dx = _combine(dpacked, inverse.view(expert_weight.shape), None)
    return (
        dx,
        dweight.view_as(expert_weight) if needs_weight else dweight,
        dw_up,
        dw_down,
        db_up,
        db_down,
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.mT, out=out)
    else:
        torch.addmm(bias, x, weight.mT, out=out)


def _combine(packed: Tensor, rows: Tensor, weight: Tensor | None) -> Tensor:
    """y_t = sum_k weight_tk packed[rows_tk], in fp32 and in the order of k."""
    wide = packed.float()
    weight = None if weight is None else weight.float()
    return F.embedding_bag(rows, wide, mode="sum", per_sample_weights=weight).to(packed.dtype)


def _sum_rows(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float32).to(x.dtype)


def _halves(hidden: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Views of the gate half and of the up half."""
    if layout == "interleaved":
        return hidden[:, 0::2], hidden[:, 1::2]
    gate, up = hidden.chunk(2, dim=1)
    return gate, up


def _activate(hidden: Tensor, activation: str, layout: str) -> Tensor:
    if layout == "plain":
        return _pointwise(hidden, activation)
    gate, up = _halves(hidden, layout)
    return _pointwise(gate, activation).mul_(up)


def _activate_backward(upstream: Tensor, hidden: Tensor, activation: str, layout: str) -> Tensor:
    if layout == "plain":
        return _pointwise_backward(upstream, hidden, activation)
    out = torch.empty_like(hidden)
    (gate, up), (dgate, dup) = _halves(hidden, layout), _halves(out, layout)
    dgate.copy_(_pointwise_backward(upstream * up, gate, activation))
    torch.mul(upstream, _pointwise(gate, activation), out=dup)
    return out


def _pointwise(hidden: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return hidden.relu()
    if activation == "silu":
        return F.silu(hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def _pointwise_backward(upstream: Tensor, hidden: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return aten.threshold_backward(upstream, hidden, 0)
    if activation == "silu":
        return aten.silu_backward(upstream, hidden)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return aten.gelu_backward(upstream, hidden, approximate=approximate)
