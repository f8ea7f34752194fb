"""What merging means: the equations, the mask, the factors, dropout, autocast."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from merging import OUT, D, E, R, S, T, draw, same
from torch import Tensor

import molex_kernels as mk
from molex_kernels import KroneckerCurvature
from molex_kernels.ops.merging.types import nearest_factors
from molex_kernels.testing.baselines.merging import published_camex_linear

IMPLS = ["triton", "reference"] if DEVICE.type == "cuda" else ["cpu", "triton", "reference"]


def inputs_for(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    sizes = {
        "x": (S, T, D),
        "base": (OUT, D),
        "experts": (E, OUT, D),
        "gates": (S, E),
        "bias": (E, OUT),
        "base_bias": (OUT,),
        "out1": (R, E, 3, 3),
        "out2": (R, E, 4, 4),
        "in1": (R, E, 2, 2),
        "in2": (R, E, 5, 5),
        "bias_out1": (R, E, 3, 3),
        "bias_out2": (R, E, 4, 4),
    }
    return {name: draw(generator, *size, dtype=dtype) for name, size in sizes.items()}


def ours(v: dict[str, Tensor], mask: str | None, alpha: float = 1.0, **options) -> Tensor:
    return mk.camex_linear(
        v["x"],
        v["base"],
        v["experts"],
        v["gates"],
        curvature=KroneckerCurvature(v["out1"], v["out2"], v["in1"], v["in2"]),
        mask=mask,
        alpha=alpha,
        bias=v["bias"],
        base_bias=v["base_bias"],
        bias_curvature=(v["bias_out1"], v["bias_out2"]),
        **options,
    )


def dense(v: dict[str, Tensor], mask: str | None, alpha: float) -> Tensor:
    """Segment by segment, expert by expert, with the curvature as one dense matrix."""
    tau = v["experts"] - v["base"]
    tau_bias = v["bias"] - v["base_bias"]
    rows = []
    for s in range(S):
        weight, bias = v["base"], v["base_bias"]
        for e in range(E):
            delta, delta_bias = 0, 0
            for r in range(R):
                curvature = torch.kron(
                    torch.kron(v["out1"][r, e], v["out2"][r, e]),
                    torch.kron(v["in1"][r, e], v["in2"][r, e]),
                )
                delta = delta + (curvature @ tau[e].flatten()).view(OUT, D)
                of_bias = torch.kron(v["bias_out1"][r, e], v["bias_out2"][r, e])
                delta_bias = delta_bias + of_bias @ tau_bias[e]
            if mask == "ties":
                delta = delta * (tau[e].sign() == tau.sum(0).sign())
                delta_bias = delta_bias * (tau_bias[e].sign() == tau_bias.sum(0).sign())
            weight = weight + alpha * v["gates"][s, e] * delta
            bias = bias + alpha * v["gates"][s, e] * delta_bias
        rows.append(v["x"][s] @ weight.T + bias)
    return torch.stack(rows)


def gradients(function, v: dict[str, Tensor], upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: t.detach().requires_grad_() for name, t in v.items()}
    out = function(leaves)
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    return out.detach(), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("mask", [None, "ties"])
def test_equals_the_dense_kronecker_product(mask, generator):
    v = inputs_for(generator)
    upstream = draw(generator, S, T, OUT)
    got, got_gradients = gradients(lambda v: ours(v, mask, 0.7), v, upstream)
    want, want_gradients = gradients(lambda v: dense(v, mask, 0.7), v, upstream)
    assert same(got, want)
    for name, gradient in want_gradients.items():
        assert same(got_gradients[name], gradient), name


@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation_equals_the_dense_kronecker_product(impl, generator):
    v = inputs_for(generator)
    upstream = draw(generator, S, T, OUT)
    want, want_gradients = gradients(lambda v: dense(v, None, 0.7), v, upstream)
    single = {name: t.float() for name, t in v.items()}
    got, got_gradients = gradients(
        lambda v: ours(v, None, 0.7, impl=impl), single, upstream.float()
    )
    assert same(got.double(), want, 1e-4)
    for name, gradient in want_gradients.items():
        assert same(got_gradients[name].double(), gradient, 1e-4), name


def test_equals_the_merged_weights_and_a_product(generator):
    v = inputs_for(generator)
    names = ("x", "base", "experts", "gates", "out1", "out2", "in1", "in2")
    v = {name: v[name] for name in names}

    def curvature(v):
        return KroneckerCurvature(v["out1"], v["out2"], v["in1"], v["in2"])

    def fused(v):
        options = {"curvature": curvature(v), "mask": "ties", "alpha": 0.3}
        return mk.camex_linear(v["x"], v["base"], v["experts"], v["gates"], **options)

    def merged(v):
        options = {"curvature": curvature(v), "mask": "ties", "alpha": 0.3}
        weights = mk.camex_merge(v["base"], v["experts"], v["gates"], **options)
        assert weights.shape == (S, OUT, D)
        return torch.bmm(v["x"], weights.mT)

    upstream = draw(generator, S, T, OUT)
    got, got_gradients = gradients(fused, v, upstream)
    want, want_gradients = gradients(merged, v, upstream)
    assert same(got, want)
    assert all(same(got_gradients[name], g) for name, g in want_gradients.items())


def test_the_published_steps_compute_the_same(generator):
    v = inputs_for(generator)
    for mask in (None, "ties"):
        published = published_camex_linear(**v, mask=mask, alpha=0.7)
        assert same(published, ours(v, mask, 0.7))


@pytest.mark.parametrize("impl", IMPLS)
def test_kept_deltas_change_nothing(impl, generator):
    v = inputs_for(generator, torch.float32)
    v = {name: v[name] for name in ("x", "base", "experts", "gates", "out1", "out2", "in1", "in2")}
    upstream = draw(generator, S, T, OUT, dtype=torch.float32)

    def options(v):
        return {
            "curvature": KroneckerCurvature(v["out1"], v["out2"], v["in1"], v["in2"]),
            "mask": "ties",
            "impl": impl,
        }

    def at_once(v):
        return mk.camex_linear(v["x"], v["base"], v["experts"], v["gates"], **options(v))

    def kept(v):
        deltas = mk.camex_deltas(v["base"], v["experts"], **options(v))
        return mk.camex_linear(v["x"], v["base"], None, v["gates"], deltas=deltas, impl=impl)

    one, one_gradients = gradients(at_once, v, upstream)
    two, two_gradients = gradients(kept, v, upstream)
    assert torch.equal(one, two)
    for name, gradient in one_gradients.items():
        assert torch.equal(gradient, two_gradients[name]), name


@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize("num_experts", [3, 9])
def test_two_segments_in_one_program(segments, num_experts, monkeypatch, generator):
    from molex_kernels.ops.merging.kernels import config

    sizes = ((segments, 17, 32), (48, 32), (num_experts, 48, 32), (segments, num_experts))
    x, base, experts, gates = (draw(generator, *size).half() for size in sizes)
    v = {"x": x, "base": base, "experts": experts, "gates": gates}
    upstream = draw(generator, segments, 17, 48).half()
    paired = []
    decide = config.is_paired

    def recording(*arguments):
        paired.append(decide(*arguments))
        return paired[-1]

    monkeypatch.setattr(config, "is_paired", recording)
    results = []
    for programs in (132, 0):
        monkeypatch.setattr(config, "MIN_PROGRAMS", programs)
        results.append(gradients(lambda v: mk.camex_linear(**v, impl="triton"), v, upstream))
    assert paired == [False, False, True, True]
    (one, one_gradients), (two, two_gradients) = results
    assert same(one.double(), two.double(), 1e-3)
    for name, gradient in one_gradients.items():
        assert same(gradient.double(), two_gradients[name].double(), 1e-3), name


@pytest.mark.parametrize("impl", IMPLS)
def test_the_mask_keeps_what_agrees_with_the_sum(impl):
    base = torch.tensor([[1.0, 0.0, 2.0, -1.0]], device=DEVICE)
    tau = torch.tensor([[1.0, -1.0, 0.0, 0.0], [2.0, 3.0, 0.0, 5.0], [-1.0, -2.0, 0.0, -5.0]])
    experts = base + tau.to(DEVICE)[:, None]
    # Sums: 2, 0, 0, 0. Where it is 0 only experts that equal the base agree with it.
    want = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    got = mk.camex_deltas(base, experts, mask="ties", impl=impl)
    assert torch.equal(got[:, 0].cpu(), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_mask_is_one_where_all_experts_are_the_base(impl, generator):
    base = draw(generator, OUT, D, dtype=torch.float32)
    experts = base.expand(E, OUT, D).clone().requires_grad_()
    deltas = mk.camex_deltas(base, experts, mask="ties", impl=impl)
    assert not deltas.any()
    (gradient,) = torch.autograd.grad(deltas, experts, torch.ones_like(deltas))
    assert (gradient == 1).all()


@pytest.mark.parametrize("rank", [1, 3])
def test_the_identity_starts_as_published_or_as_tau(rank, generator):
    base, experts = draw(generator, OUT, D), draw(generator, E, OUT, D)
    for scale, factor in (("published", rank), ("unit", 1)):
        curvature = KroneckerCurvature.identity(E, OUT, D, rank, scale, dtype=torch.float64)
        curvature = KroneckerCurvature(*(c.to(DEVICE) for c in curvature))
        deltas = mk.camex_deltas(base, experts, curvature=curvature)
        assert same(deltas, factor * (experts - base))


def test_factors_are_those_of_the_published_code():
    assert [nearest_factors(n) for n in (768, 3072, 1024, 4096, 17, 1)] == [
        (24, 32),
        (48, 64),
        (32, 32),
        (64, 64),
        (1, 17),
        (1, 1),
    ]


def test_gates_need_not_sum_to_one(generator):
    x, base, experts = (draw(generator, *s) for s in ((1, T, D), (OUT, D), (2, OUT, D)))
    gates = torch.tensor([[2.0, -1.0]], dtype=torch.float64, device=DEVICE)
    weight = base + 2 * (experts[0] - base) - (experts[1] - base)
    assert same(mk.camex_linear(x, base, experts, gates), x @ weight.T)


def test_dropout_drops_whole_experts_and_keeps_the_mean(generator):
    segments = 4000
    x = torch.ones(segments, 1, 1, device=DEVICE)
    base = torch.zeros(1, 1, device=DEVICE)
    experts = torch.ones(1, 1, 1, device=DEVICE)
    gates = torch.ones(segments, 1, device=DEVICE)
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    y = mk.camex_linear(x, base, experts, gates, expert_dropout=0.25).flatten()
    kept = y != 0
    assert torch.allclose(y[kept], torch.tensor(1 / 0.75, device=DEVICE))
    # Five standard deviations of the share that is kept.
    assert abs(kept.float().mean().item() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / segments)


def test_a_dropped_gate_is_selected_away(generator, monkeypatch):
    """A gate that overflows and is dropped is 0, as any other."""
    x, base, experts = draw(generator, 1, T, D), draw(generator, OUT, D), draw(generator, E, OUT, D)
    gates = torch.full((1, E), 1.0, dtype=torch.float64, device=DEVICE)
    gates[0, 0] = torch.inf
    drop_first = torch.where(torch.arange(E, device=DEVICE) == 0, 0.0, 1.0).double()[None]
    monkeypatch.setattr(torch, "rand_like", lambda like: drop_first)
    gates.requires_grad_()
    y = mk.camex_linear(x, base, experts, gates, expert_dropout=0.5)
    want = x @ (base + 2 * (experts - base)[1:].sum(0)).T
    assert same(y, want)
    (gradient,) = torch.autograd.grad(y.sum(), gates)
    assert gradient[0, 0] == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_is_the_same_forward_and_backward(impl, generator):
    v = inputs_for(generator, torch.float32)
    x, base, experts, gates = (v[n].requires_grad_() for n in ("x", "base", "experts", "gates"))
    torch.manual_seed(5)
    y = mk.camex_linear(x, base, experts, gates, expert_dropout=0.5, impl=impl)
    torch.manual_seed(5)
    keep = (torch.rand_like(gates) >= 0.5).float() / 0.5
    want = mk.camex_linear(x, base, experts, gates * keep, impl=impl)
    assert torch.equal(y, want)
    upstream = torch.ones_like(y)
    leaves = (x, base, experts, gates)
    for got, expected in zip(
        torch.autograd.grad(y, leaves, upstream),
        torch.autograd.grad(want, leaves, upstream),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_autocast_makes_the_deltas_before_it_casts(generator):
    v = inputs_for(generator, torch.float32)
    base = v["base"]
    experts = base + 1e-3 * v["experts"]  # lost if the experts were cast first
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = mk.camex_linear(v["x"], base, experts, v["gates"])
        weights = mk.camex_merge(base, experts, v["gates"])
    assert y.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    assert torch.equal(weights, mk.camex_merge(base, experts, v["gates"]))
    zero = torch.zeros_like(base)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        moved = mk.camex_linear(v["x"], zero, None, v["gates"], deltas=experts - base)
    moved_exactly = torch.bmm(v["x"], (weights - base).mT)
    assert (moved.float() - moved_exactly).abs().max() < 0.02 * moved_exactly.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_rounds_no_merged_weight(impl, generator):
    v = inputs_for(generator, torch.float32)
    curvature = KroneckerCurvature(v["out1"], v["out2"], v["in1"], v["in2"])
    options = {"curvature": curvature, "mask": "ties", "impl": impl}
    weights = mk.camex_merge(v["base"], v["experts"], v["gates"], **options)
    deltas = mk.camex_deltas(v["base"], v["experts"], **options)
    zeros = {n: torch.zeros_like(v[n]) for n in ("x", "base", "experts")}
    biases = ours({**v, **zeros}, "ties", impl=impl)
    with torch.autocast(DEVICE.type, torch.float16):
        cast = mk.camex_merge(v["base"], v["experts"], v["gates"], **options)
        assert torch.equal(cast, weights)
        assert torch.equal(mk.camex_deltas(v["base"], v["experts"], **options), deltas)
        # Biases are merged before they are rounded, once.
        assert torch.equal(ours({**v, **zeros}, "ties", impl=impl), biases.half())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [(1, 0, 2, 3), (2, 3, 1, 0)])
def test_the_factors_of_an_empty_weight_get_zeros(sizes, impl, generator):
    o1, o2, d1, d2 = sizes
    base = draw(generator, o1 * o2, d1 * d2, dtype=torch.float32)
    experts = draw(generator, 3, *base.shape, dtype=torch.float32)
    factors = [draw(generator, 2, 3, m, m, dtype=torch.float32).requires_grad_() for m in sizes]
    deltas = mk.camex_deltas(base, experts, curvature=mk.KroneckerCurvature(*factors), impl=impl)
    assert deltas.shape == experts.shape
    for factor, gradient in zip(factors, torch.autograd.grad(deltas.sum(), factors), strict=True):
        assert torch.equal(gradient, torch.zeros_like(factor))
