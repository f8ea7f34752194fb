"""What routing means: token by token, in words of its own, and with the published quirks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import molex_kernels as mk

IMPLS = ("triton", "reference") if DEVICE.type == "cuda" else ("triton", "cpu", "reference")


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """Where Triton runs: what a test makes without naming a device is made there."""
    with DEVICE:
        yield


def _tokens(generator: torch.Generator, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=dtype, device="cpu").to(DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["softmax_topk", "softmax", "sigmoid"])
def test_topk_token_by_token(generator, impl: str, score: str):
    x, gate, bias = _tokens(generator, 9, 6), _tokens(generator, 5, 6), _tokens(generator, 5)
    routing = mk.topk_route(x, gate, top_k=2, gate_bias=bias, score=score, impl=impl)
    for t in range(9):
        z = [
            sum(x[t, d].item() * gate[e, d].item() for d in range(6)) + bias[e].item()
            for e in range(5)
        ]
        best = sorted(range(5), key=lambda e: -z[e])[:2]
        assert routing.expert_index[t].tolist() == best
        chosen = {
            "softmax_topk": [math.exp(z[e]) / sum(math.exp(z[b]) for b in best) for e in best],
            "softmax": [math.exp(z[e]) / sum(map(math.exp, z)) for e in best],
            "sigmoid": [1 / (1 + math.exp(-z[e])) for e in best],
        }[score]
        assert routing.expert_weight[t].tolist() == pytest.approx(chosen, rel=1e-5)
        assert routing.logits[t].tolist() == pytest.approx(z, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lower_expert(impl: str):
    gate = torch.tensor([[1.0], [2.0], [2.0], [1.0], [2.0]])
    routing = mk.topk_route(torch.ones(1, 1), gate, top_k=4, impl=impl)
    assert routing.expert_index.tolist() == [[1, 2, 4, 0]]
    many = mk.topk_route(torch.ones(1, 1), torch.ones(40, 1), top_k=36, impl=impl)
    assert many.expert_index.tolist() == [list(range(36))]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_chosen_last_and_stays_in_range(impl: str):
    x = torch.tensor([[1.0], [math.nan]])
    bias = torch.tensor([0.0, math.nan, -math.inf, 1.0])
    routing = mk.topk_route(x, torch.ones(4, 1), top_k=4, gate_bias=bias, impl=impl)
    assert routing.expert_index.tolist() == [[3, 0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("impl", IMPLS)
def test_expert_bias_changes_the_choice_not_the_weight(generator, impl: str):
    x, gate = _tokens(generator, 20, 6), _tokens(generator, 4, 6)
    push = torch.tensor([0.0, 0.0, 0.0, 100.0])
    plain = mk.topk_route(x, gate, top_k=1, score="sigmoid", impl=impl)
    pushed = mk.topk_route(x, gate, top_k=1, score="sigmoid", expert_bias=push, impl=impl)
    assert (pushed.expert_index == 3).all()
    torch.testing.assert_close(pushed.expert_weight[:, 0], plain.logits[:, 3].sigmoid())


def _by_groups(key: list[float], num_groups: int, top_groups: int, top_k: int) -> list[int]:
    """DeepSeek-V3's rule for one token, one group after the other."""
    size = len(key) // num_groups
    sums = [sum(sorted(key[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
    groups = sorted(range(num_groups), key=lambda g: -sums[g])[:top_groups]
    inside = [e for e in range(len(key)) if e // size in groups]
    return sorted(inside, key=lambda e: -key[e])[:top_k]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["softmax_topk", "softmax", "sigmoid", "logits", "sqrtsoftplus"])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(4, 2), (3, 1), (12, 5), (1, 1)])
def test_groups_one_by_one(generator, impl: str, score: str, num_groups: int, top_groups: int):
    x, gate, bias = _tokens(generator, 20, 6), _tokens(generator, 12, 6), _tokens(generator, 12)
    options = {"top_k": 3, "num_groups": num_groups, "top_groups": top_groups, "score": score}
    for expert_bias in (None, bias):
        routing = mk.topk_route(x, gate, **options, expert_bias=expert_bias, impl=impl)
        z = routing.logits
        scores = {
            "softmax": z.softmax(1),
            "sigmoid": z.sigmoid(),
            "sqrtsoftplus": torch.log1p(z.exp()).sqrt(),
        }.get(score, z)
        keys = z if expert_bias is None else scores + bias
        for t in range(20):
            want = _by_groups(keys[t].tolist(), num_groups, top_groups, 3)
            assert routing.expert_index[t].tolist() == want
        if score != "softmax_topk":
            weights = scores.gather(1, routing.expert_index)
            torch.testing.assert_close(routing.expert_weight, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_groups_and_groups_without_a_number(impl: str):
    route = {"top_k": 4, "num_groups": 3, "top_groups": 2, "impl": impl}
    equal = mk.topk_route(torch.ones(1, 1), torch.ones(6, 1), **route)
    assert equal.expert_index.tolist() == [[0, 1, 2, 3]]
    # The sums are 3 + 0, 2 + 2 and 4 + (the lowest): the last one is lower than any number's.
    gate = torch.tensor([[3.0], [0.0], [2.0], [2.0], [4.0], [math.nan]])
    assert mk.topk_route(torch.ones(1, 1), gate, **route).expert_index.tolist() == [[0, 2, 3, 1]]
    for value in (math.nan, -math.inf):
        lost = mk.topk_route(torch.full((1, 1), value), torch.ones(6, 1), **route)
        assert lost.expert_index.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["softmax_topk", "softmax", "sigmoid", "logits", "sqrtsoftplus"])
def test_renormalized_weights_sum_to_the_scaling(generator, impl: str, score: str):
    x, gate = _tokens(generator, 20, 6), _tokens(generator, 12, 6)
    options = {"top_k": 3, "score": score, "impl": impl}
    plain = mk.topk_route(x, gate, **options)
    over_sum = mk.topk_route(x, gate, renormalize=True, scaling=-2.5, **options)
    assert torch.equal(over_sum.expert_index, plain.expert_index)
    torch.testing.assert_close(over_sum.expert_weight.sum(1), torch.full((20,), -2.5))
    want = -2.5 * plain.expert_weight / plain.expert_weight.sum(1, keepdim=True)
    torch.testing.assert_close(over_sum.expert_weight, want, rtol=1e-4, atol=1e-5)
    scaled = mk.topk_route(x, gate, scaling=-2.5, **options)
    torch.testing.assert_close(scaled.expert_weight, -2.5 * plain.expert_weight)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("scaling", [1.0, 0.0])
def test_scores_near_zero_have_finite_weights_and_slopes(impl: str, score: str, scaling: float):
    x = torch.tensor([[-95.0], [-1000.0], [90.0]], requires_grad=True)
    # All but the last expert are chosen, whose logit takes all of the softmax.
    gate, push = torch.tensor([[1.0], [1.01], [-1.0]]), torch.tensor([9.0, 9.0, 0.0])
    routing = mk.topk_route(
        x,
        gate,
        top_k=2,
        score=score,
        expert_bias=push,
        renormalize=True,
        scaling=scaling,
        impl=impl,
    )
    torch.testing.assert_close(routing.expert_weight.sum(1), torch.full((3,), scaling))
    (gradient,) = torch.autograd.grad(routing.expert_weight.square().sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("score", ["softmax_topk", "softmax", "sigmoid", "logits", "sqrtsoftplus"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_gradient_of_the_fp64_reference(generator, score: str, renormalize: bool):
    x, gate = (
        _tokens(generator, *sizes, dtype=torch.float64).requires_grad_()
        for sizes in ((5, 4), (6, 4))
    )
    options = {"score": score, "renormalize": renormalize, "scaling": 1.5, "num_groups": 3}

    def weights_and_logits(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return mk.topk_route(x, gate, top_k=2, top_groups=2, **options)[1:]

    assert torch.autograd.gradcheck(weights_and_logits, (x, gate))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["softmax_topk", "softmax", "sigmoid", "logits", "sqrtsoftplus"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_replayed_choice_has_the_same_weights(generator, impl: str, score, renormalize: bool):
    logits, upstream = _tokens(generator, 20, 12).requires_grad_(), _tokens(generator, 20, 3)
    weighing = {"score": score, "renormalize": renormalize, "scaling": 2.5, "impl": impl}
    routing = mk.route_from_logits(logits, top_k=3, num_groups=4, top_groups=2, **weighing)
    replayed = mk.route_from_index(logits, routing.expert_index, **weighing)
    assert torch.equal(replayed.expert_weight, routing.expert_weight)
    assert replayed.logits is routing.logits is logits
    first, second = (
        torch.autograd.grad(r.expert_weight, logits, upstream)[0] for r in (routing, replayed)
    )
    assert torch.equal(second, first)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["softmax_topk", "softmax", "sigmoid", "logits", "sqrtsoftplus"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_an_expert_elsewhere_is_as_one_not_given(generator, impl: str, score, renormalize: bool):
    logits = _tokens(generator, 4, 6).requires_grad_()
    index = torch.tensor([[1, -1, 4], [6, 2, 0], [-1, 9, 6], [5, 5, -7]], device=DEVICE)
    weighing = {"score": score, "renormalize": renormalize, "impl": impl}
    found = mk.route_from_index(logits, index, **weighing)
    (gradient,) = torch.autograd.grad(found.expert_weight.square().sum(), logits)
    for t in range(4):
        here = (index[t] >= 0) & (index[t] < 6)
        leaf = logits[t : t + 1].detach().requires_grad_()
        alone = mk.route_from_index(leaf, index[t][here][None], **weighing).expert_weight
        weights = torch.zeros(3, device=DEVICE).masked_scatter(here, alone.detach())
        torch.testing.assert_close(found.expert_weight[t], weights)
        (want,) = torch.autograd.grad(alone.square().sum(), leaf)
        torch.testing.assert_close(gradient[t], want[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_route_from_logits_is_topk_route_of_its_logits(generator, impl: str):
    options = {"top_k": 2, "score": "sigmoid", "expert_bias": _tokens(generator, 5), "impl": impl}
    routing = mk.topk_route(_tokens(generator, 9, 6), _tokens(generator, 5, 6), **options)
    again = mk.route_from_logits(routing.logits, **options)
    assert all(map(torch.equal, again, routing))


def _dispersion(values: list[float], stat: str) -> float:
    n = len(values)
    mean = sum(values) / n
    if stat == "mad":
        return sum(abs(v - mean) for v in values) / n
    if stat == "variance":
        return sum((v - mean) ** 2 for v in values) / n
    pairs = [abs(a - b) for i, a in enumerate(values) for j, b in enumerate(values) if i != j]
    return sum(pairs) / len(pairs) if pairs else 0.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stat", ["mad", "variance", "pairwise"])
def test_statistics_pair_by_pair(generator, impl: str, stat: str):
    x = _tokens(generator, 14, 3) + 5
    cluster = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2, 2, 3, 3, 3, -1, 9])
    inf = float("inf")
    w = mk.ac_weights(x, cluster, 5, stat=stat, eps=0.1, clip=inf, norm="none", impl=impl)
    for c in range(5):
        rows = x[cluster == c]
        for q in range(3):
            expected = 1 / (_dispersion(rows[:, q].tolist(), stat) + 0.1) if len(rows) else 1.0
            assert w[c, q].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("recipe", ["lm", "swin", "softmoe"])
@pytest.mark.parametrize("empty", ["mask", "published"])
def test_recipes_in_order(generator, impl: str, recipe: str, empty: str):
    """The three published orders of clip and norm, with one tight cluster that the clip catches."""
    x = _tokens(generator, 30, 4)
    x[:10] *= 1e-3
    cluster = torch.arange(30) // 10
    s = torch.stack([(x[cluster == c] - x[cluster == c].mean(0)).abs().mean(0) for c in range(3)])
    if empty == "published":
        s = torch.cat([s, torch.zeros(1, 4)])
    eps, clip = {"lm": (1e-4, 10), "swin": (1e-4, 1.5), "softmoe": (0.35, 5)}[recipe]
    raw = 1 / (s + eps)
    w = raw.clamp(max=clip * raw.mean().item())
    w = {"lm": w / w.mean(0), "swin": w / raw.mean(), "softmoe": w / w.mean()}[recipe]
    if empty == "mask":
        w = torch.cat([w, torch.ones(1, 4)])
    got = mk.ac_weights(x, cluster, 4, recipe=recipe, empty=empty, impl=impl)
    torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-5)


def test_an_empty_cluster_takes_over_in_the_published_form(generator):
    x = _tokens(generator, 6000, 8)
    cluster = torch.arange(6000) % 15
    published = mk.ac_weights(x, cluster, 16, empty="published")
    masked = mk.ac_weights(x, cluster, 16)
    assert published[15].min() > 10
    assert published[:15].max() < 0.1
    assert (masked[15] == 1).all()
    assert (masked[:15] - 1).abs().max() < 0.5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mix", [False, True])
def test_ac_route_is_topk_route_of_weighted_tokens(generator, impl: str, mix: bool):
    x, gate = _tokens(generator, 30, 7), _tokens(generator, 4, 7)
    prev = mk.topk_route(_tokens(generator, 30, 7), gate, top_k=2)
    w = mk.ac_weights(x, prev.expert_index[:, 0], 4)
    weights = w[prev.expert_index[:, 0]]
    if mix:
        weights = (prev.expert_weight[..., None] * w[prev.expert_index]).sum(1)
    expected = mk.topk_route(weights * x, gate, top_k=2)
    for given in (prev.expert_weight, prev.expert_weight.double()):
        got = mk.ac_route(x, gate, prev.expert_index, given, top_k=2, mix=mix, impl=impl)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_statistics_get_no_gradient(generator, impl: str):
    x, stats = (
        _tokens(generator, 12, 5).requires_grad_(),
        _tokens(generator, 12, 5).requires_grad_(),
    )
    gate = _tokens(generator, 3, 5)
    prev = torch.arange(12)[:, None] % 3
    routing = mk.ac_route(x, gate, prev, top_k=2, stats_from=stats, impl=impl)
    routing.logits.sum().backward()
    w = mk.ac_weights(stats, prev[:, 0], 3)[prev[:, 0]]
    torch.testing.assert_close(x.grad, w * gate.sum(0), rtol=1e-4, atol=1e-4)
    assert stats.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_plan_by_hand(impl: str):
    index = torch.tensor([[2, 0], [7, 2], [0, -1], [2, 2]])
    plan = mk.route_plan(index, 3, impl=impl)
    assert plan.counts.tolist() == [2, 0, 4]
    assert plan.offsets.tolist() == [2, 2, 6]
    assert plan.permutation.tolist() == [1, 4, 0, 3, 6, 7, 2, 5]
    assert plan.inverse[plan.permutation].tolist() == list(range(8))


@pytest.mark.parametrize("kind", ["switch", "published"])
def test_load_balance_by_hand(generator, kind: str):
    routing = mk.topk_route(_tokens(generator, 11, 6), _tokens(generator, 4, 6), top_k=2)
    loss = mk.load_balance_loss(routing, temperature=0.5, kind=kind)
    total = 0.0
    for e in range(4):
        fraction = (routing.expert_index == e).sum().item() / 22
        probability = (routing.logits / 0.5).softmax(1)[:, e].sum().item()
        total += 4 * fraction * probability / (11 if kind == "switch" else 22)
    assert loss.item() == pytest.approx(total, rel=1e-5)


LOSS_IMPLS = ("reference",) if DEVICE.type == "cuda" else ("cpu", "reference")
LOSSES = {
    "switch": lambda routing, **o: mk.load_balance_loss(routing, **o),
    "published": lambda routing, **o: mk.load_balance_loss(
        routing, kind="published", temperature=0.5, **o
    ),
    "z": lambda routing, **o: mk.router_z_loss(routing.logits, **o),
}


@pytest.mark.parametrize("impl", LOSS_IMPLS)
@pytest.mark.parametrize("temperature", [0.3, 1e300])
def test_large_logits_at_any_temperature(generator, impl: str, temperature: float):
    """Of the largest logit, only one of two equal products may not be rounded."""
    logits = (_tokens(generator, 64, 8) * 1e9).requires_grad_()
    index = logits.detach().topk(2).indices
    found = mk.load_balance_loss(
        mk.Routing(index, None, logits), temperature=temperature, impl=impl
    )
    probability = (logits.detach().double() / temperature).softmax(1).mean(0)
    share = torch.bincount(index.flatten(), minlength=8) / index.numel()
    assert found.item() == pytest.approx(8 * (share * probability).sum().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", LOSS_IMPLS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("tokens", [7, 1200])
def test_a_masked_token_is_as_one_taken_out(generator, impl: str, loss, tokens: int):
    """Padding that all goes to one expert, so that it would show."""
    logits = _tokens(generator, tokens, 5)
    mask = _tokens(generator, tokens) < 0.5
    mask[1], mask[2] = True, False
    logits[~mask] = torch.tensor([9.0, 8.0, 0.0, 0.0, 0.0])
    index = logits.topk(2, dim=1).indices
    results = []
    for rows in (mask, slice(None)):
        leaf = logits.clone().requires_grad_()
        routing = mk.topk_route(leaf, torch.eye(5), top_k=2)._replace(
            expert_index=index[rows], logits=leaf[rows]
        )
        value = loss(routing, impl=impl, **({} if rows is mask else {"mask": mask}))
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
    assert not results[1][1][~mask].any()
    nobody = loss(routing, impl=impl, mask=torch.zeros_like(mask))
    assert nobody == 0
    assert not torch.autograd.grad(nobody, leaf)[0].any()


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_transformers_load_balance_is_k_times_switch(generator, top_k: int, masked: bool):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = _tokens(generator, 12, 5)
    routing = mk.topk_route(logits, torch.eye(5), top_k=top_k)
    mask = torch.arange(12) % 4 != 1
    theirs = mixtral.load_balancing_loss_func(
        (logits,), 5, top_k, mask.view(2, 6).long() if masked else None
    )
    ours = mk.load_balance_loss(routing, mask=mask if masked else None)
    torch.testing.assert_close(top_k * ours, theirs, rtol=1e-5, atol=0)


def test_losses_without_tokens_are_zero_and_differentiable():
    gate = torch.ones(4, 6, requires_grad=True)
    routing = mk.topk_route(torch.zeros(0, 6), gate, top_k=2)
    loss = mk.load_balance_loss(routing) + mk.router_z_loss(routing.logits)
    loss.backward()
    assert loss.item() == 0
    assert gate.grad.abs().max() == 0


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    squares = [math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()]
    assert mk.router_z_loss(logits).item() == pytest.approx(sum(squares) / 2, rel=1e-6)


def test_autocast_keeps_the_router_in_fp32(generator):
    x, gate = _tokens(generator, 30, 64), _tokens(generator, 8, 64)
    plain = mk.topk_route(x, gate, top_k=2)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = mk.topk_route(x, gate, top_k=2)
    assert torch.equal(plain.logits, cast.logits)


def test_modules_flatten_and_route(generator):
    router = mk.TopKRouter(16, 6, 2, bias=True)
    x = _tokens(generator, 2, 5, 16)
    first = router(x)
    direct = mk.topk_route(x.view(10, 16), router.weight, top_k=2, gate_bias=router.bias)
    assert torch.equal(first.expert_index, direct.expert_index)
    adaptive = mk.ACRouter(16, 6, 2, cosine=True, mix=True, recipe="swin")
    second = adaptive(x, first, stats_from=0.75 * x + 0.25)
    assert second.expert_index.shape == (10, 2)
    assert adaptive(x).expert_index.shape == (10, 2)


@pytest.mark.parametrize("mix", [False, True])
def test_padding_takes_no_part_in_the_clusters(generator, mix: bool):
    router = mk.ACRouter(16, 6, 2, mix=mix)
    x = _tokens(generator, 2, 20, 16)
    token_mask = torch.arange(20) < torch.tensor([[20], [11]])
    prev = mk.TopKRouter(16, 6, 2)(x)
    counted = token_mask.flatten()
    alone = router(x[token_mask], mk.Routing(*(t[counted] for t in prev)))
    x[~token_mask] = math.nan
    routing = router(x, prev, token_mask=token_mask)
    assert torch.equal(routing.expert_index[counted], alone.expert_index)
    torch.testing.assert_close(routing.logits[counted], alone.logits)
    assert ((routing.expert_index >= 0) & (routing.expert_index < 6)).all()
    assert router(x, token_mask=token_mask).expert_index.shape == (40, 2)


def test_the_cosine_gate_ignores_its_rows_norms(generator):
    router = mk.ACRouter(16, 6, 2, cosine=True)
    torch.testing.assert_close(router.weight.norm(dim=1), torch.full((6,), 1.5))
    x = _tokens(generator, 10, 16)
    before = router(x, router(x)).logits
    with torch.no_grad():
        router.weight.mul_(3)
    torch.testing.assert_close(router(x, router(x)).logits, before)
    router.renormalize_()
    torch.testing.assert_close(router.weight.norm(dim=1), torch.full((6,), 1.5))
    with pytest.raises(ValueError, match="cosine=True"):
        mk.ACRouter(16, 6, 2).renormalize_()


def test_published_names_load(generator):
    router = mk.TopKRouter(16, 6, 2, bias=True)
    state = {"moe.gate.gate.weight": _tokens(generator, 6, 16), "moe.gate.gate.bias": torch.ones(6)}
    router.load_published(state)
    assert torch.equal(router.weight, state["moe.gate.gate.weight"])
    assert torch.equal(router.bias, state["moe.gate.gate.bias"])
    adaptive = mk.ACRouter(16, 6, 2, cosine=True)
    adaptive.load_published({"gate.expert_embeddings": torch.ones(6, 16)})
    assert (adaptive.weight == 1).all()
    with pytest.raises(ValueError, match="expected one name ending in 'expert_embeddings'"):
        adaptive.load_published(state)
    with pytest.raises(ValueError, match=r"gate.weight: expected shape"):
        mk.TopKRouter(15, 6, 2).load_published(state)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_experts_and_many_choices(generator, impl: str):
    x, gate = _tokens(generator, 3, 5), _tokens(generator, 600, 5)
    routing = mk.topk_route(x, gate, top_k=12, impl=impl)
    z = x.double() @ gate.double().T
    best = z.sort(dim=1, descending=True).indices[:, :12]
    assert torch.equal(routing.expert_index, best)
    weights = z.gather(1, best).softmax(1)
    torch.testing.assert_close(routing.expert_weight.double(), weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["expert_weight", "logits"])
def test_a_gradient_through_one_result_alone(generator, name: str):
    gradients = []
    x, gate, bias = _tokens(generator, 9, 6), _tokens(generator, 5, 6), _tokens(generator, 5)
    for impl in IMPLS:
        leaves = [t.clone().requires_grad_() for t in (x, gate, bias)]
        routing = mk.topk_route(leaves[0], leaves[1], top_k=2, gate_bias=leaves[2], impl=impl)
        value = getattr(routing, name)
        gradients.append(torch.autograd.grad(value.square().sum(), leaves))
    for got in gradients[1:]:
        torch.testing.assert_close(got, gradients[0], rtol=1e-4, atol=1e-5)


def test_a_frozen_gate_gets_no_gradient(generator):
    x = _tokens(generator, 9, 6).requires_grad_()
    gate = _tokens(generator, 5, 6)
    mk.topk_route(x, gate, top_k=2, impl="triton").logits.sum().backward()
    torch.testing.assert_close(x.grad, gate.sum(0).expand(9, 6), rtol=1e-5, atol=1e-5)


def test_a_second_backward_pass_raises_under_triton(generator):
    x = _tokens(generator, 9, 6).requires_grad_()
    routing = mk.topk_route(x, _tokens(generator, 5, 6), top_k=2, impl="triton")
    loss = routing.expert_weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivative; impl="reference" has it'):
        gradient.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_stays_in_its_cluster(generator, impl: str):
    x = _tokens(generator, 12, 4)
    cluster = torch.arange(12) % 3
    options = {"eps": 0.1, "clip": math.inf, "norm": "none", "impl": impl}
    clean = mk.ac_weights(x, cluster, 3, **options)
    x[1] = math.nan
    w = mk.ac_weights(x, cluster, 3, **options)
    assert w[1].isnan().all()
    assert torch.equal(w[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("stat", "value"),
    [("mad", math.nan), ("variance", math.inf), ("pairwise", math.nan), ("pairwise", math.inf)],
)
def test_a_nan_takes_all_weights_where_they_are_clipped_at_their_mean(
    generator, impl: str, stat: str, value: float
):
    x = _tokens(generator, 40, 4)
    x[1, 2] = value
    options = {"eps": 0.1, "norm": "none", "stat": stat, "impl": impl}
    cluster = torch.arange(40) % 3
    assert mk.ac_weights(x, cluster, 3, clip=1.5, **options).isnan().all()
    where = mk.ac_weights(x, cluster, 3, clip=math.inf, **options).isnan()
    assert where.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_far_from_zero(generator, impl: str):
    """Two passes keep what the published E[x^2] - E[x]^2 loses to cancellation."""
    x = _tokens(generator, 40, 3)
    cluster = torch.arange(40) % 2
    options = {"stat": "variance", "eps": 1e-3, "impl": impl}
    near = mk.ac_weights(x, cluster, 2, **options)
    far = mk.ac_weights(x + 1000, cluster, 2, **options)
    torch.testing.assert_close(near, far, rtol=1e-2, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plan_is_a_stable_sort(generator, impl: str, dtype: torch.dtype):
    """More assignments than one block counts, read through strides."""
    wide = torch.randint(-2, 9, (6, 90), generator=generator, dtype=dtype, device="cpu")
    index = wide.to(DEVICE).T[:, ::2]
    plan = mk.route_plan(index, 7, impl=impl)
    ids = [i if 0 <= i < 7 else 7 for i in index.flatten().tolist()]
    order = sorted(range(len(ids)), key=lambda a: (ids[a], a))
    assert plan.permutation.tolist() == order
    assert plan.inverse.tolist() == [order.index(a) for a in range(len(ids))]
    assert plan.counts.tolist() == [ids.count(e) for e in range(7)]


def test_limits_of_the_kernels_are_named():
    gate = torch.zeros(1025, 2)
    with pytest.raises(NotImplementedError, match="at most 1024 experts, got 1025"):
        mk.topk_route(torch.zeros(3, 2), gate, top_k=1, impl="triton")
    with pytest.raises(NotImplementedError, match="top_k up to 64, got 65"):
        mk.topk_route(torch.zeros(3, 2), gate[:100], top_k=65, impl="triton")
    with pytest.raises(NotImplementedError, match="at most 1024 clusters, got 1025"):
        mk.ac_weights(torch.zeros(3, 2), torch.zeros(3).long(), 1025, impl="triton")
    assert mk.topk_route(torch.zeros(3, 2), gate, top_k=65).expert_index.shape == (3, 65)


def test_a_process_group_is_checked():
    index = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match="process_group: expected"):
        mk.ac_route(torch.zeros(3, 2), torch.zeros(4, 2), index, top_k=1, process_group="world")


def test_the_fp64_reference_to_twelve_digits():
    generator = torch.Generator().manual_seed(3)
    x = _tokens(generator, 8, 4, dtype=torch.float64)
    gate = _tokens(generator, 3, 4, dtype=torch.float64)
    cluster = torch.arange(8) % 3
    w = mk.ac_weights(x, cluster, 3, eps=0.1, clip=float("inf"), norm="none")
    logits = mk.ac_route(
        x, gate, cluster[:, None], top_k=2, eps=0.1, clip=float("inf"), norm="none"
    ).logits
    for c in range(3):
        rows = x[cluster == c].tolist()
        for q in range(4):
            mean = sum(row[q] for row in rows) / len(rows)
            s = sum(abs(row[q] - mean) for row in rows) / len(rows)
            assert w[c, q].item() == pytest.approx(1 / (s + 0.1), rel=1e-12)
    for t in range(8):
        for e in range(3):
            z = sum(w[t % 3, q].item() * x[t, q].item() * gate[e, q].item() for q in range(4))
            assert logits[t, e].item() == pytest.approx(z, rel=1e-12, abs=1e-12)
