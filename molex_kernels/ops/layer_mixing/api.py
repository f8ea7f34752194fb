"""Layer mixing: public functions."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molex_kernels import _check, _dtypes
from molex_kernels._backends import CPU, CPU_ATEN, REFERENCE, TRITON, declare, select
from molex_kernels.ops.layer_mixing import op, reference, types
from molex_kernels.ops.layer_mixing.types import MODES, LoRA

DEBUG = os.environ.get("MOLEX_DEBUG") == "1"

declare("layer_vote", TRITON, CPU, REFERENCE)
declare("layer_mix", TRITON, CPU, REFERENCE)
declare("layer_linear", TRITON, CPU_ATEN, REFERENCE)

Layers = Tensor | Sequence[Tensor]


def layer_vote(
    logits: Tensor, *, mode: str = "mode", mask: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """The layer that the tokens of a batch choose together (MoLEx, arXiv 2503.11144).

    j = argmax_l sum_t s_tl, ties to the lower layer, over the tokens t that `mask` counts, with

    mode="mode":          s_t one-hot at argmax_l logits_tl (ties lower): the most frequent choice
    mode="mean_softmax":  s_t = softmax(logits_t)
    mode="mean_sigmoid":  s_t = sigmoid(logits_t)

    The published code votes with padding tokens too: pass no mask to reproduce it. It reads the
    result on the host; here it stays on the device.

    Args:
        logits: [..., L], L >= 1. fp16, bf16, fp32 (fp64: reference only).
        mode: one of the three; "mode" is the published default.
        mask: bool [...], True for tokens that count, others may hold anything; None counts all.
            Where none counts: layer 0.
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports the inputs.

    Returns:
        int64 [], on the device of the logits. Not differentiable. Sums are in fp32. Deterministic.
        Never waits for the device. One launch.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or mode.
        NotImplementedError: the explicit `impl` cannot run.
    """
    _check.choice("mode", mode, MODES)
    _check.trailing("logits", logits, "..., L")
    if logits.shape[-1] < 1:
        raise ValueError("logits: expected shape [..., L] with L at least 1, got L=0")
    if mask is not None:
        _check.tensor("mask", mask, "...", logits.shape[:-1], (torch.bool,), logits)
        mask = mask.reshape(-1)
    chosen = select("layer_vote", impl, logits)
    flat = logits.detach().reshape(-1, logits.shape[-1])
    if chosen == "reference":
        return reference.vote(flat, mask, mode)
    return op.vote(impl, flat, mask, mode)


def layer_linear(
    x: Tensor,
    weights: Layers,
    index: Tensor,
    *,
    biases: Layers | None = None,
    lora: LoRA | None = None,
    shared: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Each branch times the weight of the layer that the device chose for it.

    y_g = x_g W_l^T + bias_l + scaling (x_g A_l^T) B_l^T,  l = index_g.

    The index of a GPU is never read by the host: the kernels look up the weights. The adapter's
    first product is accumulated beside the weight's, in the same launch.

    An index outside [0, L) raises where the host reads it: with "cpu", and with MOLEX_DEBUG=1 in
    the environment at import. Else it is clamped, so nothing outside the weights is ever read.

    Differentiable in x, weights, biases, a and b, once. Gradients are dense, 0 for layers that no
    branch chose; only chosen layers cost work, and parameters that want no gradient cost nothing.
    Where branches choose the same layer their gradients add. Deterministic. Never waits for the
    device, and can be captured in a graph.

    Args:
        x: [G, ..., D]; with `shared` [..., D]. fp16, bf16, fp32 (fp64: reference only).
        weights: [L, N, D], or a sequence of L tensors [N, D] anywhere in memory. Any strides; where
            those of a sequence differ from one another, contiguous copies are made.
        index: int64 or int32 [G], on x's device. Branches may choose the same layer.
        biases: [L, N], or L tensors [N]; or None. Weights and biases are of x's dtype.
        lora: `LoRA` of any rank r >= 1; or None. `a` and `b` may be fp16, bf16 or fp32 whatever x
            and the weights are (PEFT keeps adapters in fp32): they are rounded to x's dtype on
            their way in, and their gradients come in their own.
        shared: whether x has no dimension of branches, and every branch reads all of it.
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports the inputs.

    Returns:
        [G, ..., N] in x's dtype, accumulated in fp32; x A^T is rounded to x's dtype, as PyTorch's
        would be. Under autocast x is cast, and tiles of the parameters on their way in.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, unequal layers, a rank that does not match; with "cpu"
            or MOLEX_DEBUG=1 an index outside the layers.
        NotImplementedError: the explicit `impl` cannot run.
    """
    _check.flags(shared=shared)
    _check.trailing("x", x, "..., D" if shared else "G, ..., D", 1 if shared else 2)
    dtypes = _dtypes.parameter_dtypes(x)
    branches = None if shared else x.shape[0]
    weight = _layers("weights", weights, "N, D", (None, x.shape[-1]), x, dtypes)
    num_layers, columns = types.num_layers(weight, 3), weight[0].shape[-2]
    _check.index("index", index, "G", (branches,), x)
    bias: tuple[Tensor, ...] = ()
    if biases is not None:
        bias = _layers("biases", biases, "N", (columns,), x, dtypes, num_layers)
    a: tuple[Tensor, ...] = ()
    b: tuple[Tensor, ...] = ()
    scaling = 1.0
    if lora is not None:
        if not isinstance(lora, LoRA):
            raise TypeError(f"lora: expected a LoRA, got {type(lora).__name__}")
        scaling = lora.scaling
        _check.number("lora.scaling", scaling, -float("inf"))
        wide = _dtypes.KERNEL_DTYPES if x.dtype in _dtypes.KERNEL_DTYPES else dtypes
        a = _layers("lora.a", lora.a, "r, D", (None, x.shape[-1]), x, wide, num_layers)
        rank = a[0].shape[-2]
        if rank < 1:
            raise ValueError("lora.a: expected a rank of at least 1, got r=0")
        b = _layers("lora.b", lora.b, "N, r", (columns, rank), x, wide, num_layers)
    if DEBUG:
        types.check_layers(index.tolist(), num_layers)
    (cast,) = _dtypes.autocast(x)
    assert cast is not None
    chosen = select("layer_linear", impl, cast)
    flat = _rows(cast, shared)
    groups = (weight, bias, a, b)
    if chosen == "reference":
        flat = flat.expand(index.shape[0], -1, -1) if shared else flat
        y = reference.linear(flat, index, *groups, scaling)
    else:
        y = op.linear(impl, flat, index, *groups, scaling, shared)
    inside = x.shape[:-1] if shared else x.shape[1:-1]
    return y.view(index.shape[0], *inside, columns)


def layer_mix(
    outputs: Tensor,
    coeff: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    impl: str | None = None,
) -> Any:
    """The mixture of branches, with the residual and the next LayerNorm in the same pass.

    y = sum_g c_g (outputs_g + residual_g),  c = coeff or softmax(logits);
    with a norm also LayerNorm(y) = (y - mean) / sqrt(var + eps) * weight + bias, over D.

    The published code learns logits of two branches (softmax), which start at the fixed
    coefficients: 0.95 and 0.05 so become 0.711 and 0.289. Where the gate is shared it leaves the
    softmax out and mixes with the raw parameters, which need not sum to one: pass them as `coeff`.
    A coefficient is a weight, also one of 0: the NaN of any branch is in y.

    Differentiable in outputs, residual, coeff, logits, weight and bias, once. Under autocast
    outputs and residual of two dtypes are both taken to fp32, as a sum takes them, and y is fp32;
    all else may be fp16, bf16 or fp32. Deterministic. Never waits for the device.

    Args:
        outputs: [G, ..., D], G >= 1. fp16, bf16, fp32 (fp64: reference only).
        coeff: [G], fp32 or outputs' dtype; or None where logits are given.
        logits: [G], in place of coeff.
        residual: [G, ..., D] of outputs' dtype, each branch's own; expand one that they share.
        norm: (weight [D] or None, bias [D] or None, eps).
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports the inputs.

    Returns:
        y [..., D] in outputs' dtype; with a norm the pair (y, LayerNorm(y)), the norm taken of y
        before it is rounded. Computed in fp32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, coefficients that do not match the branches, both or
            none of coeff and logits.
        NotImplementedError: the explicit `impl` cannot run.
    """
    outputs, residual = _dtypes.promoted(outputs, residual)
    coeff, logits = _dtypes.kept(outputs, coeff, logits)
    _check.trailing("outputs", outputs, "G, ..., D", 2)
    branches, features = outputs.shape[0], outputs.shape[-1]
    if branches < 1:
        raise ValueError("outputs: expected shape [G, ..., D] with G at least 1, got G=0")
    if (coeff is None) == (logits is None):
        raise ValueError("coeff: expected either coeff or logits, got both or neither")
    dtypes = tuple(dict.fromkeys((outputs.dtype, torch.float32)))
    name, given = ("coeff", coeff) if logits is None else ("logits", logits)
    _check.tensor(name, given, "G", (branches,), dtypes, outputs)
    assert given is not None
    if residual is not None:
        _check.same_shape("residual", residual, (outputs.dtype,), outputs, "outputs")
    single = _dtypes.accumulate_dtype(outputs.dtype)
    weight, bias, eps = None, None, None
    if norm is not None:
        if not isinstance(norm, tuple) or len(norm) != 3:
            raise TypeError(f"norm: expected (weight, bias, eps), got {type(norm).__name__}")
        weight, bias, eps = norm
        weight, bias = _dtypes.kept(outputs, weight, bias)
        _check.number("norm.eps", eps, 0.0)
        for part, value in (("norm.weight", weight), ("norm.bias", bias)):
            if value is not None:
                _check.tensor(part, value, "D", (features,), dtypes, outputs)
        weight = None if weight is None else weight.to(single)
        bias = None if bias is None else bias.to(single)
    chosen = select("layer_mix", impl, outputs)
    mixture = given.to(single)
    if logits is not None:
        mixture = torch.softmax(mixture, 0)
    flat = outputs.reshape(branches, math.prod(outputs.shape[1:-1]), features)
    moved = None if residual is None else residual.reshape(flat.shape)
    if chosen == "reference":
        found = reference.mix(flat, mixture, moved, None if eps is None else (weight, bias, eps))
    else:
        found = op.mix(impl, flat, mixture, moved, weight, bias, eps)
    shape = outputs.shape[1:]
    y, normed = found
    return y.view(shape) if normed is None or eps is None else (y.view(shape), normed.view(shape))


def _rows(x: Tensor, shared: bool) -> Tensor:
    """[T, D] where shared, else [G, T, D]."""
    if shared:
        return x[None] if x.dim() == 1 else x.flatten(0, -2)
    return x[:, None] if x.dim() == 2 else x.flatten(1, -2)


def _layers(
    name: str,
    value: Any,
    letters: str,
    sizes: tuple[int | None, ...],
    x: Tensor,
    dtypes: Sequence[torch.dtype],
    num_layers: int | None = None,
) -> tuple[Tensor, ...]:
    """One stacked tensor, or one tensor per layer, checked."""
    if isinstance(value, Tensor):
        _check.tensor(name, value, f"L, {letters}", (num_layers, *sizes), dtypes, x)
        if value.shape[0] < 1:
            raise ValueError(f"{name}: expected at least one layer, got L=0")
        return (value,)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            f"{name}: expected a tensor or a sequence of them, got {type(value).__name__}"
        )
    if len(value) < 1 or (num_layers is not None and len(value) != num_layers):
        wanted = "at least one layer" if num_layers is None else f"{num_layers} layers"
        raise ValueError(f"{name}: expected {wanted}, got {len(value)}")
    for layer, one in enumerate(value):
        _check.tensor(f"{name}[{layer}]", one, letters, sizes, dtypes, x)
        sizes, dtypes = tuple(value[0].shape), (value[0].dtype,)
    return tuple(value)
