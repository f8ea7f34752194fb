"""Balance without a loss: the bias of the choice, by itself and as a router's buffer."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import molex_kernels as mk

COUNTS = {"too few": [3, 9, 0, 4, 4], "even": [4] * 5, "none": [0] * 5}


def _bias(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_bias_by_hand(counts: list[int], dtype: torch.dtype):
    mean = sum(counts) / 5
    bias = torch.linspace(-1, 1, 5, device=DEVICE)
    want = [
        b + 0.25 * ((mean > c) - (mean < c)) for b, c in zip(bias.tolist(), counts, strict=True)
    ]
    given = torch.tensor(counts, dtype=dtype, device=DEVICE)
    before = given.clone()
    assert mk.update_expert_bias(bias, given, rate=0.25) is None
    torch.testing.assert_close(bias, _bias(*want), rtol=0, atol=0)
    assert torch.equal(given, before)


def test_counts_are_compared_exactly():
    """One in a billion more than the mean, which no fp32 number shows."""
    bias = _bias(0, 0, 0)
    counts = torch.tensor([10**9, 10**9 + 1, 10**9 + 1], device=DEVICE)
    mk.update_expert_bias(bias, counts, rate=1.0)
    assert bias.tolist() == [1, -1, -1]


def test_a_bias_of_a_model_that_is_trained_gets_no_gradient():
    bias = torch.nn.Parameter(_bias(0, 0))
    version = bias._version
    mk.update_expert_bias(bias, torch.tensor([1, 3], device=DEVICE), rate=0.5)
    assert bias.tolist() == [0.5, -0.5]
    assert bias.requires_grad
    assert bias.grad_fn is None
    assert bias._version > version


def _router(**options) -> mk.TopKRouter:
    return mk.TopKRouter(8, 4, 2, score="sigmoid", expert_bias=True, **options).to(DEVICE)


def test_a_router_counts_in_training_alone(generator):
    router = _router()
    assert router.expert_bias.tolist() == [0] * 4
    x = torch.randn(3, 7, 8, generator=generator).to(DEVICE)
    index = torch.cat([router(x).expert_index, router(x[:1]).expert_index])
    router.eval()(x)
    assert torch.equal(router.expert_counts, torch.bincount(index.flatten(), minlength=4))
    mask = torch.arange(7, device=DEVICE) < torch.tensor([[7], [2], [0]], device=DEVICE)
    router.train().expert_counts.zero_()
    masked = router(x, token_mask=mask).expert_index[mask.flatten()]
    assert torch.equal(router.expert_counts, torch.bincount(masked.flatten(), minlength=4))
    assert router.expert_counts.sum() == 18


def test_a_router_chooses_by_its_bias_and_learns_it(generator):
    router = _router(bias=True)
    router.bias.data.copy_(_bias(3, 1, 0, 0))  # the first expert gets all tokens
    x = torch.randn(200, 8, generator=generator).to(DEVICE)
    shares = []
    for _ in range(300):
        index = router(x).expert_index
        shares.append(torch.bincount(index.flatten(), minlength=4).cpu() / 400)
        counts = router.expert_counts.clone()
        before = router.expert_bias.clone()
        router.update_expert_bias(rate=0.01)
        want = before.clone()
        mk.update_expert_bias(want, counts, rate=0.01)
        assert torch.equal(router.expert_bias, want)
        assert not router.expert_counts.any()
    assert shares[0].max() > 0.4
    assert torch.stack(shares[-100:]).mean(0).max() < 0.3  # one step's may be a little above
    routed = mk.topk_route(
        x, router.weight, top_k=2, gate_bias=router.bias, score="sigmoid",
        expert_bias=router.expert_bias,
    )  # fmt: skip
    assert torch.equal(router(x).expert_index, routed.expert_index)
    one = _bias(9, 0, 0, 0)
    assert (router(x, expert_bias=one).expert_index[:, 0] == 0).all()


def test_what_a_router_keeps_of_its_bias():
    router = _router()
    assert set(router.state_dict()) == {"weight", "expert_bias"}
    router.expert_bias.copy_(_bias(0.001, 0.1001, 0.2, 0.3))
    kept = router.expert_bias.clone()
    other = _router()
    other.load_state_dict(router.state_dict())
    for moved in (other, copy.deepcopy(router).bfloat16(), copy.deepcopy(router).half()):
        assert torch.equal(moved.expert_bias, kept)
        assert moved.expert_counts.dtype == torch.int64
    assert copy.deepcopy(router).double().expert_bias.dtype == torch.float64
    router.reset_parameters()
    assert not router.expert_bias.any()
    empty = mk.TopKRouter(8, 4, 2, expert_bias=True, device="meta", dtype=torch.bfloat16)
    empty = empty.to_empty(device=DEVICE)
    empty.reset_parameters()
    assert empty.expert_bias.dtype == torch.float32
    assert not empty.expert_counts.any()
    plain = mk.TopKRouter(8, 4, 2)
    assert set(plain.state_dict()) == {"weight"}
    with pytest.raises(ValueError, match="update_expert_bias: expected a router with expert_bias"):
        plain.update_expert_bias(rate=0.1)


def test_a_router_with_counts_compiles_in_one_graph(generator):
    x = torch.randn(9, 8, generator=generator).to(DEVICE)
    router = _router()
    compiled = torch.compile(copy.deepcopy(router), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x).expert_index, router(x).expert_index)
    assert torch.equal(compiled.expert_counts, router.expert_counts)
    assert router.expert_counts.sum() == 36


def test_a_router_names_what_is_not_usual():
    plain = "d_model=8, num_experts=4, top_k=2, bias=False"
    assert mk.TopKRouter(8, 4, 2).extra_repr() == plain
    options = {
        "score": "sigmoid",
        "num_groups": 2,
        "top_groups": 1,
        "renormalize": True,
        "scaling": 2.5,
        "expert_bias": True,
    }
    shown = "score='sigmoid', num_groups=2, top_groups=1, renormalize=True, scaling=2.5"
    repr_ = mk.TopKRouter(8, 4, 2, **options).extra_repr()
    assert repr_ == f"{plain}, {shown}, expert_bias=True"
    assert mk.TopKRouter(8, 4, 2, scaling=2.5).extra_repr() == f"{plain}, scaling=2.5"
