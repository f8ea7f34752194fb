"""Operators of the dispatch ops and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molex_kernels import _operators
from molex_kernels.ops.dispatch import reference

_TRITON = "molex_kernels.ops.dispatch.kernels.launch"
_PLAN = "Tensor offsets, Tensor permutation, Tensor inverse"
_TRITON_PERMUTE = "molex_kernels.ops.dispatch.kernels.permute"
_WEIGHTS = "Tensor w_up, Tensor w_down, Tensor? b_up, Tensor? b_down"
_ACTIVATION = "str activation, str layout, float[] numbers"


def _weights(a: Any) -> tuple[Any, ...]:
    return a.w_up, a.w_down, a.b_up, a.b_down, a.activation, a.layout, a.numbers


def _expert_of_row(a: Any) -> Tensor:
    rows = torch.arange(a.permutation.shape[0], device=a.permutation.device)
    return torch.searchsorted(a.offsets.long(), rows, right=True)


def _moe_mlp(a: Any) -> Tensor:
    index = torch.empty_like(a.permutation)
    index[a.permutation] = _expert_of_row(a)
    chosen = (index.view(a.expert_weight.shape), a.expert_weight)
    return reference.moe_mlp(a.x, *chosen, *_weights(a))


def _moe_experts(a: Any) -> Tensor:
    index = _expert_of_row(a)[:, None]
    weight = a.x.new_ones(index.shape)
    tokens = a.x[a.permutation // a.top_k]
    return reference.moe_mlp(tokens, index, weight, *_weights(a))


def _pre_activation(a: Any) -> Tensor:
    """[T * K, I or 2I], kept for a gradient."""
    return a.x.new_empty(a.permutation.shape[0] if a.keeps_pre_activation else 0, a.w_up.shape[1])


grouped_gemm = _operators.Pass(
    "grouped_gemm",
    "(Tensor x, Tensor weight, Tensor offsets, Tensor? bias) -> Tensor",
    "(Tensor dy, Tensor x, Tensor weight, Tensor offsets, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake=lambda a: a.x.new_empty(a.x.shape[0], a.weight.shape[1]),
    like={"bias": lambda a: a.weight[:, :, 0]},
    triton=_TRITON,
    reference=lambda a: reference.grouped_gemm(*a),
)

moe_mlp = _operators.Pass(
    "moe_mlp",
    f"(Tensor x, Tensor expert_weight, {_PLAN}, {_WEIGHTS}, {_ACTIVATION}, "
    "bool keeps_pre_activation) -> (Tensor y, Tensor pre_activation)",
    f"(Tensor dy, Tensor x, Tensor pre_activation, Tensor expert_weight, {_PLAN}, Tensor w_up, "
    f"Tensor w_down, Tensor? b_down, {_ACTIVATION}, bool[] needs) -> (Tensor dx, "
    "Tensor dexpert_weight, Tensor dw_up, Tensor dw_down, Tensor db_up, Tensor db_down)",
    fake=lambda a: (a.x.new_empty(a.x.shape), _pre_activation(a)),
    like={"b_up": lambda a: a.w_up[:, :, 0], "b_down": lambda a: a.w_down[:, :, 0]},
    triton=_TRITON,
    reference=_moe_mlp,
)

# The experts' outputs before they are summed, for ops that sum them in a kernel of their own.
moe_experts = _operators.Pass(
    "moe_experts",
    f"(Tensor x, Tensor offsets, Tensor permutation, {_WEIGHTS}, int top_k, {_ACTIVATION}, "
    "bool keeps_pre_activation) -> (Tensor expert_outputs, Tensor pre_activation)",
    fake=lambda a: (a.x.new_empty(a.permutation.shape[0], a.x.shape[1]), _pre_activation(a)),
    triton=_TRITON,
    reference=_moe_experts,
)

permute = _operators.Pass(
    "permute",
    f"(Tensor x, {_PLAN}, int top_k) -> Tensor rows",
    f"(Tensor drows, {_PLAN}, int top_k) -> (Tensor dx)",
    fake=lambda a: a.x.new_empty(a.permutation.shape[0], a.x.shape[1]),
    like={"x": lambda a: a.drows.new_empty(a.drows.shape[0] // a.top_k, a.drows.shape[1])},
    triton=_TRITON_PERMUTE,
    reference=lambda a: reference.permute(*a),
)

# `kept` is the rows again where their products with dy are wanted, which are the weights' gradient.
unpermute = _operators.Pass(
    "unpermute",
    f"(Tensor rows, Tensor? kept, Tensor? expert_weight, {_PLAN}, int top_k) -> Tensor y",
    f"(Tensor dy, Tensor? kept, Tensor? expert_weight, {_PLAN}, int top_k, bool[] needs)"
    " -> (Tensor drows, Tensor dexpert_weight)",
    fake=lambda a: a.rows.new_empty(a.rows.shape[0] // a.top_k, a.rows.shape[1]),
    like={"rows": lambda a: a.dy.new_empty(a.permutation.shape[0], a.dy.shape[1])},
    triton=_TRITON_PERMUTE,
    reference=lambda a: reference.unpermute(a.rows, *a[2:]),
)
