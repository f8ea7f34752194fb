"""Operators of the dispatch ops and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from molex_kernels import _operators

Tensors = tuple[Tensor, ...]


def _grouped_gemm_forward_fake(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _grouped_gemm_forward_triton(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    from molex_kernels.ops.dispatch.kernels import launch

    return launch.grouped_gemm_forward(x, weight, offsets, bias)


def _grouped_gemm_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, needs: Sequence[bool]
) -> Tensors:
    shapes = (x.shape, weight.shape, weight.shape[:2])
    return tuple(
        x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )


def _grouped_gemm_backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, needs: Sequence[bool]
) -> Tensors:
    from molex_kernels.ops.dispatch.kernels import launch

    return launch.grouped_gemm_backward(dy, x, weight, offsets, needs)


def _moe_mlp_forward_fake(
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
) -> Tensors:
    kept = permutation.shape[0] if keeps_hidden else 0
    return x.new_empty(x.shape), x.new_empty(kept, w_up.shape[1])


def _moe_mlp_forward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.dispatch.kernels import launch

    return launch.moe_mlp_forward(*arguments)


def _experts_forward_fake(
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
) -> Tensors:
    num_rows = permutation.shape[0]
    kept = num_rows if keeps_hidden else 0
    return x.new_empty(num_rows, x.shape[1]), x.new_empty(kept, w_up.shape[1])


def _experts_forward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.dispatch.kernels import launch

    return launch.experts_forward(*arguments)


def _moe_mlp_backward_fake(
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
) -> Tensors:
    shapes = (
        x.shape,
        expert_weight.shape,
        w_up.shape,
        w_down.shape,
        w_up.shape[:2],
        w_down.shape[:2],
    )
    owners = (x, expert_weight, x, x, x, x)
    return tuple(
        owner.new_empty(shape if need else (0,))
        for owner, shape, need in zip(owners, shapes, needs, strict=True)
    )


def _moe_mlp_backward_triton(*arguments: Any) -> Tensors:
    from molex_kernels.ops.dispatch.kernels import launch

    return launch.moe_mlp_backward(*arguments)


_GROUPED_GEMM_FORWARD = "(Tensor x, Tensor weight, Tensor offsets, Tensor? bias) -> Tensor"
_GROUPED_GEMM_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor offsets, bool[] needs) -> (Tensor, Tensor, Tensor)"
)
_MOE_MLP_FORWARD = (
    "(Tensor x, Tensor expert_weight, Tensor offsets, Tensor permutation, Tensor inverse, "
    "Tensor w_up, Tensor w_down, Tensor? b_up, Tensor? b_down, str activation, str layout, "
    "bool keeps_hidden) -> (Tensor, Tensor)"
)
_EXPERTS_FORWARD = (
    "(Tensor x, Tensor offsets, Tensor permutation, Tensor w_up, Tensor w_down, Tensor? b_up, "
    "Tensor? b_down, int top_k, str activation, str layout, bool keeps_hidden) -> (Tensor, Tensor)"
)
_MOE_MLP_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor hidden, Tensor expert_weight, Tensor offsets, "
    "Tensor permutation, Tensor inverse, Tensor w_up, Tensor w_down, Tensor? b_down, "
    "str activation, str layout, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_grouped_gemm_forward = {
    "triton": _operators.define(
        "grouped_gemm_fwd_triton",
        _GROUPED_GEMM_FORWARD,
        fake=_grouped_gemm_forward_fake,
        run=_grouped_gemm_forward_triton,
    ),
    "cpu": _operators.define(
        "grouped_gemm_fwd_cpu",
        _GROUPED_GEMM_FORWARD,
        fake=_grouped_gemm_forward_fake,
    ),
}
_grouped_gemm_backward = {
    "triton": _operators.define(
        "grouped_gemm_bwd_triton",
        _GROUPED_GEMM_BACKWARD,
        fake=_grouped_gemm_backward_fake,
        run=_grouped_gemm_backward_triton,
    ),
    "cpu": _operators.define(
        "grouped_gemm_bwd_cpu",
        _GROUPED_GEMM_BACKWARD,
        fake=_grouped_gemm_backward_fake,
    ),
}
_moe_mlp_forward = {
    "triton": _operators.define(
        "moe_mlp_fwd_triton",
        _MOE_MLP_FORWARD,
        fake=_moe_mlp_forward_fake,
        run=_moe_mlp_forward_triton,
    ),
    "cpu": _operators.define(
        "moe_mlp_fwd_cpu",
        _MOE_MLP_FORWARD,
        fake=_moe_mlp_forward_fake,
    ),
}
# The experts' outputs before they are summed, for ops that sum them in a kernel of their own.
experts_forward = {
    "triton": _operators.define(
        "moe_experts_fwd_triton",
        _EXPERTS_FORWARD,
        fake=_experts_forward_fake,
        run=_experts_forward_triton,
    ),
    "cpu": _operators.define(
        "moe_experts_fwd_cpu",
        _EXPERTS_FORWARD,
        fake=_experts_forward_fake,
    ),
}
moe_mlp_backward = {
    "triton": _operators.define(
        "moe_mlp_bwd_triton",
        _MOE_MLP_BACKWARD,
        fake=_moe_mlp_backward_fake,
        run=_moe_mlp_backward_triton,
    ),
    "cpu": _operators.define(
        "moe_mlp_bwd_cpu",
        _MOE_MLP_BACKWARD,
        fake=_moe_mlp_backward_fake,
    ),
}


class _GroupedGemm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, impl: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.impl = impl
        return _grouped_gemm_forward[impl](x, weight, offsets, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, offsets = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = _grouped_gemm_backward[ctx.impl](dy, x, weight, offsets, needs)
        return *_needed(gradients, needs), None, None


class _MoeMlp(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expert_weight: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        b_up: Tensor | None,
        b_down: Tensor | None,
        offsets: Tensor,
        permutation: Tensor,
        inverse: Tensor,
        activation: str,
        layout: str,
        impl: str,
    ) -> Tensor:
        plan = (offsets, permutation, inverse)
        y, hidden = _moe_mlp_forward[impl](
            x, expert_weight, *plan, w_up, w_down, b_up, b_down, activation, layout, True
        )
        ctx.save_for_backward(x, hidden, expert_weight, *plan, w_up, w_down, b_down)
        ctx.activation, ctx.layout, ctx.impl = activation, layout, impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        needs = list(ctx.needs_input_grad[:6])
        gradients = moe_mlp_backward[ctx.impl](
            dy, *ctx.saved_tensors, ctx.activation, ctx.layout, needs
        )
        return *_needed(gradients, needs), *(None,) * 6


def _needed(gradients: Tensors, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, impl: str
) -> Tensor:
    """Calls the operator of `impl`, through autograd where a gradient is wanted."""
    if _operators.wants_grad(x, weight, bias):
        return _GroupedGemm.apply(x, weight, bias, offsets, impl)
    return _grouped_gemm_forward[impl](x, weight, offsets, bias)


def moe_mlp(
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
    impl: str,
) -> Tensor:
    """Calls the operator of `impl`, through autograd where a gradient is wanted."""
    plan = (offsets, permutation, inverse)
    weights = (w_up, w_down, b_up, b_down)
    if _operators.wants_grad(x, expert_weight, *weights):
        return _MoeMlp.apply(x, expert_weight, *weights, *plan, activation, layout, impl)
    return _moe_mlp_forward[impl](x, expert_weight, *plan, *weights, activation, layout, False)[0]
