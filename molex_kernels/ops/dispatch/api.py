"""Grouped GEMM and the experts' MLP: public functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from molex_kernels import _check, _dtypes
from molex_kernels._backends import CPU, REFERENCE, TRITON, declare, select
from molex_kernels.ops.dispatch import op, reference
from molex_kernels.ops.dispatch.types import Activation, activation_of
from molex_kernels.ops.routing.api import route_plan
from molex_kernels.ops.routing.types import RoutePlan

GATE_LAYOUTS = ("concat", "interleaved")
MAX_EXPERTS = 1024


declare("grouped_gemm", TRITON, CPU, REFERENCE)
declare("moe_mlp", TRITON, CPU, REFERENCE)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Multiplies the rows of each expert by that expert's weight.

    y_t = weight_e x_t + bias_e  for offsets[e-1] <= t < offsets[e]  (from row 0 for e = 0);
    y_t = 0  for rows past the last offset.

    Rows past the last offset and experts without rows may hold anything, NaN too: they change
    nothing and get a gradient of 0.

    Differentiable in x, weight and bias, once. Deterministic. Never waits for the device.

    Args:
        x: [T, D], rows in expert order. fp16, bf16, fp32 (fp64: reference only).
        weight: [E, N, D], of x's dtype, any strides.
        offsets: [E] int32, the ends of the experts' rows, non-decreasing, as `F.grouped_mm` takes
            them. Read on the device, never checked: ends outside [0, T] or out of order give
            unspecified values, and never a read outside the tensors.
        bias: [E, N] or None.
        impl: "triton" (E <= 1024), "cpu" or "reference"; None takes the fastest that supports the
            inputs. The reference multiplies every row by every weight: E times the FLOPs.

    Returns:
        [T, N] in x's dtype. Accumulated in fp32. Under autocast, x, weight and bias are cast first.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, no expert.
        NotImplementedError: the explicit `impl` cannot run.
    """
    x, weight, bias = _dtypes.autocast(x, weight, bias)
    num_experts = _num_experts("weight", weight, "E, N, D")
    _check.floating("x", x, "T, D", (None, None))
    _check.floating("weight", weight, "E, N, D", (None, None, x.shape[1]), x)
    _check.tensor("offsets", offsets, "E", (num_experts,), (torch.int32,), x)
    if bias is not None:
        _check.floating("bias", bias, "E, N", weight.shape[:2], x)
    chosen = select("grouped_gemm", impl, x, triton=_too_many(num_experts))
    if chosen == "reference":
        return reference.grouped_gemm(x, weight, offsets, bias)
    return op.grouped_gemm(impl, x, weight, offsets, bias)


def moe_mlp(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: Activation = "relu",
    gate_layout: str = "concat",
    plan: RoutePlan | None = None,
    impl: str | None = None,
) -> Tensor:
    """The experts' MLP of a sparse mixture of experts, without capacity limit or dropped tokens.

    y_t = sum_k expert_weight_tk FFN_e(x_t),  e = expert_index_tk,
    FFN_e(x) = w_down_e act(w_up_e x + b_up_e) + b_down_e.

    An id outside [0, E) is no local expert (it lives on another rank): it contributes nothing
    and its weight gets a zero gradient. The same id twice in one row counts twice. What no
    assignment uses (an expert that nobody chose, the weight of an id that is not local) may hold
    anything, NaN too: it changes nothing, and its gradient is 0.

    Gated activations (`swiglu`: silu, `geglu`: gelu, `geglu_tanh`: gelu_tanh, `reglu`: relu, and
    `ClampedSwiGLU`, gpt-oss') split the hidden vector in two: act(gate) * up.
    `gate_layout="concat"` has rows [gate; up] in w_up and b_up, `"interleaved"` gate_0, up_0,
    gate_1, up_1, ... `gelu` is the exact one (erf), `gelu_tanh` the approximation; `relu_squared`
    is relu(x)^2.

    With relu and both biases this is the layer of MomentumSMoE (arXiv 2410.14574) and ACMoE
    (arXiv 2502.15315); their published code (FastMoE) waits for the device five times per call.

    Differentiable in x, expert_weight, w_up, w_down, b_up and b_down, once; of the activations only
    x and the pre-activation are kept for that. Deterministic. Never waits for the device.

    Args:
        x: [T, D]. fp16, bf16, fp32 (fp64: reference only).
        expert_index: [T, K] int64 or int32, K >= 1.
        expert_weight: [T, K], fp32 or x's dtype.
        w_up: [E, I, D], or [E, 2I, D] when gated; of x's dtype, any strides (never copied).
        w_down: [E, D, I].
        b_up: [E, I] or [E, 2I], or None.
        b_down: [E, D] or None.
        activation: relu, relu_squared, gelu, gelu_tanh, silu, swiglu, geglu, geglu_tanh, reglu or a
            `ClampedSwiGLU`.
        gate_layout: "concat" or "interleaved".
        plan: `route_plan(expert_index, E)`, to share it with other ops; it must belong to this
            `expert_index`, which is not checked. None makes one.
        impl: "triton" (E <= 1024), "cpu" or "reference"; None takes the fastest that supports the
            inputs. The reference sends every token to every expert: E / K times the FLOPs.

    Returns:
        [T, D] in x's dtype. Products and the sum over k are accumulated in fp32. On a CPU a call
        without a gradient rounds fp16 and bf16 once, at the end. Where a gradient is wanted, the
        pre-activation is kept in x's dtype, and in bf16 the activation and each expert's output are
        rounded, too; on matrix tiles these are rounded without a gradient as well. Under
        autocast, x, the weights and the biases are cast first; expert_weight keeps its precision.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or option.
        NotImplementedError: the explicit `impl` cannot run.
    """
    weights = (w_up, w_down, b_up, b_down)
    call = experts_arguments(
        x, expert_index, expert_weight, *weights, activation, gate_layout, plan
    )
    chosen = select("moe_mlp", impl, call.x, triton=call.too_many)
    operands: tuple[Any, ...] = (*call.weights, *call.activation)
    if chosen == "reference":
        return reference.moe_mlp(call.x, expert_index, call.expert_weight, *operands)
    return op.moe_mlp(impl, call.x, call.expert_weight, *call.rows(), *operands)


class ExpertsCall(NamedTuple):
    """Checked arguments of the experts' MLP, as its operators take them."""

    x: Tensor
    expert_index: Tensor
    expert_weight: Tensor
    weights: tuple[Any, ...]  # w_up, w_down, and b_up, b_down or None
    # The pointwise function, "plain" or a gate's layout, and the function's numbers.
    activation: tuple[str, str, tuple[float, ...]]
    plan: RoutePlan | None
    too_many: str | None  # why Triton cannot take so many experts

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets, permutation and inverse of the plan, which is made if there is none."""
        plan = self.plan
        if plan is None:
            plan = route_plan(self.expert_index, self.weights[0].shape[0])
        return plan.offsets, plan.permutation, plan.inverse


def experts_arguments(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: Activation,
    gate_layout: str,
    plan: RoutePlan | None,
) -> ExpertsCall:
    """Casts the arguments of `moe_mlp` as autocast has it, and checks them."""
    x, w_up, w_down, b_up, b_down = _dtypes.autocast(x, w_up, w_down, b_up, b_down)
    pointwise, gated, numbers = activation_of(activation)
    _check.choice("gate_layout", gate_layout, GATE_LAYOUTS)
    num_experts = _num_experts("w_down", w_down, "E, D, I")
    _check.floating("x", x, "T, D", (None, None))
    (expert_weight,) = _dtypes.kept(x, expert_weight)
    tokens, width = x.shape
    hidden = w_down.shape[2] * (2 if gated else 1)
    letters = ("E, 2I, D", "E, 2I") if gated else ("E, I, D", "E, I")
    _check.index("expert_index", expert_index, "T, K", (tokens, None), x)
    top_k = expert_index.shape[1]
    if top_k < 1:
        raise ValueError("expert_index: expected shape [T, K] with K at least 1, got K=0")
    weight_dtypes = (x.dtype, torch.float32)
    _check.tensor("expert_weight", expert_weight, "T, K", (tokens, top_k), weight_dtypes, x)
    _check.floating("w_up", w_up, letters[0], (num_experts, hidden, width), x)
    _check.floating("w_down", w_down, "E, D, I", (num_experts, width, None), x)
    if b_up is not None:
        _check.floating("b_up", b_up, letters[1], (num_experts, hidden), x)
    if b_down is not None:
        _check.floating("b_down", b_down, "E, D", (num_experts, width), x)
    if plan is not None:
        check_plan(plan, num_experts, tokens * top_k, x)
    weights = (w_up, w_down, b_up, b_down)
    if expert_weight.dtype != x.dtype:
        expert_weight = expert_weight.to(_dtypes.accumulate_dtype(x.dtype))
    layout = gate_layout if gated else "plain"
    too_many = _too_many(num_experts)
    acts = (pointwise, layout, numbers)
    return ExpertsCall(x, expert_index, expert_weight, weights, acts, plan, too_many)


def _num_experts(name: str, weight: Tensor, letters: str) -> int:
    _check.floating(name, weight, letters, (None, None, None))
    if weight.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [{letters}] with E at least 1, got E=0")
    return weight.shape[0]


def check_plan(plan: Any, num_experts: int | None, num_rows: int | None, x: Tensor) -> None:
    """A plan of so many experts and rows (`None`: any), on the device of x."""
    if not isinstance(plan, RoutePlan):
        raise TypeError(f"plan: expected a RoutePlan, got {type(plan).__name__}")
    _check.tensor("plan.offsets", plan.offsets, "E", (num_experts,), (torch.int32,), x)
    if plan.offsets.shape[0] < 1:
        raise ValueError("plan.offsets: expected shape [E] with E at least 1, got E=0")
    _check.tensor("plan.permutation", plan.permutation, "T * K", (num_rows,), (torch.int64,), x)
    num_rows = plan.permutation.shape[0]
    _check.tensor("plan.inverse", plan.inverse, "T * K", (num_rows,), (torch.int64,), x)


def _too_many(num_experts: int) -> str | None:
    if num_experts > MAX_EXPERTS:
        return f"it takes at most {MAX_EXPERTS} experts, got {num_experts}"
    return None
