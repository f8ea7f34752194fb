"""What the dispatch ops are measured against: the published steps, and the library's best."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels.ops.dispatch.types import Activation, activation_of
from molex_kernels.ops.routing.types import RoutePlan


def published_moe_mlp(
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
) -> Tensor:
    """FastMoE's steps one for one, five waits for the device included. Ids must be in [0, E)."""
    num_experts = w_up.shape[0]
    top_k = expert_index.shape[1]
    ids = expert_index.flatten()
    counts = torch.bincount(ids, minlength=num_experts)
    ends = counts.cumsum(0)
    buffer_length = int(ends[-1].item())
    positions = torch.argsort(ids, stable=True)[:buffer_length]
    total = int(counts.sum().item())
    local_counts, global_counts, batch_counts = counts.cpu(), counts.cpu(), counts.cpu()
    if int(local_counts.sum()) != total or int(global_counts.sum()) != total:
        raise ValueError("expert_index: expected ids in [0, E)")
    sizes = batch_counts.tolist()
    rows = x.index_select(0, positions // top_k)
    hidden = _linear_by_expert(rows, sizes, w_up, b_up)
    acted = _activate(hidden, activation, gate_layout)
    rows = _linear_by_expert(acted, sizes, w_down, b_down)
    outputs = rows.new_zeros(ids.shape[0], x.shape[1]).index_copy(0, positions, rows)
    outputs = outputs.view(x.shape[0], top_k, x.shape[1])
    return torch.bmm(expert_weight[:, None].to(x.dtype), outputs).squeeze(1)


def library_moe_mlp(
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
) -> Tensor:
    """Permute, `F.grouped_mm`, activation, `F.grouped_mm`, unpermute. Ids must be in [0, E)."""
    _require_alignment(x, w_up, w_down)
    num_experts = w_up.shape[0]
    top_k = expert_index.shape[1]
    ids = expert_index.flatten()
    sorted_ids, order = torch.sort(ids, stable=True)
    experts = torch.arange(num_experts, device=x.device)
    offsets = torch.searchsorted(sorted_ids, experts, right=True).to(torch.int32)
    hidden = F.grouped_mm(x[order // top_k], w_up.mT, offs=offsets)
    if b_up is not None:
        hidden = hidden + b_up[sorted_ids]
    acted = _activate(hidden, activation, gate_layout)
    rows = F.grouped_mm(acted, w_down.mT, offs=offsets)
    if b_down is not None:
        rows = rows + b_down[sorted_ids]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=x.device)
    outputs = rows[inverse].view(x.shape[0], top_k, x.shape[1])
    return torch.bmm(expert_weight[:, None].to(x.dtype), outputs).squeeze(1)


def liger_moe_mlp(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: Activation = "relu",
    gate_layout: str = "concat",
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """Liger's fused mixture of SwiGLU experts, of the package liger-kernel."""
    if activation != "swiglu" or gate_layout != "concat" or b_up is not None or b_down is not None:
        raise NotImplementedError("Liger's mixture takes SwiGLU experts without biases")
    if x.device.type != "cuda":
        raise NotImplementedError("Liger's mixture needs a GPU")
    try:
        from liger_kernel.ops import LigerFusedMoEFunction, fused_moe_kernels
    except ImportError as error:
        raise NotImplementedError(f"liger-kernel is missing: {error}") from None
    _tune_liger_for(x.shape[0], fused_moe_kernels)
    index = expert_index.to(torch.int32)
    return LigerFusedMoEFunction.apply(x, w_up, w_down, index, expert_weight)


def transformers_moe_mlp(
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
) -> Tensor:
    """The experts that transformers calls "grouped_mm", on these weights. Ids must be in [0, E)."""
    try:
        from transformers.integrations.moe import grouped_mm_experts_forward
    except ImportError as error:
        raise NotImplementedError(f"transformers has no grouped_mm experts: {error}") from None
    _require_alignment(x, w_up, w_down)
    gated = activation_of(activation)[1]
    up = "gate_up_proj" if gated else "up_proj"
    weights = {up: w_up, "down_proj": w_down, f"{up}_bias": b_up, "down_proj_bias": b_down}
    experts: Any = SimpleNamespace(
        **weights,
        num_experts=w_up.shape[0],
        has_gate=gated,
        has_bias=b_up is not None,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=gate_layout == "concat",
        act_fn=lambda hidden: _activate(hidden, activation, gate_layout),
        _apply_gate=lambda hidden: _activate(hidden, activation, gate_layout),
        _is_expert_parallel=False,
    )
    return grouped_mm_experts_forward(experts, x, expert_index, expert_weight)


_liger_tuned_for = 0


def _tune_liger_for(tokens: int, kernels: ModuleType) -> None:
    """Liger tunes by width and not by tokens: it is to be tuned for what it is measured at.

    Over its configurations of three stages where there are such: all of them would take minutes.
    """
    global _liger_tuned_for
    if tokens == _liger_tuned_for:
        return
    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs") and hasattr(kernel, "cache"):
            three = [config for config in kernel.configs if config.num_stages == 3]
            kernel.configs = three or kernel.configs
            kernel.cache.clear()
    _liger_tuned_for = tokens


def published_permute(x: Tensor, plan: RoutePlan, *, top_k: int) -> Tensor:
    """FastMoE's scatter of the tokens. Every id must be an expert's."""
    return x.index_select(0, plan.permutation // top_k)


def library_permute(x: Tensor, plan: RoutePlan, *, top_k: int) -> Tensor:
    """Each token K times, then one permutation, whose gradient needs no atomics."""
    return _Reordered.apply(x.repeat_interleave(top_k, 0), plan.permutation, plan.inverse)


def published_unpermute(
    rows: Tensor, plan: RoutePlan, expert_weight: Tensor | None = None, *, top_k: int
) -> Tensor:
    """FastMoE's gather, then its product with the weights. Every id must be an expert's."""
    outputs = torch.zeros_like(rows).index_copy(0, plan.permutation, rows)
    return _weighed(outputs, expert_weight, top_k)


def library_unpermute(
    rows: Tensor, plan: RoutePlan, expert_weight: Tensor | None = None, *, top_k: int
) -> Tensor:
    """One permutation, whose gradient needs no atomics, then a product with the weights."""
    return _weighed(_Reordered.apply(rows, plan.inverse, plan.permutation), expert_weight, top_k)


def _weighed(outputs: Tensor, expert_weight: Tensor | None, top_k: int) -> Tensor:
    outputs = outputs.view(outputs.shape[0] // top_k, top_k, outputs.shape[1])
    if expert_weight is None:
        return outputs.sum(1)
    return torch.bmm(expert_weight[:, None].to(outputs.dtype), outputs).squeeze(1)


class _Reordered(torch.autograd.Function):
    """rows[order], whose gradient is that of dy by the inverse order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return upstream[0][inverse], None, None


def batched_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """As many FLOPs in one batched product, as if every expert had as many rows."""
    experts, (tokens, width) = weight.shape[0], x.shape
    if tokens % experts:
        raise NotImplementedError(f"{tokens} rows are not a multiple of {experts} experts")
    return torch.bmm(x.view(experts, tokens // experts, width), weight.mT)


def published_grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """One product per expert, after FastMoE's copy of the counts to the host."""
    ends = offsets.cpu()
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    used = int(ends[-1])
    rows = _linear_by_expert(x[:used], sizes, weight, bias)
    return F.pad(rows, (0, 0, 0, x.shape[0] - used))


def library_grouped_gemm(
    x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """`F.grouped_mm`; the rows that it leaves unwritten past the last offset are masked.

    It leaves the gradient of such rows of x unwritten, too: give it none where that matters.
    """
    _require_alignment(x, weight)
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    out = F.grouped_mm(x, weight.mT, offs=offsets)
    if bias is not None:
        expert = torch.searchsorted(offsets, rows, right=True).clamp_max(weight.shape[0] - 1)
        out = out + bias[expert]
    return torch.where((rows < offsets[-1])[:, None], out, 0)


def _linear_by_expert(
    rows: Tensor, sizes: list[int], weight: Tensor, bias: Tensor | None
) -> Tensor:
    parts = [
        F.linear(part, weight[e], None if bias is None else bias[e])
        for e, part in enumerate(torch.split(rows, sizes))
    ]
    return torch.cat(parts)


def _activate(hidden: Tensor, activation: Activation, gate_layout: str) -> Tensor:
    name, gated, numbers = activation_of(activation)
    if gated and gate_layout == "interleaved":
        gate, up = hidden[:, 0::2], hidden[:, 1::2]
    elif gated:
        gate, up = hidden.chunk(2, dim=1)
    else:
        gate, up = hidden, None
    if name == "clamped_swiglu" and up is not None:
        alpha, limit, up_limit, up_shift = numbers
        gate, up = gate.clamp(max=limit), up.clamp(-up_limit, up_limit) + up_shift
        acted = gate * torch.sigmoid(alpha * gate)
    elif name == "relu":
        acted = F.relu(gate)
    elif name == "relu_squared":
        acted = F.relu(gate).square()
    elif name == "silu":
        acted = F.silu(gate)
    else:
        acted = F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")
    return acted if up is None else acted * up


def _require_alignment(x: Tensor, *weights: Tensor) -> None:
    """Raises NotImplementedError where `F.grouped_mm` refuses the sizes."""
    for width in (x.shape[1], *(size for w in weights for size in w.shape[1:])):
        if width * x.element_size() % 16:
            raise NotImplementedError(
                f"F.grouped_mm needs rows of a multiple of 16 bytes, got {width} x {x.dtype}"
            )
