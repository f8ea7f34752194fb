"""Models of timm with robust attention. timm needs a torchvision that fits the installed torch."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

from molex_kernels.integrations.timm import install_rpc_attention

timm = pytest.importorskip("timm", exc_type=ImportError)


@pytest.fixture
def model():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 32, 32, generator=generator)


def test_without_robustness_nothing_changes(model, images):
    plain, names = model(images), [name for name, _ in model.named_parameters()]
    assert install_rpc_attention(model, layers=None, robust=False) == [0, 1]
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projection", ["qkv", "kv"])
def test_robust_attention_trains(model, images, projection):
    plain = model(images)
    options = {"projection": projection, "num_iters": 2, "lam": 0.5}
    assert install_rpc_attention(model, layers=[1], **options) == [1]
    robust = model.train()(images)
    assert not torch.allclose(robust, plain, atol=1e-3)
    robust.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32}
# One entry for each class of attention among timm's models with `blocks`, and whether it is plain.
ENTRIES = {
    "Attention": ("vit_tiny_patch16_224", SMALL, True),
    "Attention-layer_scale": ("deit3_small_patch16_224", SMALL, True),
    "Attention-naflex": (
        "naflexvit_base_patch16_gap",
        {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32},
        True,
    ),
    "Attention-qk_norm": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}, False),
    "DiffAttention": ("vit_tiny_patch16_224", {**SMALL, "attn_layer": "diff"}, False),
    "beit.Attention": ("beit_base_patch16_224", SMALL, False),
    "cait.TalkingHeadAttn": ("cait_xxs24_224", SMALL, False),
    "convit.GPSA": ("convit_tiny", {**SMALL, "embed_dim": 16}, False),
    "convit.MHSA": (
        "convit_tiny",
        {**SMALL, "embed_dim": 16, "local_up_to_layer": 0, "use_pos_embed": True},
        True,
    ),
    "EvaAttention": ("eva_giant_patch14_224", {**SMALL, "img_size": 28}, False),
    "EvaAttention-eva02": ("eva02_tiny_patch14_224", {**SMALL, "img_size": 28}, False),
    "EvaAttention-dinov3": ("vit_small_patch16_dinov3", SMALL, False),
    "RelPosAttention": ("vit_relpos_small_patch16_224", SMALL, False),
    "samvit.Attention": ("samvit_base_patch16", {**SMALL, "global_attn_indexes": (1,)}, False),
    "XCA": ("xcit_nano_12_p16_224", SMALL, False),
    "MaskUnitAttention": ("hiera_tiny_224", {"embed_dim": 48, "num_heads": 1}, False),
    "MultiScaleAttention": ("sam2_hiera_tiny", {"embed_dim": 48, "num_heads": 1}, False),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_is_the_same_or_refused(entry, generator):
    """Without robustness nothing changes, or nothing is installed and the error says why."""
    name, options, is_plain = ENTRIES[entry]
    model = timm.create_model(name, num_classes=5, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    size = options.get("img_size", 224)
    images = torch.randn(2, 3, size, size, generator=generator)
    attention = model.blocks[0].attn
    before = list(model.modules())
    if not is_plain:
        with pytest.raises(ValueError, match=r"model: expected blocks\.0\.attn .* with "):
            install_rpc_attention(model, robust=False)
        assert list(model.modules()) == before
        return
    plain = model(images)
    install_rpc_attention(model, layers=None, robust=False)
    assert model.blocks[0].attn is not attention
    torch.testing.assert_close(model(images), plain, atol=1e-4, rtol=1e-4)


def _classes():
    """Every class of timm that may be an attention with qkv and proj, by its name."""
    for package in (timm.layers, timm.models):
        for info in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, kind in inspect.getmembers(module, inspect.isclass):
                if issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                    yield f"{info.name}.{name}", kind


def _made(kind):
    """An instance of width 48 with qkv and proj, or None where this is no such class."""
    for options in ({"dim": 48, "num_heads": 3}, {"dim": 48, "heads": 3}, {"dim": 48}):
        for more in ({}, {"window_size": (7, 7)}, {"dim_out": 48}):
            with contextlib.suppress(Exception):
                module = kind(**options, **more)
                if all(isinstance(getattr(module, n, None), nn.Module) for n in ("qkv", "proj")):
                    return module
    return None


def test_every_attention_of_timm_is_the_same_or_refused(generator):
    taken, refused = [], []
    for name, kind in _classes():
        attention = _made(kind)
        if attention is None:
            continue
        attention.eval()
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model, x = nn.Module(), torch.randn(2, 49, 48, generator=generator)
        model.blocks = nn.ModuleList([nn.Module()])
        model.blocks[0].attn = attention
        try:
            install_rpc_attention(model, robust=False)
        except ValueError:
            refused.append(name)
            continue
        taken.append(name)
        torch.testing.assert_close(model.blocks[0].attn(x), attention(x), msg=name)
    assert "attention.Attention" in taken
    assert {"beit.Attention", "cait.TalkingHeadAttn", "davit.ChannelAttention"} <= set(refused)
    assert len(refused) > 10
