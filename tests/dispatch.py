"""Inputs and gradients of `moe_mlp`, for its tests."""

from __future__ import annotations

import torch
from conftest import DEVICE

from molex_kernels.ops.dispatch.api import moe_mlp

IMPLS = ("triton", "reference") if DEVICE.type == "cuda" else ("triton", "cpu", "reference")
GRADIENTS = ("x", "expert_weight", "w_up", "w_down", "b_up", "b_down")
SIZES = {"tokens": 18, "width": 20, "hidden": 12, "num_experts": 4, "top_k": 2}


def draw(generator, tokens, width, hidden, num_experts, top_k, *, gated=False, dtype=torch.float32):
    """Inputs of moe_mlp with both biases."""

    def normal(*sizes, scale=1.0):
        return (torch.randn(sizes, generator=generator) * scale).to(DEVICE, dtype)

    rows = 2 * hidden if gated else hidden
    scores = torch.randn(tokens, num_experts, generator=generator)
    return {
        "x": normal(tokens, width),
        "expert_index": scores.topk(min(top_k, num_experts)).indices.to(DEVICE),
        "expert_weight": normal(tokens, top_k).float().softmax(1).to(dtype),
        "w_up": normal(num_experts, rows, width, scale=width**-0.5),
        "w_down": normal(num_experts, width, hidden, scale=hidden**-0.5),
        "b_up": normal(num_experts, rows),
        "b_down": normal(num_experts, width),
    }


def with_gradients(inputs, upstream, wanted=GRADIENTS, **options):
    """The output and the gradients of the `wanted` inputs."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    y = moe_mlp(**{**inputs, **leaves}, **options)
    return y.detach(), dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream), strict=True)
    )
