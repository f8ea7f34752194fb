"""Merged weights and their gradients a piece at a time: what 16 bits and many tokens take."""

from __future__ import annotations

import pytest
import torch
from merging import draw, same

from molex_kernels._triton import chips, tuning

pytest.importorskip("triton")

from molex_kernels.ops.merging import reference
from molex_kernels.ops.merging.kernels import config, launch, merged, starts

# Tokens and features are multiples of 16, so that rows are aligned; not of a tile.
S, T, E, OUT, D = 5, 80, 3, 304, 144


@pytest.fixture
def inputs(generator):
    """x, base, deltas, gates and bias in fp16 and, the same numbers, in fp64; dy."""
    sizes = ((S, T, D), (OUT, D), (E, OUT, D), (S, E), (S, OUT), (S, T, OUT))
    scales = (1.0, 0.1, 0.1, 1.0, 1.0, 1.0)
    given = [draw(generator, *s) * scale for s, scale in zip(sizes, scales, strict=True)]
    dtypes = (torch.float16,) * 3 + (torch.float32,) * 2 + (torch.float16,)
    low = [t.to(dtype) for t, dtype in zip(given, dtypes, strict=True)]
    return low, [t.double() for t in low]


@pytest.fixture
def refuse(monkeypatch):
    """The kernels that merge inside the product do not run."""

    def fail(*_):
        raise AssertionError("not a piece at a time")

    monkeypatch.setattr(starts, "linear", fail)
    monkeypatch.setattr(starts, "weights", fail)


class _Arguments:
    def __init__(self, **given):
        self.__dict__.update(given)


@pytest.mark.usefixtures("refuse")
@pytest.mark.parametrize("room", [None, 700 * 1024])
def test_pieces_give_the_product_and_its_gradients(inputs, monkeypatch, request, room):
    if room is not None:
        monkeypatch.setattr(config, "PIECE", room)
        config.slices.cache_clear()
        request.addfinalizer(config.slices.cache_clear)
    (x, base, deltas, gates, bias, dy), exact = inputs
    leaves = [t.requires_grad_() for t in exact[:4]]
    want = reference.linear(*exact[:5])
    expected = torch.autograd.grad(want, leaves, exact[5])
    names = ("x", "base", "deltas", "gates", "bias")
    given = dict(zip(names, (x, base, deltas, gates, bias), strict=True))
    y = launch.camex_linear_forward(_Arguments(**given))
    found = launch.camex_linear_backward(_Arguments(**given, dy=dy, needs=[True] * 5))
    assert same(y.double(), want, 2e-3)
    for name, gradient, right in zip(names, found, expected, strict=False):
        assert same(gradient.double(), right, 2e-3), name
    assert same(found[4].double(), exact[5].sum(1), 1e-5)


@pytest.mark.parametrize(
    ("num_segments", "columns", "features"),
    [(1, 100, 64), (16, 3072, 768), (32, 768, 3072), (5000, 768, 3072), (3, 20000, 16384)],
)
def test_a_piece_is_bounded_whatever_the_number_of_segments(num_segments, columns, features):
    for gradient in (False, True):
        size, height, width = config.slices(num_segments, columns, features, gradient=gradient)
        assert size * height * width * (4 if gradient else 2) <= config.PIECE
        assert 0 < size <= num_segments
        assert gradient or width == features
        assert height == columns or height % 256 == 0
        assert width == features or width % 128 == 0


def test_what_goes_a_piece_at_a_time(generator):
    x = draw(generator, 2, 80, 32, dtype=torch.float16)
    weight = draw(generator, 16, 32, dtype=torch.float16)
    assert tuning.aligned(x, weight)
    assert merged.is_possible(x, weights=(weight,))
    assert not merged.is_possible(x[:, :64], weights=(weight,))  # few tokens
    assert not merged.is_possible(x[:, :72], weights=(weight,))  # rows do not follow each other
    assert not merged.is_possible(x.float(), weights=(weight.float(),))
    assert not merged.is_possible(x, weights=(weight[:, 1:],))
    assert merged.is_possible(x[:1, :72], weights=(weight,))


def test_wide_tiles_where_every_multiprocessor_has_one():
    chip = chips.CHIPS["sm_90"]
    assert not config.has_wide_tiles(chip, 16, 128, 1536)
    assert config.has_wide_tiles(chip, 32, 256, 1024)
