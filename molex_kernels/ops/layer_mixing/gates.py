"""Gates that choose a layer for a batch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_TEMPERATURE = math.log(100.0)


class CosineGate(nn.Module):
    """logits = exp(min(theta, log 100)) cos(P z, e_l): cosines with learned directions.

    P: [p, D] with bias; directions e: [p, L]; theta starts at log 2. The features of P z are
    normalised. The published code normalises P z over dim 1, which is the sequence for [B, N, p]:
    `over_tokens=True` does that.
    """

    def __init__(
        self, d_model: int, num_outputs: int, proj_dim: int, *, over_tokens: bool, **where: Any
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(d_model, proj_dim, **where)
        self.directions = nn.Parameter(torch.empty(proj_dim, num_outputs, **where))
        self.temperature = nn.Parameter(torch.full((1,), math.log(2.0), **where))
        self.over_tokens = over_tokens
        nn.init.normal_(self.directions, std=0.01)

    def forward(self, z: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, L]."""
        projected = F.normalize(self.projection(z), dim=1 if self.over_tokens else -1)
        scale = self.temperature.clamp(max=MAX_TEMPERATURE).exp()
        return scale * (projected @ F.normalize(self.directions, dim=0))


def gate(
    d_model: int, num_outputs: int, cosine_dim: int | None, *, over_tokens: bool, **where: Any
) -> nn.Module:
    """A linear gate, or a cosine one of this projection width."""
    if cosine_dim is None:
        return nn.Linear(d_model, num_outputs, **where)
    return CosineGate(d_model, num_outputs, cosine_dim, over_tokens=over_tokens, **where)
