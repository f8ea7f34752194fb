"""The native CPU kernels by themselves: at sizes that several threads share."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

import molex_kernels as mk
from molex_kernels import _extension
from molex_kernels.testing.budget import judge, measure

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" or _extension.why_not() is not None, reason="native CPU code"
)

molex = torch.ops.molex
FACTS = _extension.build_facts()
ON_TILES = FACTS.get("tiles", "none") != "none"
# Products of bf16 are the library's own on tiles, and of fp32 without AVX-512.
BY_ONEDNN = not ON_TILES and (
    FACTS.get("vectors") == "16 floats" or platform.machine() not in ("x86_64", "AMD64")
)


def _routing(generator):
    tokens, width, experts = 3000, 300, 12
    x = torch.randn(tokens, width, generator=generator)
    cluster = torch.randint(experts + 1, (tokens,), generator=generator)
    upstream = torch.randn(tokens, 2, generator=generator)
    for stat in ("mad", "variance", "pairwise"):
        yield from molex.cluster_statistics(x, cluster, None, None, experts, stat)
        yield mk.ac_weights(x, cluster, experts, stat=stat, impl="cpu")
    for tokens_of in (x, x[:200], x[:5]):
        count = tokens_of.shape[0]
        gate = torch.randn(experts, width, generator=generator)
        table = torch.rand(experts + 1, width, generator=generator)
        labels = torch.stack([cluster[:count], cluster[:count].flip(0)], 1)
        weighing = (table, labels, torch.rand(count, 2, generator=generator))
        plain = (1, 1, False, 1.0)
        routed = molex.router_fwd(
            tokens_of, gate, gate[:, 0], None, *weighing, 2, "softmax", *plain
        )
        index, weight, logits = routed
        yield from routed
        yield from molex.router_bwd(
            upstream[:count], logits, tokens_of, gate, logits, index, weight, *weighing, "softmax",
            False, 1.0, [True] * 3,
        )  # fmt: skip
    index, weight, logits = mk.topk_route(x, gate, top_k=2, impl="cpu")
    yield from mk.route_plan(index, experts, impl="cpu")
    given = torch.randint(-1, experts + 1, (tokens, 3), generator=generator)
    yield from mk.route_from_index(logits, given, impl="cpu")
    yield from mk.route_from_logits(logits, top_k=3, impl="cpu")
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
    for curvature in ([None] * 4, factors):
        yield molex.camex_deltas_fwd(base, stack, *curvature, True)
        needs = [True, True] + [factor is not None for factor in curvature]
        yield from molex.camex_deltas_bwd(stack, base, stack, *curvature, True, needs)
    x = torch.randn(segments, 33, width, generator=generator)
    bias = torch.randn(segments, rows, generator=generator)
    y = molex.camex_linear_fwd(x, base, stack, gates, bias)
    yield y
    yield from molex.camex_linear_bwd(y, x, base, stack, gates, [True] * 5)


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


def _attention(generator):
    for options in ({}, {"causal": True}, {"has_q": True}, {"mask": True, "dropout": 0.2}):
        inputs = _clear_of_kinks(generator, 200, 24, heads=(2, 3), **options)
        out, sparse, leaves = _run(inputs, "cpu")
        yield from (out, sparse)
        yield from torch.autograd.grad([out, sparse], leaves, [torch.ones_like(out), sparse])


def _clear_of_kinks(
    generator, tokens, width, *, heads=(1, 2), has_q=False, mask=False, dropout=0.0, **options
):
    """Elements of k stand clear of the threshold, a third of them above it, and stay there."""
    shape = (*heads, tokens, width)

    def uniform(low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    above = torch.rand(shape, generator=generator) < 0.3
    magnitude = torch.where(above, uniform(1.5, 2.0), uniform(0.05, 0.2))
    inputs = {
        "k": magnitude * torch.randn(shape, generator=generator).sign(),
        "v": 0.15 * torch.randn(shape, generator=generator),
        # One for each token: the sum over a head would leave its error to luck.
        "threshold": 1.1 + 0.1 * torch.rand(shape[:3], generator=generator),
        "num_iters": 3,
        "return_sparse": True,
        **options,
    }
    if has_q:
        inputs["q"] = torch.randn(shape, generator=generator)
    if mask:
        inputs["key_mask"] = torch.rand((heads[0], tokens), generator=generator) < 0.7
    if dropout:
        inputs["dropout_p"] = dropout
        inputs["dropout_seed"] = torch.randint(2**62, (), generator=generator)
    return inputs


def _run(inputs, impl, dtype=torch.float32):
    leaves = {
        name: value.to(dtype).requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    out, sparse = mk.rpc_attention(**{**inputs, **leaves}, impl=impl)
    return out, sparse, list(leaves.values())


def _check_attention(draw_inputs, generator, *, gradients=True):
    """Results and gradients within the budget."""

    def draw(ours="cpu"):
        inputs, outcomes = draw_inputs(), []
        for impl, dtype in ((ours, None), ("reference", torch.float64), ("reference", None)):
            out, sparse, leaves = _run(inputs, impl, dtype or torch.float32)
            outcomes.append([out, sparse])
            if not gradients:
                continue
            if len(outcomes) == 1:
                upstream = [torch.randn(out.shape, generator=generator) + 1 for _ in range(2)]
            outcomes[-1] += torch.autograd.grad(
                [out, sparse], leaves, [g.to(out.dtype) for g in upstream]
            )
        return {
            name: measure(name, *values, torch.float32)
            for name, *values in zip("LSkvtq", *outcomes, strict=False)
        }

    # The gradient of t is large, and so is its error, for some rows alone.
    judge(draw, reference_alone=lambda: draw("reference"), enough=4096)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 197, "width": 16},
        {"tokens": 144, "width": 20, "scale": -0.3},
        {"tokens": 530, "width": 16},
        {"tokens": 150, "width": 17, "causal": True},
        {"tokens": 150, "width": 16, "mask": True},
        {"tokens": 150, "width": 16, "mask": True, "causal": True, "has_q": True},
        {"tokens": 100, "width": 33, "has_q": True, "dropout": 0.3},
        {"tokens": 100, "width": 16, "dropout": 0.3},
        {"tokens": 97, "width": 136},
        {"tokens": 49, "width": 2, "heads": (3, 4)},
    ],
    ids=lambda options: "-".join(f"{n}_{v}" for n, v in options.items()),
)
def test_attention_over_several_blocks(options, generator):
    _check_attention(lambda: _clear_of_kinks(generator, **options), generator)


@pytest.mark.parametrize("growth", [0.01, 0.03])
@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("has_q", [False, True])
def test_attention_whose_scores_change_along_the_tokens(has_q, order, growth, generator):
    """The largest scores are far from the diagonal, which a row's block starts with."""
    steps = torch.arange(160.0) if order == "rising" else torch.arange(159.0, -1, -1)

    def draw_inputs():
        inputs = _clear_of_kinks(generator, 160, 16, has_q=has_q)
        # All in one direction: scores without near ties, which rounding would decide.
        inputs["k"] = inputs["k"][:, :, :1].sign() * torch.exp(growth * steps)[:, None] / 8
        inputs["threshold"] = torch.full((1, 2, 160), math.inf)
        inputs["num_iters"] = 1
        return inputs

    # Where a softmax is 0 and 1, the gradient's small rest is a matter of rounding.
    _check_attention(draw_inputs, generator, gradients=growth < 0.02)


@pytest.mark.parametrize("kernels", [_routing, _merging, _attention, _dispatch, _layer_mixing])
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


@pytest.mark.parametrize("score", ["softmax_topk", "sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_token_is_routed_alike_in_any_company(renormalize, score, generator):
    tokens, experts, top_k = 37, 21, 5
    logits = torch.randn(tokens, experts, generator=generator)
    logits[3] = -torch.inf
    given = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
    given[5] = -1
    options = {"score": score, "renormalize": renormalize, "scaling": 1.5, "impl": "cpu"}
    chosen = mk.route_from_logits(logits, top_k=top_k, **options)
    weighed = mk.route_from_index(logits, given, **options)
    for t in range(tokens):
        alone = mk.route_from_logits(logits[t : t + 1], top_k=top_k, **options)
        assert torch.equal(alone.expert_index[0], chosen.expert_index[t])
        for one, all_of_them in (
            (alone, chosen),
            (mk.route_from_index(logits[t : t + 1], given[t : t + 1], **options), weighed),
        ):
            same = {"rtol": 0, "atol": 0, "equal_nan": True}
            torch.testing.assert_close(one.expert_weight[0], all_of_them.expert_weight[t], **same)
    assert torch.equal(weighed.expert_weight[5], torch.zeros(top_k))


# Few experts, so that tokens are processed side by side, and more; one token, a part of those side
# by side, and more than are summed at a time.
@pytest.mark.parametrize("experts", [1, 6, 64, 65])
@pytest.mark.parametrize("tokens", [1, 4, 19, 530])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_of_any_size(masked, tokens, experts, generator):
    drawn = torch.randn(tokens, experts, generator=generator)
    index = torch.randint(experts, (tokens, 2), generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.6 if masked else None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for loss in (
            lambda z, impl: mk.router_z_loss(z, mask=mask, impl=impl),
            lambda z, impl: mk.load_balance_loss(
                mk.Routing(index, z, z), temperature=0.7, mask=mask, impl=impl
            ),
        ):
            exact = drawn.to(dtype).double().requires_grad_()
            want = loss(exact, "reference")
            (gradient,) = torch.autograd.grad(want, exact)
            given = drawn.to(dtype, copy=True)
            if mask is not None:
                given[~mask] = torch.nan
            given.requires_grad_()
            found = loss(given, "cpu")
            (own,) = torch.autograd.grad(found, given)
            # Probabilities cancel in the gradient: what is left errs by the rounding of what was.
            share = 4 * torch.finfo(torch.float32).eps * experts / max(tokens, 1)
            rounding = torch.finfo(dtype).eps * gradient.abs().max().item()
            torch.testing.assert_close(found.double(), want, rtol=2e-6, atol=1e-12)
            torch.testing.assert_close(own.double(), gradient, rtol=0, atol=share + rounding)


# Rows in all tiles of the product of few rows, and one more than are few for the width of 81.
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 15])
@pytest.mark.parametrize("columns", [1, 2, 35])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_in_16_bits(dtype, columns, rows, generator):
    """Weights with any strides, beside memory that is NaN."""
    width, experts = 81, 3
    x = torch.randn(rows, width, generator=generator).to(dtype)
    bias = torch.randn(experts, columns, generator=generator).to(dtype)
    wide = torch.full((experts, columns + 1, width + 5), torch.nan, dtype=dtype)
    wide[:, :columns, :width] = torch.randn(experts, columns, width, generator=generator).to(dtype)
    offsets = torch.tensor([0, rows, rows], dtype=torch.int32)
    strided = wide[:, :columns, :width]
    for weight in (strided, strided.mT.contiguous().mT, strided.contiguous()):
        want = x.double() @ weight[1].double().mT + bias[1].double()
        y = mk.grouped_gemm(x, weight, offsets, bias=bias, impl="cpu")
        # Sums in fp32, rounded once. Tiles leave out the product of the low terms of fp16; oneDNN's
        # products of bf16 are rounded before the bias is added.
        ulp, sums = torch.finfo(dtype).eps / 2, x.double().abs() @ weight[1].double().abs().mT
        share = 4 * torch.finfo(torch.float32).eps
        rounded = want.abs()
        if dtype == torch.float16 and ON_TILES:
            share += 2.0**-16
        if dtype == torch.bfloat16 and BY_ONEDNN:
            rounded = rounded + (want - bias[1]).abs()
        allowed = ulp * rounded + share * (sums + bias[1].abs())
        assert ((y.double() - want).abs() <= allowed).all()


def _resident() -> int:
    """Bytes in use: what earlier tests freed would hide what is kept."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(BY_ONEDNN, reason="oneDNN keeps a primitive for each number of rows")
def test_memory_does_not_grow_with_new_numbers_of_rows(generator):
    """No number of rows has a primitive of its own in bf16, or a plan, that is kept."""
    tokens, width, experts, top_k = 512, 64, 8, 2
    x = torch.randn(tokens, width, generator=generator).bfloat16().requires_grad_()
    up, down = (
        torch.randn(experts, *size, generator=generator).bfloat16().requires_grad_()
        for size in ((16, width), (width, 16))
    )
    weight = torch.rand(tokens, top_k, generator=generator)
    counts, kept = set(), []

    def growth(steps: int, keeps: bool) -> int:
        before = _resident()
        for _ in range(steps):
            shares = torch.rand(experts, generator=generator) ** 4
            index = torch.multinomial(shares.expand(tokens, -1), top_k, generator=generator)
            counts.update(index.flatten().bincount(minlength=experts).tolist())
            x.grad = up.grad = down.grad = None
            y = mk.moe_mlp(x, index, weight, up, down, impl="cpu")
            y.sum().backward()
            if keeps:
                kept.append(y.detach())
        return _resident() - before

    growth(60, keeps=False)  # what is allocated once, and what the allocator holds back
    limit = 150 * tokens * width * 2 / 2  # half of a result from each
    assert growth(150, keeps=False) < limit
    assert len(counts) > 150
    assert growth(150, keeps=True) > limit  # the measure sees what is kept
