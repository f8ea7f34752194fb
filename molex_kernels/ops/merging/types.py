"""The curvature as a sum of Kronecker products, and deltas that are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molex_kernels import _check
from molex_kernels._versions import Versions

SCALES = ("published", "unit")
PARTS = ("up", "down")


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


@dataclass(frozen=True, eq=False)
class CamexDeltas:
    """What `camex_experts` needs of its parameters alone, made by `camex_experts_deltas`.

    It holds for the parameters it was made of, as long as they stay: each use compares them, by
    identity and by PyTorch's count of their changes, and looks whether an optimizer has stepped
    that has them. Not seen is what goes past both: a change by way of `.data`, another library's
    kernel, the replay of a CUDA graph that holds the step.

    Attributes:
        up: [E, I, D].
        down: [E, D, I].
        mask: that of the deltas.
        versions: the parameters, and what they were like.
    """

    up: Tensor
    down: Tensor
    mask: str | None
    versions: Versions = field(repr=False)

    def check(
        self,
        base: tuple[Tensor, Tensor],
        experts: tuple[Tensor, Tensor],
        *,
        curvature: tuple[KroneckerCurvature | None, KroneckerCurvature | None] | None = None,
        mask: str | None = None,
    ) -> None:
        """That the deltas are those of these parameters. Never waits for the device.

        Inside of `torch.compile` and `torch.export` there are no counts to be read: there, call
        this before, and pass on `(deltas.up, deltas.down)`.

        Args:
            base: as in `camex_experts_deltas`.
            experts: as in `camex_experts_deltas`.
            curvature: as in `camex_experts_deltas`.
            mask: as in `camex_experts_deltas`.

        Raises:
            TypeError: no pair.
            ValueError: another mask; a parameter, which the message names, that is not the one of
                which the deltas were made, or has changed; a parameter whose gradient is wanted
                and was not when the deltas were made, or of a copy of them.
            NotImplementedError: a graph is being traced.
        """
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                "deltas: whether parameters have changed cannot be seen in a graph. Call "
                "deltas.check before, and pass the pair (deltas.up, deltas.down) without experts"
            )
        if mask != self.mask:
            raise ValueError(f"mask: expected that of the deltas, {self.mask!r}, got {mask!r}")
        parameters = parameters_by_name(base, experts, curvature)
        self.versions.check(parameters, "deltas")
        if not torch.is_grad_enabled():
            return
        for name, parameter in parameters.items():
            if parameter.requires_grad and name not in self.versions.with_gradients:
                raise ValueError(
                    f"deltas.{name.split('.')[1]}: expected deltas made with gradients, for {name} "
                    "requires one. Make deltas anew, or use them under torch.no_grad()"
                )


def parameters_by_name(base: Any, experts: Any, curvature: Any) -> dict[str, Tensor]:
    """The parameters of both layers under the names that messages have for them."""
    found = {}
    for name, value in (("base", base), ("experts", experts)):
        for part, tensor in zip(PARTS, pair(name, value), strict=True):
            found[f"{name}.{part}"] = tensor
    fields = KroneckerCurvature._fields
    for part, factors in zip(PARTS, pair("curvature", curvature, is_optional=True), strict=True):
        if factors is None:
            continue
        if not isinstance(factors, tuple) or len(factors) != len(fields):
            got = type(factors).__name__
            raise TypeError(f"curvature.{part}: expected a KroneckerCurvature, got {got}")
        for field_name, factor in zip(fields, factors, strict=True):
            found[f"curvature.{part}.{field_name}"] = factor
    return found


def pair(name: str, value: Any, *, is_optional: bool = False) -> Sequence[Any]:
    """One value for each layer; two Nones where there may be none and is none."""
    if value is None and is_optional:
        return None, None
    if not isinstance(value, tuple | list) or len(value) != 2:
        size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
        got = f"{type(value).__name__}{size}"
        raise TypeError(f"{name}: expected a pair (up, down), got {got}")
    return value
