"""A mixture merged whole: the MLP whose two weights are merged for every segment."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from molex_kernels import _check, _dtypes
from molex_kernels._backends import CPU, REFERENCE, TRITON, declare, select
from molex_kernels._versions import Versions
from molex_kernels.ops.merging.api import (
    MASKS,
    Layer,
    check_deltas,
    check_layer,
    check_options,
    deltas_of,
    linear,
)
from molex_kernels.ops.merging.types import (
    CamexDeltas,
    KroneckerCurvature,
    pair,
    parameters_by_name,
)

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")

declare("camex_experts", TRITON, CPU, REFERENCE)
declare("camex_experts_deltas", TRITON, CPU, REFERENCE)


def camex_experts(
    x: Tensor,
    base: tuple[Tensor, Tensor],
    experts: tuple[Tensor, Tensor] | None,
    gates: Tensor | tuple[Tensor, Tensor],
    *,
    activation: str = "gelu",
    curvature: tuple[KroneckerCurvature | None, KroneckerCurvature | None] | None = None,
    mask: str | None = None,
    alpha: float = 1.0,
    bias: tuple[Tensor | None, Tensor | None] | None = None,
    base_bias: tuple[Tensor | None, Tensor | None] | None = None,
    bias_curvature: tuple[Any, Any] | None = None,
    expert_dropout: float = 0.0,
    deltas: CamexDeltas | tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor:
    """A mixture of MLPs merged into one for every segment (CAMEx, arXiv 2502.18821).

    h_s = activation(camex_linear(x_s)) by the first of each pair,  y_s = camex_linear(h_s) by the
    second: `camex_linear` has the equations, what is kept in memory, and what a gate of 0 means.
    Both layers take the same gates, which are computed once. The published layers have gates of
    their own, each by its own input: `CAMExMLP`; two tensors of gates stand for that here.

    Deltas depend on parameters alone. Where these stay for several calls (inference, evaluation,
    the micro-batches of one optimizer step, the second forward pass of checkpointing),
    `camex_experts_deltas` makes them once.

    Differentiable in x, base, experts, gates, the biases and all factors, once; with deltas, too.
    Deterministic but for the dropout. Never waits for the device.

    Args:
        x: [S, T, D]. fp16, bf16, fp32 (fp64: reference only).
        base: (up [I, D], down [D, I]) of x's dtype, any strides.
        experts: (up [E, I, D], down [E, D, I]); None when a pair of `deltas` is given.
        gates: [S, E], fp32 or x's dtype; or such a pair (up, down), for which the numbers of
            experts may differ.
        activation: relu, gelu, gelu_tanh or silu.
        curvature: a pair of what `camex_deltas` takes, or None.
        mask: "ties" or None, for both.
        alpha: the step size, for both.
        bias: (up [E, I], down [E, D]), either or all of it None; it needs `base_bias`.
        base_bias: (up [I], down [D]), either or all of it None.
        bias_curvature: a pair of what `camex_linear` takes, or None.
        expert_dropout: p in [0, 1); each layer draws for itself.
        deltas: what `camex_experts_deltas` made of this base, experts, curvature and mask. Or a
            pair of tensors (up [E, I, D], down [E, D, I]) in place of `experts` and `curvature`,
            which must then be None: it is taken as it is, also in a graph.
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports the inputs.

    Returns:
        [S, T, D] in x's dtype; under autocast, in that of autocast.

    Raises:
        TypeError: a wrong type or dtype, no pair where one is expected.
        ValueError: a wrong shape, device or option; deltas of parameters that have changed or are
            others, which the message names.
        NotImplementedError: the explicit `impl` cannot run; `CamexDeltas` in a graph.
    """
    _check.floating("x", x, "S, T, D", (None, None, None))
    _check.choice("activation", activation, ACTIVATIONS)
    check_options(mask, alpha, expert_dropout)
    if isinstance(deltas, CamexDeltas):
        deltas.check(base, experts, curvature=curvature, mask=mask)  # type: ignore[arg-type]
        experts, curvature, deltas = None, None, (deltas.up, deltas.down)
    up_gates: Any
    down_gates: Any
    up, down = _layers(base, experts, curvature, deltas, bias, base_bias, bias_curvature)
    is_shared = not isinstance(gates, tuple | list)
    up_gates, down_gates = (gates, gates) if is_shared else pair("gates", gates)
    of_up, of_down = ("", "") if is_shared else (".up", ".down")
    check_layer(up, x, up_gates, in_features=x.shape[2], of=".up", of_gates=of_up)
    check_layer(
        down,
        x,
        down_gates,
        out_features=x.shape[2],
        in_features=up.base.shape[0],
        num_experts=up_gates.shape[1] if is_shared else None,
        of=".down",
        of_gates=of_down,
    )
    chosen = select("camex_experts", impl, _dtypes.autocast(x)[0])
    options = (mask, alpha, expert_dropout, chosen if chosen == "reference" else impl)
    hidden = activate(linear(x, up, up_gates, *options), activation)
    return linear(hidden, down, down_gates, *options)


def camex_experts_deltas(
    base: tuple[Tensor, Tensor],
    experts: tuple[Tensor, Tensor],
    *,
    curvature: tuple[KroneckerCurvature | None, KroneckerCurvature | None] | None = None,
    mask: str | None = None,
    impl: str | None = None,
) -> CamexDeltas:
    """The deltas of both layers, for `camex_experts` while the parameters stay: `camex_deltas`.

    Made under `torch.no_grad()` they serve inference and evaluation, any number of calls. Made with
    gradients they carry the graph that leads to base, experts and curvature, and which the first
    backward pass frees: a second one through the same deltas is PyTorch's error ("backward through
    the graph a second time"). For several micro-batches of one step either add their losses up; or
    pass retain_graph=True to each `backward` but the last; or walk that graph once, at the end:

        leaves = [d.detach().requires_grad_() for d in (deltas.up, deltas.down)]
        camex_experts(x, base, None, gates, deltas=leaves).sum().backward()  # for each micro-batch
        torch.autograd.backward((deltas.up, deltas.down), [leaf.grad for leaf in leaves])

    Args:
        base: (up [I, D], down [D, I]). fp16, bf16, fp32 (fp64: reference only).
        experts: (up [E, I, D], down [E, D, I]) of base's dtype.
        curvature: a pair of what `camex_deltas` takes, or None.
        mask: "ties" or None, for both.
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports the inputs.

    Returns:
        `CamexDeltas`, which refuse to be used after one of the parameters has changed.

    Raises:
        TypeError: a wrong type or dtype, no pair where one is expected.
        ValueError: a wrong shape, device or mask; a parameter made in `torch.inference_mode()`,
            whose changes are not counted.
        NotImplementedError: the explicit `impl` cannot run.
    """
    _check.choice("mask", mask, MASKS)
    up, down = _layers(base, experts, curvature)
    check_deltas(up, of=".up")
    check_deltas(down, (up.base.shape[1], up.base.shape[0]), of=".down")
    # The first layer's result is the second one's input: one dtype, unless autocast casts it.
    dtypes = _dtypes.parameter_dtypes(up.base)
    _check.tensor("base.down", down.base, "D, I", (None, None), dtypes, up.base)
    chosen = select("camex_experts_deltas", impl, up.base)
    named = chosen if chosen == "reference" else impl
    versions = Versions(parameters_by_name(base, experts, curvature))
    return CamexDeltas(deltas_of(up, mask, named), deltas_of(down, mask, named), mask, versions)


def activate(hidden: Tensor, activation: str) -> Tensor:
    """What stands between the two layers."""
    if activation == "relu":
        return F.relu(hidden)
    if activation == "silu":
        return F.silu(hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def _layers(
    base: Any,
    experts: Any,
    curvature: Any,
    deltas: Any = None,
    bias: Any = None,
    base_bias: Any = None,
    bias_curvature: Any = None,
) -> tuple[Layer, Layer]:
    """The parameters of both, from pairs."""
    parts = zip(
        pair("base", base),
        pair("experts", experts, is_optional=deltas is not None),
        pair("curvature", curvature, is_optional=True),
        pair("deltas", deltas, is_optional=True),
        pair("bias", bias, is_optional=True),
        pair("base_bias", base_bias, is_optional=True),
        pair("bias_curvature", bias_curvature, is_optional=True),
        strict=True,
    )
    up, down = (Layer(*part).promoted() for part in parts)
    return up, down
