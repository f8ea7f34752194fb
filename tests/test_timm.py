"""Models of timm with robust attention. timm needs a torchvision that fits the installed torch."""

from __future__ import annotations

import pytest
import torch

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
