"""The curvature as a sum of Kronecker products."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from molex_kernels import _check

SCALES = ("published", "unit")


class KroneckerCurvature(NamedTuple):
    """The curvature of E experts [O, D] as a sum of r Kronecker products, O = o1 o2 and D = d1 d2.

    M_e tau = sum_r (out1_re (x) out2_re) tau (in1_re (x) in2_re)^T

    with the rows of tau as [o1, o2] and its columns as [d1, d2], row-major. Trained freely: neither
    symmetric nor positive.

    Attributes:
        out1: [r, E, o1, o1].
        out2: [r, E, o2, o2].
        in1: [r, E, d1, d1].
        in2: [r, E, d2, d2].
    """

    out1: Tensor
    out2: Tensor
    in1: Tensor
    in2: Tensor

    @classmethod
    def identity(
        cls,
        num_experts: int,
        out_features: int,
        in_features: int,
        rank: int,
        scale: str = "published",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KroneckerCurvature:
        """Every factor the identity; o1 is the largest divisor of O up to its root, d1 that of D.

        Args:
            num_experts: E.
            out_features: O.
            in_features: D.
            rank: r.
            scale: "published": M tau = r tau at the start, as in the authors' code; "unit": out1 is
                divided by r, so that M tau = tau.
            device: of the factors.
            dtype: of the factors.

        Returns:
            The curvature.

        Raises:
            TypeError: a size that is no int.
            ValueError: a size below 1, or another scale.
        """
        _check.integer("num_experts", num_experts, 1)
        _check.integer("out_features", out_features, 1)
        _check.integer("in_features", in_features, 1)
        _check.integer("rank", rank, 1)
        _check.choice("scale", scale, SCALES)
        sizes = (*nearest_factors(out_features), *nearest_factors(in_features))
        out1, out2, in1, in2 = (
            torch.eye(size, device=device, dtype=dtype).repeat(rank, num_experts, 1, 1)
            for size in sizes
        )
        return cls(out1 / rank if scale == "unit" else out1, out2, in1, in2)


def nearest_factors(size: int) -> tuple[int, int]:
    """(a, b) with a b = size and a the largest divisor up to the root."""
    first = next(a for a in range(math.isqrt(size), 0, -1) if size % a == 0)
    return first, size // first
