"""How fp32 tiles are multiplied, and what is left out where that is done in parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from molex_kernels._triton import chips, precision
from molex_kernels._triton.precision import of_product


def _product(monkeypatch, chip: str, dtype: torch.dtype, *options, **named) -> str:
    monkeypatch.setattr(chips, "of", lambda device: replace(chips.CHIPS[chip]))
    monkeypatch.setattr(precision, "interpreted", lambda: False)
    return of_product(torch.empty(2, dtype=dtype), *options, **named)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_aligned_fp32_is_multiplied_in_parts(monkeypatch, chip: str):
    assert _product(monkeypatch, chip, torch.float32, True) == "tf32x3"
    assert _product(monkeypatch, chip, torch.float32, True, over_rows=True) == "bf16x6"
    assert _product(monkeypatch, chip, torch.float32, False) == "ieee"
    assert _product(monkeypatch, chip, torch.bfloat16, True) == "ieee"


def test_amd_multiplies_fp32_as_it_is(monkeypatch):
    assert _product(monkeypatch, "gfx942", torch.float32, True) == "ieee"
    assert _product(monkeypatch, "gfx942", torch.float32, True, over_rows=True) == "ieee"


def test_tf32_where_it_is_allowed(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    for over_rows in (False, True):
        found = _product(monkeypatch, "sm_90", torch.float32, True, over_rows=over_rows)
        assert found == "tf32"


def _parts(x: torch.Tensor, bits: int, count: int) -> list[torch.Tensor]:
    """x, fp64 with values of fp32, as numbers with so many bits that are rounded to nearest."""
    parts = []
    for _ in range(count):
        fraction, exponent = torch.frexp(x)
        parts.append(torch.ldexp((fraction * 2.0**bits).round(), exponent - bits))
        x = x - parts[-1]
    return parts


@pytest.mark.parametrize(
    ("bits", "count", "most"), [(11, 2, 2.0**-21), (8, 3, 2.0**-22)], ids=["tf32x3", "bf16x6"]
)
def test_what_the_parts_leave_out(generator, bits: int, count: int, most: float):
    a, b = torch.randn(2, 10**5, generator=generator).double()
    left, right = _parts(a, bits, count), _parts(b, bits, count)
    kept = sum(left[i] * right[j] for i in range(count) for j in range(count - i))
    exact = a * b
    error = ((kept - exact) / exact)[exact != 0].abs().max().item()
    assert most / 16 < error < most
