"""What merging is measured against: the published steps, one for one."""

from __future__ import annotations

import torch
from torch import Tensor


def published_camex_deltas(
    base: Tensor,
    experts: Tensor,
    *,
    out1: Tensor | None = None,
    out2: Tensor | None = None,
    in1: Tensor | None = None,
    in2: Tensor | None = None,
    mask: str | None = None,
) -> Tensor:
    """r copies of tau, one einsum per factor over all of them, their sum; the mask in int8."""
    agrees = _ties(experts, base) if mask == "ties" else None
    delta = _curved(experts, base, out1, out2, in1, in2)
    return delta if agrees is None else delta * agrees


def published_camex_merge(
    base: Tensor,
    experts: Tensor,
    gates: Tensor,
    *,
    out1: Tensor | None = None,
    out2: Tensor | None = None,
    in1: Tensor | None = None,
    in2: Tensor | None = None,
    mask: str | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """The scaled deltas of every segment, [S, E, O, D], then their sum over the experts."""
    agrees = _ties(experts, base) if mask == "ties" else None
    delta = _curved(experts, base, out1, out2, in1, in2)
    return _merged(base, delta, agrees, gates, alpha)


def published_camex_linear(
    x: Tensor,
    base: Tensor,
    experts: Tensor | None,
    gates: Tensor,
    *,
    out1: Tensor | None = None,
    out2: Tensor | None = None,
    in1: Tensor | None = None,
    in2: Tensor | None = None,
    mask: str | None = None,
    deltas: Tensor | None = None,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    base_bias: Tensor | None = None,
    bias_out1: Tensor | None = None,
    bias_out2: Tensor | None = None,
) -> Tensor:
    """The merged weight of every segment, then a batched product. Biases as the code means them."""
    if experts is None or deltas is not None:
        raise NotImplementedError("the published code makes the deltas at every call")
    weights = published_camex_merge(
        base, experts, gates, out1=out1, out2=out2, in1=in1, in2=in2, mask=mask, alpha=alpha
    )
    y = torch.einsum("bij,bkj->bik", x, weights)
    if base_bias is None:
        return y
    if bias is None:
        return y + base_bias
    agrees = _ties(bias, base_bias) if mask == "ties" else None
    delta = bias - base_bias
    if bias_out1 is not None and bias_out2 is not None:
        split = delta.view(-1, bias_out1.shape[2], bias_out2.shape[2])
        split = torch.einsum("rbki,bij->rbkj", bias_out1, split)
        delta = torch.einsum("rbkj,rbij->rbik", bias_out2, split).sum(0).reshape(bias.shape)
    return y + _merged(base_bias, delta, agrees, gates, alpha).unsqueeze(1)


def _ties(experts: Tensor, base: Tensor) -> Tensor:
    sign = torch.sign(experts - base).to(torch.int8)
    return (sign == torch.sign(torch.sum(experts - base, dim=0))).to(torch.int8)


def _curved(
    experts: Tensor,
    base: Tensor,
    out1: Tensor | None,
    out2: Tensor | None,
    in1: Tensor | None,
    in2: Tensor | None,
) -> Tensor:
    tau = experts - base
    if out1 is None or out2 is None or in1 is None or in2 is None:
        return tau
    sizes = (out1.shape[2], out2.shape[2], in1.shape[2], in2.shape[2])
    tau = tau.view(1, -1, *sizes).repeat(out1.shape[0], 1, 1, 1, 1, 1)
    tau = torch.einsum("rbij,rbjklm->rbiklm", out1, tau)
    tau = torch.einsum("rbik,rbjklm->rbjilm", out2, tau)
    tau = torch.einsum("rbil,rbjklm->rbjkim", in1, tau)
    tau = torch.einsum("rbim,rbjklm->rbjkli", in2, tau)
    return tau.sum(0).reshape(experts.shape)


def _merged(
    base: Tensor, delta: Tensor, agrees: Tensor | None, gates: Tensor, alpha: float
) -> Tensor:
    scale = gates.to(base.dtype) if alpha == 1.0 else (alpha * gates).to(base.dtype)
    scaled = delta * scale.reshape(*scale.shape, *(1,) * base.dim())
    if agrees is not None:
        scaled = scaled * agrees
    return base + torch.sum(scaled, dim=1)
