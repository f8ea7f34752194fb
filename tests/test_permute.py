"""Tokens in expert order and back: against their definition, and as the parts of `moe_mlp`."""

from __future__ import annotations

import dispatch
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, runs_here
from torch import Tensor

import molex_kernels as mk
from molex_kernels.testing.calls import recorded

IMPLS = [impl for impl in ("triton", "cpu", "reference") if runs_here(impl)]
T, D, E, K = 11, 7, 4, 3


def _drawn(generator, *, local: bool = False) -> tuple[Tensor, Tensor, Tensor, mk.RoutePlan]:
    """Tokens, ids (also of no expert), weights and the plan."""
    x = torch.randn(T, D, generator=generator).to(DEVICE)
    low, high = (0, E) if local else (-2, E + 2)
    index = torch.randint(low, high, (T, K), generator=generator).to(DEVICE)
    weight = torch.rand(T, K, generator=generator).to(DEVICE)
    return x, index, weight, mk.route_plan(index, E)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_by_hand(generator, impl: str):
    x, index, _, plan = _drawn(generator)
    rows = mk.permute(x, plan, impl=impl)
    want = [x[t] for e in range(E) for t in range(T) for k in range(K) if index[t, k] == e]
    want += [torch.zeros_like(x[0])] * (T * K - len(want))
    assert len(want) > int(plan.offsets[-1])
    assert torch.equal(rows, torch.stack(want))
    assert torch.equal(mk.permute(x, plan, top_k=K, impl=impl), rows)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
def test_there_and_back(generator, weighted: bool, impl: str):
    """A token comes back as often, or with as much weight, as it has experts here."""
    x, index, weight, plan = _drawn(generator)
    here = (index >= 0) & (index < E)
    share = (torch.where(here, weight, 0) if weighted else here.float()).sum(1, keepdim=True)
    rows = mk.permute(x, plan, impl=impl)
    given = (weight,) if weighted else ()
    y = mk.unpermute(rows, plan, *given, top_k=K, impl=impl)
    torch.testing.assert_close(y, share * x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_products_between_them_are_the_experts_mlp(generator, elsewhere: bool, impl: str):
    """permute, grouped_gemm, gelu, grouped_gemm, unpermute: results and all gradients."""
    inputs = dispatch.draw(generator, **dispatch.SIZES)
    index = inputs["expert_index"]
    if elsewhere:
        index[::2, 0] = -1
        index[1::3, 1] = 4
    plan = mk.route_plan(index, 4)
    leaves = {name: inputs[name].clone().requires_grad_() for name in dispatch.GRADIENTS}
    doubles = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    want = mk.moe_mlp(expert_index=index, activation="gelu", plan=plan, **doubles)

    rows = mk.permute(leaves["x"], plan, impl=impl)
    hidden = mk.grouped_gemm(rows, leaves["w_up"], plan.offsets, bias=leaves["b_up"], impl=impl)
    acted = F.gelu(hidden)
    rows = mk.grouped_gemm(acted, leaves["w_down"], plan.offsets, bias=leaves["b_down"], impl=impl)
    got = mk.unpermute(rows, plan, leaves["expert_weight"], impl=impl)

    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(got.shape, generator=generator).to(DEVICE)
    wanted = torch.autograd.grad(want, list(doubles.values()), upstream.double())
    gradients = torch.autograd.grad(got, list(leaves.values()), upstream)
    for name, gradient, value in zip(leaves, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
def test_rows_are_kept_for_weights_that_learn_alone(generator, impl: str):
    x, _, weight, plan = _drawn(generator)
    rows = mk.permute(x, plan, impl=impl).requires_grad_()
    for learns in (False, True):
        shapes = set()

        def note(saved: Tensor, shapes: set = shapes) -> Tensor:
            shapes.add(saved.shape)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            y = mk.unpermute(rows, plan, weight.requires_grad_(learns), impl=impl)
        assert (rows.shape in shapes) == learns
        with recorded() as calls:
            y.sum().backward()
        assert [str(call[0]) for call in calls] == ["molex.unpermute_bwd.default"]
    assert weight.grad is not None


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
def test_one_gradient_of_the_two(generator, impl: str):
    _, _, weight, plan = _drawn(generator)
    rows = torch.randn(T * K, D, generator=generator).to(DEVICE)
    both = (rows.clone().requires_grad_(), weight.clone().requires_grad_())
    y = mk.unpermute(both[0], plan, both[1], impl=impl)
    want = torch.autograd.grad(y, both, y.detach())
    for place in (0, 1):
        given = [rows, weight]
        given[place] = given[place].clone().requires_grad_()
        y = mk.unpermute(given[0], plan, given[1], impl=impl)
        (got,) = torch.autograd.grad(y, given[place], y.detach())
        assert torch.equal(got, want[place])


@pytest.mark.parametrize("impl", IMPLS)
def test_sizes_of_nothing(impl: str):
    index = torch.zeros(0, 3, dtype=torch.int64, device=DEVICE)
    plan = mk.route_plan(index, 4)
    x = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    rows = mk.permute(x, plan, impl=impl)
    assert rows.shape == (0, 5)
    y = mk.unpermute(rows, plan, top_k=3, impl=impl)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert x.grad.shape == (0, 5)
    plan = mk.route_plan(torch.zeros(6, 2, dtype=torch.int64, device=DEVICE), 4)
    rows = mk.permute(torch.zeros(6, 0, device=DEVICE), plan, impl=impl)
    assert rows.shape == (12, 0)
    weight = torch.ones(6, 2, device=DEVICE, requires_grad=True)
    mk.unpermute(rows, plan, weight, impl=impl).sum().backward()
    assert not weight.grad.any()


def test_another_number_of_tokens_is_refused(generator):
    x, _, weight, plan = _drawn(generator)
    rows = mk.permute(x, plan)
    for given, options in (((x[:10], plan), {}), ((x, plan), {"top_k": 2})):
        with pytest.raises(
            ValueError, match=r"top_k: expected T \* K = 33, the plan's assignments"
        ):
            mk.permute(*given, **options)
    for given, options, message in (
        ((rows, plan), {}, "top_k: expected an int, got NoneType"),
        ((rows, plan), {"top_k": 4}, r"top_k: expected T \* K = 33"),
        ((rows, plan, weight), {"top_k": 11}, "top_k: expected 3, as expert_weight has columns"),
        ((rows, plan, weight[:10]), {}, r"top_k: expected T \* K = 33, .* got 3 for T=10"),
        ((rows[:32], plan, weight), {}, r"rows: expected shape \[T \* K, D\] with T \* K = 33"),
        ((rows, tuple(plan), weight), {}, "plan: expected a RoutePlan, got tuple"),
        ((rows, plan, weight.half()), {}, "expert_weight: expected dtype float32, got float16"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            mk.unpermute(*given, **options)
    with pytest.raises(TypeError, match="x: expected dtype"):
        mk.permute(x.long(), plan)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernel of a CPU reads the plan")
def test_a_plan_of_other_ids_leads_nowhere(generator):
    x, _, _, plan = _drawn(generator)
    wrong = plan._replace(permutation=plan.permutation + 5, inverse=plan.inverse + 5)
    with pytest.raises(RuntimeError, match="not this call's plan"):
        mk.permute(x, wrong, impl="cpu")
    with pytest.raises(RuntimeError, match="not this call's plan"):
        mk.unpermute(mk.permute(x, plan), wrong, top_k=K, impl="cpu")


def test_autocast_changes_neither(generator):
    x, _, weight, plan = _drawn(generator)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        rows = mk.permute(x, plan)
        assert rows.dtype == torch.float32
        half = mk.unpermute(rows.bfloat16(), plan, weight.half())
        assert half.dtype == torch.bfloat16
        assert torch.equal(mk.unpermute(rows, plan, weight), mk.unpermute(rows, plan, weight))
    want = mk.unpermute(rows.bfloat16(), plan, weight.half().float())
    assert torch.equal(half, want)
