"""The dispatch kernels' large tiles in 16 bits, whose weights a GPU copies by descriptors."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from dispatch import draw, with_gradients

pytest.importorskip("triton")

from molex_kernels._triton import chips
from molex_kernels.ops.dispatch.api import grouped_gemm
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


# Rows by expert; cut at multiples of 32, but for an expert's first.
ROUTINGS = {
    "one": [0, 0, 150],
    "last rows are nobody's": [40, 0, 75],
    "just whole": [0, 64, 32, 54],
    "just cut": [1, 64, 0, 65],
    "on a cut": [32, 65, 31],
    "a row at the end": [97, 32],
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("impl", ["triton"])
def test_long_experts_in_pieces(impl, aligned, routing, generator, monkeypatch):
    """The weights' gradient against fp64 and twice the same; rows behind the last may be there."""
    counts = torch.tensor(ROUTINGS[routing])
    width = 48 if aligned else 45
    x = torch.randn(150, width, generator=generator).to(DEVICE)
    weight = torch.randn(len(counts), 16, width, generator=generator).to(DEVICE)
    offsets = counts.cumsum(0).int().to(DEVICE)
    dy = torch.randn(150, 16, generator=generator).to(DEVICE)

    def gradient():
        leaf = weight.detach().requires_grad_()
        y = grouped_gemm(x, leaf, offsets, impl=impl)
        return torch.autograd.grad(y, leaf, dy)[0]

    whole = gradient()
    monkeypatch.setattr(config, "chunk", lambda *sizes: 32)
    launched = watched(monkeypatch, "launch")
    got = gradient()
    assert len(launched) == 3  # the product, the gradient's pieces, their sums
    assert torch.equal(got, gradient())
    ends = counts.cumsum(0).tolist()
    bounds = list(zip([0, *ends], ends, strict=False))
    want = torch.stack([dy[a:b].double().mT @ x[a:b].double() for a, b in bounds])
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)
    is_cut = torch.tensor([b > (a // 32 + 2) * 32 for a, b in bounds])
    assert is_cut.any() == (routing != "just whole")
    assert torch.equal(got[~is_cut], whole[~is_cut])


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("impl", ["triton"])
def test_pieces_of_gathered_rows(impl, dtype, generator, monkeypatch):
    """Both weights' gradients of a layer whose first expert has most rows."""
    monkeypatch.setattr(config, "chunk", lambda *sizes: 16)
    launched = watched(monkeypatch, "launch")
    inputs = draw(generator, 40, 20, 12, 4, 2, gated=True, dtype=dtype)
    inputs["expert_index"][:30, 0] = 0
    inputs["expert_index"][:, 1] = torch.arange(40) % 2 * 2 + 1
    upstream = torch.randn(40, 20, generator=generator).to(DEVICE, dtype)
    options = {"activation": "swiglu", "wanted": ("w_up", "w_down")}
    _, got = with_gradients(inputs, upstream, **options, impl=impl)
    assert len(launched) == 3 + 1 + 4  # forward; the hidden rows; product and sums, twice
    doubles = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    _, want = with_gradients(doubles, upstream.double(), **options, impl="reference")
    for name, gradient in want.items():
        error = (got[name].double() - gradient).norm()
        assert error <= 4 * torch.finfo(dtype).eps * gradient.norm(), name


def test_experts_are_cut_where_one_of_them_would_be_a_tail():
    """Few tiles, many rows, and partial sums of at most 256 MiB."""
    assert config.chunk(40960 * 8, 128, 768, 256) == 3200
    assert config.chunk(65536, 2, 768, 256) == 2048
    assert config.chunk(32767, 2, 768, 256) == 0
    assert config.chunk(32768 * 8, 128, 2048, 768) == 0
    assert config.chunk(32768 * 8, 64, 4096, 1024) == 0
