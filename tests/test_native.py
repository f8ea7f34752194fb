"""The native CPU kernels by themselves: at sizes that several threads share."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

import molex_kernels as mk
from molex_kernels import _extension

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" or _extension.why_not() is not None, reason="native CPU code"
)

molex = torch.ops.molex


def _routing(generator):
    tokens, width, experts = 3000, 150, 12
    x = torch.randn(tokens, width, generator=generator)
    cluster = torch.randint(experts + 1, (tokens,), generator=generator)
    logits = torch.randn(tokens, experts, generator=generator)
    upstream = torch.randn(tokens, 2, generator=generator)
    for stat in ("mad", "variance", "pairwise"):
        yield from molex.cluster_statistics_cpu(x, cluster, None, None, experts, stat)
        yield mk.ac_weights(x, cluster, experts, stat=stat, impl="cpu")
    index, weight = molex.select_experts_cpu(logits, None, 2, "softmax_topk")
    yield index
    yield weight
    yield molex.router_logits_bwd_cpu(logits, index, weight, upstream, logits, "softmax_topk")
    out = torch.empty_like(x)
    table = torch.rand(experts + 1, width, generator=generator)
    molex.weigh_tokens_cpu(x, table, cluster[:, None], None, out)
    yield out
    yield from mk.route_plan(index, experts, impl="cpu")
    logits.requires_grad_()
    for kind in ("switch", "published"):
        loss = mk.load_balance_loss(mk.Routing(index, weight, logits), kind=kind, impl="cpu")
        yield loss
        yield from torch.autograd.grad(loss, logits)
    loss = mk.router_z_loss(logits, impl="cpu")
    yield loss
    yield from torch.autograd.grad(loss, logits)


def _merging(generator):
    experts, rows, width, segments = 5, 1200, 101 * 4, 7
    base = torch.randn(rows, width, generator=generator)
    stack = torch.randn(experts, rows, width, generator=generator)
    factors = [torch.randn(2, experts, m, m, generator=generator) for m in (30, 40, 4, 101)]
    gates = torch.rand(segments, experts, generator=generator)
    majority = molex.camex_majority_cpu(base, stack)
    yield majority
    yield molex.camex_deltas_cpu(base, stack, None, None, None, None, majority)
    yield molex.camex_deltas_cpu(base, stack, *factors, majority)
    weights = torch.empty(segments, rows, width)
    molex.camex_merge_cpu(base, stack, gates, weights)
    yield weights
    x = torch.randn(segments, 33, width, generator=generator)
    bias = torch.randn(segments, rows, generator=generator)
    yield molex.camex_linear_cpu(x, base, stack, gates, bias)
    dbase, ddeltas = torch.zeros_like(base), torch.zeros_like(stack)
    yield molex.camex_merge_bwd_cpu(weights, stack, gates, dbase, ddeltas, True)
    yield from (dbase, ddeltas)


def _dispatch(generator):
    tokens, width, hidden, experts = 700, 40, 36, 6

    def normal(*sizes, scale=1.0):
        return (scale * torch.randn(sizes, generator=generator)).requires_grad_()

    index = torch.randint(-1, experts, (tokens, 3), generator=generator)
    for layout in ("concat", "interleaved"):
        x, weight = normal(tokens, width), normal(tokens, 3)
        up, down = normal(experts, 2 * hidden, width, scale=0.2), normal(experts, width, hidden)
        biases = {"b_up": normal(experts, 2 * hidden), "b_down": normal(experts, width)}
        leaves = (x, weight, up, down, *biases.values())
        options = {"activation": "swiglu", "gate_layout": layout, "impl": "cpu"}
        y = mk.moe_mlp(x, index, weight, up, down, **biases, **options)
        yield y
        yield from torch.autograd.grad(y, leaves, y.detach())
        offsets = torch.tensor([0, 150, 150, 420, 500, 650], dtype=torch.int32)
        y = mk.grouped_gemm(x, up, offsets, bias=biases["b_up"], impl="cpu")
        yield y
        yield from torch.autograd.grad(y, (x, up, biases["b_up"]), y.detach())


def _layer_mixing(generator):
    branches, tokens, width, layers = 3, 1300, 70, 5
    logits = torch.randn(tokens, layers, generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.9
    for mode in ("mode", "mean_softmax", "mean_sigmoid"):
        yield mk.layer_vote(logits, mode=mode, mask=mask, impl="cpu")
    leaves = [torch.randn(branches, tokens, width, generator=generator) for _ in range(2)]
    leaves += [torch.randn(size, generator=generator) for size in (branches, width, width)]
    outputs, residual, coeff, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    norm = (weight, bias, 1e-5)
    y, normed = mk.layer_mix(outputs, coeff, residual=residual, norm=norm, impl="cpu")
    yield from (y, normed)
    yield from torch.autograd.grad((y, normed), leaves, (normed.detach(), y.detach()))


@pytest.mark.parametrize("kernels", [_routing, _merging, _dispatch, _layer_mixing])
def test_the_thread_count_changes_nothing(kernels):
    outcomes = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outcomes.append(list(kernels(torch.Generator().manual_seed(0))))
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            assert torch.equal(a, b)
