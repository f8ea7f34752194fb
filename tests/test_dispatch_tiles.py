"""The dispatch kernels' large tiles in 16 bits, whose weights a GPU copies by descriptors."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from dispatch import draw, with_gradients

pytest.importorskip("triton")

from molex_kernels._triton import chips
from molex_kernels.ops.dispatch.kernels import config, starts

# What interprets kernels has no arithmetic in bf16.
DTYPES = (torch.float16, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float16,)
# 72 rows an expert; 224 or 208 of 256 columns and 48 of 128; features that no 64 divide.
SIZES = {"tokens": 72, "num_experts": 2, "top_k": 2}
LAYERS = {
    "concat": (112, {"activation": "swiglu"}),
    "interleaved": (112, {"activation": "swiglu", "gate_layout": "interleaved"}),
    "plain": (208, {"activation": "relu_squared"}),
}


def watched(monkeypatch, name):
    """What the function of this name in `starts` returns from now on."""
    results = []
    given = getattr(starts, name)

    def watch(*arguments, **more):
        results.append(given(*arguments, **more))
        return results[-1]

    monkeypatch.setattr(starts, name, watch)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("impl", ["triton"])
def test_many_rows(impl, layer, transposed, dtype, generator, monkeypatch):
    """Output and gradients, with weights by rows and by columns; the wide tile is launched."""
    hidden, options = LAYERS[layer]
    launched = watched(monkeypatch, "launch")
    described = watched(monkeypatch, "blocks_of")
    gated = layer != "plain"
    inputs = draw(generator, **SIZES, width=48, hidden=hidden, gated=gated, dtype=dtype)
    if transposed:
        stored = {name: inputs[name].mT.contiguous().mT for name in ("w_up", "w_down")}
        inputs = {**inputs, **stored}
    upstream = torch.randn(72, 48, generator=generator).to(DEVICE, dtype)
    y, got = with_gradients(inputs, upstream, **options, impl=impl)
    assert launched[0].blocks["BLOCK_N"] == 256
    products = [config for config in launched if config.blocks.get("BLOCK_T") == 128]
    assert len(products) == 4  # up, down, hidden and dx
    assert None not in described
    assert len(described) == 4 * chips.of(DEVICE).copies_blocks
    doubles = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    want, gradients = with_gradients(doubles, upstream.double(), **options, impl="reference")
    most = 4 * torch.finfo(dtype).eps
    for name, one, other in (("y", y, want), *((n, got[n], g) for n, g in gradients.items())):
        assert (one.double() - other).norm() <= most * other.norm(), name


def test_blocks_are_described_where_the_chip_can_copy_them():
    """Rows of 16 bytes from an aligned start; none where one stride is odd or a size is 0."""
    hopper, ampere = chips.CHIPS["sm_90"], chips.CHIPS["sm_80"]
    blocks = config.gemm(hopper, torch.bfloat16, 128, 512, True)[0].blocks
    weight = torch.empty(3, 512, 96, dtype=torch.bfloat16)

    def described(x, layout="plain", chip=hopper, aligned=True):
        found = starts._weight_blocks(x, layout, chip, aligned, blocks)
        return found and (tuple(found.shape), tuple(found.strides), tuple(found.block_shape))

    rows = (49152, 49152, 96, 1)
    assert described(weight) == ((3, 1, 512, 96), rows, (1, 1, 256, 64))
    assert described(weight, "interleaved") == described(weight)
    halves = (49152, 24576, 96, 1)
    assert described(weight, "concat") == ((3, 2, 256, 96), halves, (1, 2, 128, 64))
    columns = (49152, 512, 49152, 1)
    by_columns = weight.view(3, 96, 512).mT
    assert described(by_columns) == ((3, 96, 1, 512), columns, (1, 64, 1, 256))
    columns = (49152, 512, 256, 1)
    assert described(by_columns, "concat") == ((3, 96, 2, 256), columns, (1, 64, 2, 128))
    assert described(weight, chip=ampere) is None
    assert described(weight, aligned=False) is None
    assert described(weight.float()) is None
    assert described(weight[..., :90].contiguous()) is None
    assert described(weight[:1].expand(3, -1, -1)) is None
    assert described(weight[..., :0]) is None
    assert described(weight.flatten()[4:-49148].view(2, 512, 96)) is None


@pytest.mark.parametrize(
    ("rows", "experts", "tile"),
    [(0, 4, 16), (32, 4, 16), (33, 4, 32), (64, 4, 32), (65, 4, 64), (256, 4, 64), (257, 4, 128)],
)
def test_rows_of_a_tile(rows, experts, tile):
    assert config.rows_class(rows, experts) == tile


def test_wide_tiles_where_most_of_their_columns_exist():
    def width(columns, chip="sm_90", rows=128, dtype=torch.bfloat16):
        options = config.gemm(chips.CHIPS[chip], dtype, rows, columns, True)
        return options[0].blocks["BLOCK_N"]

    assert [width(n) for n in (128, 204, 205, 256, 352, 410, 768)] == [
        128,
        128,
        *[256] * 2,
        128,
        256,
        256,
    ]
    assert [width(1024, chip) for chip in ("sm_80", "sm_100", "gfx942")] == [128, 256, 128]
    assert width(1024, rows=64) == 128
    assert width(1024, dtype=torch.float32) == 64
