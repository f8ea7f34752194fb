"""What merges the experts: gates of segments, their losses, the dynamic base."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from merging import OUT, D, E, draw, same
from torch import Tensor

import molex_kernels as mk


def test_a_segment_takes_the_gate_of_the_one_before(generator):
    gates = draw(generator, 2, 4, E).requires_grad_()
    out = mk.segment_gates(gates)
    assert torch.equal(out[:, 0], gates[:, 0])
    assert torch.equal(out[:, 1:], gates[:, :-1])
    (gradient,) = torch.autograd.grad(out.sum(), gates)
    want = torch.ones_like(gates)
    want[:, -1] = 0  # only the loss sees the last one; segment 0 sends nothing to itself
    assert torch.equal(gradient, want)


def test_one_segment_sends_its_gate_no_gradient(generator):
    gates = draw(generator, 2, 1, E).requires_grad_()
    out = mk.segment_gates(gates)
    assert torch.equal(out, gates)
    (gradient,) = torch.autograd.grad(out.sum(), gates)
    assert not gradient.any()


def test_a_uniform_start_is_one_over_the_experts(generator):
    gates = draw(generator, 2, 3, E).requires_grad_()
    out = mk.segment_gates(gates, first="uniform")
    assert torch.equal(out[:, 0], torch.full_like(gates[:, 0], 1 / E))
    assert torch.equal(out[:, 1:], gates[:, :-1])


def test_all_experts_are_a_plain_softmax(generator):
    x, w_gate, w_noise = (draw(generator, *s) for s in ((6, D), (D, E), (D, E)))
    gates, load = mk.noisy_topk_gates(x, w_gate, w_noise, top_k=E, training=False)
    assert same(gates, torch.softmax(x @ w_gate, 1))
    assert torch.equal(load, torch.full((E,), 6.0, dtype=torch.float64, device=DEVICE))


def test_top_k_gates_are_a_softmax_over_the_largest(generator):
    x, w_gate = draw(generator, 6, D), draw(generator, D, E)
    gates, load = mk.noisy_topk_gates(x, w_gate, top_k=2, training=True)
    logits = x @ w_gate
    for row, z in zip(gates, logits, strict=True):
        order = z.argsort(descending=True)
        assert same(row[order[:2]], torch.softmax(z[order[:2]], 0))
        assert not row[order[2:]].any()
    assert torch.equal(load, (gates > 0).sum(0).double())


def test_noise_has_the_learned_deviation(generator):
    rows = 20000
    x = torch.ones(rows, 1, dtype=torch.float64, device=DEVICE)
    w_gate = torch.zeros(1, 2, dtype=torch.float64, device=DEVICE)
    w_noise = torch.tensor([[0.5, -2.0]], dtype=torch.float64, device=DEVICE)
    own = torch.Generator(DEVICE).manual_seed(int(torch.randint(2**31, (), generator=generator)))
    gates, _ = mk.noisy_topk_gates(x, w_gate, w_noise, top_k=2, training=True, generator=own)
    difference = torch.log(gates[:, 0] / gates[:, 1])  # of the two noisy logits
    deviation = F.softplus(w_noise) + 1e-2
    want = deviation.square().sum().sqrt().item()
    assert abs(difference.std().item() / want - 1) < 5 / math.sqrt(2 * rows)
    assert abs(difference.mean().item()) < 5 * want / math.sqrt(rows)


def test_load_is_the_chance_to_be_among_the_largest(generator):
    x, w_gate, w_noise = (draw(generator, *s) for s in ((1, D), (D, E), (D, E)))
    seed = int(torch.randint(2**31, (), generator=generator))
    own = torch.Generator(DEVICE).manual_seed(seed)
    _, load = mk.noisy_topk_gates(x, w_gate, w_noise, top_k=2, training=True, generator=own)
    own = torch.Generator(DEVICE).manual_seed(seed)
    noise = torch.randn(1, E, dtype=torch.float64, device=DEVICE, generator=own)
    clean, deviation = x @ w_gate, F.softplus(x @ w_noise) + 1e-2
    noisy = clean + noise * deviation
    draws = 40000
    for e in range(E):
        anew = noisy.repeat(draws, 1)
        fresh = draw(generator, draws)
        anew[:, e] = clean[0, e] + fresh * deviation[0, e]
        chosen = (anew.topk(2, 1).indices == e).any(1).double().mean()
        assert abs(chosen - load[e]) < 5 * 0.5 / math.sqrt(draws)


def test_noisy_gates_send_gradients_everywhere(generator):
    x, w_gate, w_noise = (draw(generator, *s).requires_grad_() for s in ((6, D), (D, E), (D, E)))
    own = torch.Generator(DEVICE).manual_seed(3)
    gates, load = mk.noisy_topk_gates(x, w_gate, w_noise, top_k=2, training=True, generator=own)
    loss = mk.cv_squared_loss(gates, load)
    assert all(
        g.isfinite().all() and g.any() for g in torch.autograd.grad(loss, (x, w_gate, w_noise))
    )


@pytest.mark.parametrize("top_k", [2, E])
@pytest.mark.parametrize("noise", [False, True], ids=["clean", "noisy"])
def test_masked_rows_are_as_rows_taken_out(top_k: int, noise: bool, generator, monkeypatch):
    """Gates, load, loss and gradients, whatever the masked rows hold."""
    x, w_gate, w_noise = (draw(generator, *s) for s in ((6, D), (D, E), (D, E)))
    counted = torch.tensor([True, False, True, True, False, True], device=DEVICE)
    drawn = draw(generator, 6, E)
    wild = torch.where(counted[:, None], x, math.nan)
    results = []
    for rows, mask in ((counted, None), (slice(None), counted)):
        monkeypatch.setattr(Tensor, "normal_", lambda t, rows=rows, **_: t.copy_(drawn[rows]))
        leaves = [t.clone().requires_grad_() for t in (wild, w_gate, w_noise)]
        gates, load = mk.noisy_topk_gates(
            leaves[0][rows], *leaves[1:], top_k=top_k, training=noise, mask=mask
        )
        loss = mk.cv_squared_loss(gates, load)
        gradients = torch.autograd.grad(loss, leaves[: 3 if noise else 2], allow_unused=True)
        results.append((gates, load, loss, gradients))
    (gates, load, loss, gradients), (got, got_load, got_loss, got_gradients) = results
    assert torch.equal(got[counted], gates)
    assert not got[~counted].any()
    assert same(got_load, load)
    assert same(got_loss, loss)
    for a, b in zip(got_gradients, gradients, strict=True):
        assert (a is None and b is None) or same(a, b)
    assert not got_gradients[0][~counted].any()


def test_with_every_row_masked_nothing_is_lost(generator):
    x, w_gate = draw(generator, 6, D).requires_grad_(), draw(generator, D, E).requires_grad_()
    nobody = torch.zeros(6, dtype=torch.bool, device=DEVICE)
    gates, load = mk.noisy_topk_gates(x, w_gate, top_k=2, training=False, mask=nobody)
    loss = mk.cv_squared_loss(gates, load)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, w_gate)))


def test_cv_squared(generator):
    gates, load = draw(generator, 2, 3, E).exp(), draw(generator, E).exp()
    total = gates.sum((0, 1))
    want = total.var() / (total.mean() ** 2 + 1e-10)
    assert same(mk.cv_squared_loss(gates), want)
    assert same(mk.cv_squared_loss(gates, load), want + load.var() / (load.mean() ** 2 + 1e-10))
    assert mk.cv_squared_loss(gates[..., :1], load[:1]) == 0


def test_the_base_moves_by_the_mean_delta(generator):
    base, deltas = draw(generator, OUT, D), draw(generator, E, OUT, D)
    assert same(mk.propagate_base(base, deltas, 0.3), base + 0.3 / E * deltas.sum(0))
