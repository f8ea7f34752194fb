"""Masking is selection: 0 times a NaN is NaN, forward or backward."""

from __future__ import annotations

import torch
from torch import Tensor


def selected(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [..., n] where the mask [...] is True, 0 elsewhere, whatever stands there.

    None selects all. A row that is left out gets a gradient of 0.
    """
    return rows if mask is None else torch.where(mask[..., None], rows, 0)
