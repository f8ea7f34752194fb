"""T5's bias on the scores (arXiv 1910.10683): by the bucket that the distance of tokens is in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_buckets(
    length: int, num_buckets: int, max_distance: int, device: torch.device
) -> Tensor:
    """int64 [N, N]: the bucket of key n seen from query m, for every (m, n).

    Half of the buckets are for keys behind the query. Of each half, half are for one distance
    each, and the others for ranges that widen up to max_distance, in T5's arithmetic (fp32).
    """
    positions = torch.arange(length, device=device)
    relative = positions[None, :] - positions[:, None]
    half = num_buckets // 2
    exact = half // 2
    apart = relative.abs()
    wide = torch.log(apart.float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + wide.to(torch.int64)).clamp(max=half - 1)
    return (relative > 0).to(torch.int64) * half + torch.where(apart < exact, apart, far)


def position_bias(tables: Tensor, buckets: Tensor) -> Tensor:
    """[G, H, N, N] of G tables [G, num_buckets, H] and the buckets [N, N]."""
    rows = F.embedding(buckets, tables.transpose(0, 1).flatten(1))
    return rows.unflatten(-1, (tables.shape[0], -1)).permute(2, 3, 0, 1)


def with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """One mask that is added to the scores, of the two."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        # No infinity: a query whose keys are all masked would get NaN from some kernels.
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
