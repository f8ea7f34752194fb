"""The balance loss by sequence: against each sequence's own loss, by hand and in fp64."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import molex_kernels as mk

IMPLS = ("reference",) if DEVICE.type == "cuda" else ("cpu", "reference")
T, E, K = 40, 6, 2
# Any numbers, in any order.
IDS = torch.tensor([3, -7, 2**40, 0, 5])


def _drawn(generator, dtype=torch.float64) -> tuple[mk.Routing, Tensor]:
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    index = torch.randint(-1, E + 1, (T, K), generator=generator).to(DEVICE)
    own = torch.randint(len(IDS), (T,), generator=generator)
    return mk.Routing(index, logits.new_zeros(T, K), logits), IDS[own].to(DEVICE)


class _Operators(TorchDispatchMode):
    """Counts what would be launched on a GPU."""

    number = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.number += not (operator.is_view or operator is torch.ops.aten.detach.default)
        return operator(*args, **(kwargs or {}))


def test_plain_losses_take_few_operators(generator: torch.Generator):
    routing, _ = _drawn(generator, torch.bfloat16)
    with _Operators() as balance:
        mk.load_balance_loss(routing, impl="reference")
    with _Operators() as z:
        mk.router_z_loss(routing.logits, impl="reference")
    assert (balance.number, z.number) == (12, 11)


def _part(routing: mk.Routing, tokens: Tensor) -> mk.Routing:
    return mk.Routing(*(part[tokens] for part in routing))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["switch", "published"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_of_the_sequences_losses(generator, masked: bool, kind: str, impl: str):
    dtype = torch.float32 if impl == "cpu" else torch.float64
    routing, sequence = _drawn(generator, dtype)
    mask = torch.rand(T, generator=generator).to(DEVICE) < 0.7
    mask &= sequence != IDS[1]  # one sequence without a token
    mask = mask if masked else torch.ones_like(mask)
    leaf = routing.logits.double().requires_grad_()
    whole = routing._replace(logits=leaf)
    options = {"kind": kind, "temperature": 0.7}
    losses = []
    for name in IDS.tolist():
        tokens = (sequence == name) & mask
        if tokens.any():
            part = _part(whole, tokens)
            losses.append(mk.load_balance_loss(part, **options, impl="reference"))
    want = torch.stack(losses).mean()
    (want_gradient,) = torch.autograd.grad(want, leaf)

    routing.logits.requires_grad_()
    got = mk.load_balance_loss(
        routing, sequence=sequence, mask=mask if masked else None, **options, impl=impl
    )
    (gradient,) = torch.autograd.grad(got, routing.logits)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-4, atol=1e-8)
    together = mk.load_balance_loss(whole, mask=mask, **options, impl="reference")
    assert not torch.isclose(got.double(), together, rtol=1e-5), "the sequences made no difference"


@pytest.mark.parametrize("impl", IMPLS)
def test_one_sequence_is_no_sequence(generator, impl: str):
    routing, _ = _drawn(generator, torch.float32)
    plain = mk.load_balance_loss(routing, impl=impl)
    for sequence in (torch.full((T,), -3), torch.full((T,), 2, dtype=torch.int32)):
        got = mk.load_balance_loss(routing, sequence=sequence.to(DEVICE), impl=impl)
        torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_token_that_counts_it_is_0(generator, impl: str):
    routing, sequence = _drawn(generator, torch.float32)
    routing.logits.requires_grad_()
    none = torch.zeros(T, dtype=torch.bool, device=DEVICE)
    loss = mk.load_balance_loss(routing, sequence=sequence, mask=none, impl=impl)
    loss.backward()
    assert loss == 0
    assert not routing.logits.grad.any()


def test_the_reference_passes_gradcheck(generator):
    routing, sequence = _drawn(generator)
    mask = torch.rand(T, generator=generator).to(DEVICE) < 0.7

    def loss(logits: Tensor) -> Tensor:
        given = routing._replace(logits=logits)
        return mk.load_balance_loss(given, sequence=sequence, mask=mask)

    leaf = routing.logits.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaf)
    assert torch.autograd.gradgradcheck(loss, leaf)
