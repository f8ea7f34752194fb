"""Floating-point operations of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

Products of matrices count, a multiplication and an addition each, as in PyTorch's own formulas;
what is done once for each element does not. Of a product over experts the rows count once, whatever
the experts; masked and causal attention counts whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from molex_kernels import _operators
from molex_kernels._imports import when_imported

Shape = Sequence[int]


def _grouped_gemm(a: Any, products: int = 1) -> int:
    return 2 * products * a.x[0] * a.weight[1] * a.weight[2]


def _experts(a: Any, rows: int) -> int:
    return 2 * rows * a.w_up[2] * (a.w_up[1] + a.w_down[2])


def _experts_backward(a: Any) -> int:
    rows, width, hidden, inner = a.permutation[0], a.w_up[2], a.w_up[1], a.w_down[2]
    needs_x, needs_weight, needs_up, needs_down, needs_bias_up, _ = a.needs
    through = needs_x or needs_weight or needs_up or needs_bias_up
    up, down = needs_x + needs_up, through + needs_down
    return 2 * rows * width * (hidden * up + inner * down)


def _router(a: Any, products: int = 1) -> int:
    return 2 * products * a.x[0] * a.gate[0] * a.x[1]


def _merged(a: Any) -> tuple[int, int]:
    """Of the product of all segments, and of the sum of deltas that makes their weights."""
    segments, tokens, width = a.x
    outputs, experts = a.base[0], a.deltas[0]
    return 2 * segments * tokens * outputs * width, 2 * segments * experts * outputs * width


def _merged_backward(a: Any) -> int:
    product, merge = _merged(a)
    needs_x, needs_base, needs_deltas, needs_gates, _ = a.needs
    needs_weight = needs_base or needs_deltas or needs_gates
    products = product * (needs_x + needs_weight)
    return products + merge * (needs_x + needs_deltas + needs_gates)


def _weights(a: Any) -> int:
    """The sum of deltas that makes every segment's weight."""
    segments, experts = a.gates
    return 2 * segments * experts * a.base[0] * a.base[1]


def _deltas(a: Any, passes: int = 1) -> int:
    """The four factors of a Kronecker product, one after the other."""
    if a.out1 is None:
        return 0
    rank, (experts, outputs, width) = a.out1[0], a.experts
    sizes = a.out1[2] + a.out2[2] + a.in1[2] + a.in2[2]
    return 2 * passes * rank * experts * outputs * width * sizes


def _linear(a: Any, needs: Sequence[bool] | None = None) -> int:
    tokens = a.x[-2]
    branches, width, outputs = a.index[0], a.x[-1], a.weights[0][-2]
    rank = a.a[0][-2] if a.a else 0
    if needs is None:
        return 2 * branches * tokens * (outputs * width + rank * (width + outputs))
    needs_x, needs_weight, _, needs_a, needs_b = needs
    whole = outputs * width * (needs_x + needs_weight)
    # dy B, from which the gradients of x and A come; x A anew, from which that of B comes.
    low = rank * (outputs * (needs_x or needs_a) + width * needs_x + width * needs_a)
    low += rank * (width + outputs) * needs_b
    return 2 * branches * tokens * (whole + low)


def _attention(a: Any, products: int) -> int:
    """Each iteration multiplies q k^T and the scores with what is attended."""
    batch, heads, tokens, width = a.k
    return 2 * products * a.num_iters * batch * heads * tokens * tokens * width


# By operator, of its arguments with shapes in the place of tensors.
FORMULAS: dict[str, Callable[[Any], int]] = {
    "grouped_gemm_fwd": _grouped_gemm,
    "grouped_gemm_bwd": lambda a: _grouped_gemm(a, sum(a.needs[:2])),
    "moe_mlp_fwd": lambda a: _experts(a, a.permutation[0]),
    "moe_mlp_bwd": _experts_backward,
    "moe_experts": lambda a: _experts(a, a.permutation[0]),
    "router_fwd": _router,
    "router_bwd": lambda a: _router(a, sum(a.needs[:2])),
    "camex_linear_fwd": lambda a: sum(_merged(a)),
    "camex_linear_bwd": _merged_backward,
    "camex_deltas_fwd": _deltas,
    # tau again, its gradient, and those of the factors.
    "camex_deltas_bwd": lambda a: _deltas(a, 3),
    "camex_merge_fwd": _weights,
    "camex_merge_bwd": lambda a: _weights(a) * (a.needs[1] + a.needs[2]),
    "layer_linear_fwd": _linear,
    "layer_linear_bwd": lambda a: _linear(a, a.needs),
    "rpc_attention_fwd": lambda a: _attention(a, 2),
    # The scores again, and two products for each of the two, as in attention.
    "rpc_attention_bwd": lambda a: _attention(a, 5),
}


def _register(counter: ModuleType) -> None:
    for operator in _operators.OPERATORS:
        if formula := FORMULAS.get(operator.name):
            counter.register_flop_formula(getattr(torch.ops.molex, operator.name))(
                _of_shapes(operator, formula)
            )


def _of_shapes(operator: Any, formula: Callable[[Any], int]) -> Callable[..., int]:
    def count(*shapes: Any, out_shape: Any = None, **named: Any) -> int:
        del out_shape
        values = dict(zip(operator.arguments, shapes, strict=False))
        values.update({n: v for n, v in named.items() if n in operator.arguments})
        return formula(operator.named(**values))

    return count


def install() -> None:
    """Registers them when PyTorch's counter is imported, which imports Triton."""
    when_imported("torch.utils.flop_counter", _register)
