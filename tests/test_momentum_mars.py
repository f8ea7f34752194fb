"""Mars, the rule that takes a norm over each sample before its step."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, runs_here

import molex_kernels as mk

IMPLS = [impl for impl in ("triton", "cpu", "reference") if runs_here(impl)]
RULE = mk.Mars(0.5, correction=0.3, eps=1e-2)


def normal(generator, *sizes, dtype=torch.float64):
    return torch.randn(sizes, generator=generator).to(DEVICE, dtype)


def test_mars_clips_each_sample_for_itself(generator):
    rule = mk.Mars(correction=0.0)
    x = normal(generator, 2, 3, 4)
    f = normal(generator, 2, 3, 4)
    f[1] *= 0.01  # a norm below 1 is not clipped
    _, (p, _, f_prev) = mk.momentum_update(x, f, None, rule)
    torch.testing.assert_close(p[0], 0.1 * f[0] / f[0].norm())
    torch.testing.assert_close(p[1], 0.1 * f[1])
    assert torch.equal(f_prev, f)
    assert not f_prev.requires_grad


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
def test_mars_has_the_gradient_of_its_clip(impl, generator):
    """Samples above and below a norm of 1, of rows that fill no tile; against double precision."""
    shape = (3, 5, 44)
    f = normal(generator, *shape)
    f[1] *= 0.001
    f_prev = 0.5 * f.flip(1)
    x, p, v, up = (normal(generator, *shape) for _ in range(4))
    found = []
    for dtype, by in ((torch.float64, "reference"), (torch.float32, impl)):
        leaves = [t.to(dtype).requires_grad_() for t in (f, p)]
        state = (leaves[1], v.square().to(dtype) + 0.5, f_prev.to(dtype))
        y, new = mk.momentum_update(x.to(dtype), leaves[0], state, RULE, impl=by)
        assert torch.equal(new[2], leaves[0])
        found.append([y, *new[:2], *torch.autograd.grad(y, leaves, up.to(dtype))])
    for exact, got in zip(*found, strict=True):
        for sample in range(3):
            want = exact[sample]
            assert (got[sample] - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
def test_mars_keeps_no_corrected_output(impl, generator):
    """The backward pass corrects f anew: of what an update makes, it keeps the norms alone."""
    x, f, p, v, f_prev = (normal(generator, 2, 4, 8).half().requires_grad_() for _ in range(5))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = mk.momentum_update(x, f, (p, v.square(), f_prev), mk.Mars(), impl=impl)
    assert sorted(t.numel() for t in kept if t.dtype == torch.float32 and t.numel()) == [2]
    assert torch.autograd.grad(y.float().sum(), (f, f_prev), allow_unused=True)[1] is None


@pytest.mark.parametrize("impl", IMPLS)
def test_mars_hands_on_what_is_no_number(impl):
    """One element poisons its sample, whose norm it is in, and no other."""
    f = torch.ones(2, 3, 4, device=DEVICE)
    f[0, 1, 2] = torch.nan
    y, _ = mk.momentum_update(torch.ones_like(f), f, None, mk.Mars(), impl=impl)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
@pytest.mark.parametrize("shape", [(6,), (4, 1, 6), (2, 2, 3, 6), (0, 6), (2, 0, 6), (0, 3, 6)])
def test_samples_of_any_shape(shape, impl, generator):
    """A sample is the last two dimensions, or the only one; there may be none at all."""
    x, f, up = (normal(generator, *shape, dtype=torch.float32) for _ in range(3))
    found = []
    for by in ("reference", impl):
        leaves = [t.clone().requires_grad_() for t in (x, f)]
        _, state = mk.momentum_update(*leaves, None, RULE, impl=by)
        y, state = mk.momentum_update(leaves[0], leaves[1] * 2, state, RULE, impl=by)
        found.append([y, *state, *torch.autograd.grad(y, leaves, up)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
