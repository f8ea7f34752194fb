"""A small Mixtral learns with our experts as it does with its own."""

from __future__ import annotations

import mixtures
import pytest
import torch

from molex_kernels.integrations.transformers import install_experts

STEPS = 60


def _sentences(generator, shape):
    """Words of which each says the next, but for one in ten."""
    following = torch.randperm(mixtures.WORDS, generator=generator)

    def draw():
        batch, length = shape
        words = mixtures.words(generator, batch, length)
        free = torch.rand(batch, length, generator=generator) < 0.1
        for t in range(1, length):
            words[:, t] = torch.where(free[:, t], words[:, t], following[words[:, t - 1]])
        return words

    return draw


def _losses(implementation, dtype, seed):
    """Of each step: `seed` draws the weights, and the sentences are always the same."""
    model = mixtures.mixture("mixtral", torch.Generator().manual_seed(seed), hidden_size=32).train()
    model.set_experts_implementation(implementation)
    draw = _sentences(torch.Generator().manual_seed(0), (8, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(STEPS):
        batch = draw()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_are_those_of_the_models_own_experts(dtype):
    """In bf16 closer to them than another draw of the weights is, in fp32 the same."""
    pytest.importorskip("transformers.integrations.moe", exc_type=ImportError)
    install_experts()
    eager, other = (_losses("eager", dtype, seed) for seed in (0, 1))
    ours = _losses("molex", dtype, 0)
    spread = (eager - other).abs().mean()
    assert (ours - eager).abs().mean() < (1e-3 if dtype == torch.float32 else 0.5) * spread
    assert ours[-10:].mean() < 0.5 * ours[:3].mean()
