"""What merging means: the equations, the published forward, the special cases, the memory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor

import molex_kernels as mk
from benchmarks.memory import peak_bytes
from molex_kernels import KroneckerCurvature, _extension
from molex_kernels.ops.merging import cpu
from molex_kernels.ops.merging.baselines import published_camex_linear
from molex_kernels.ops.merging.plan import nearest_factors

S, T, E, OUT, D, R = 3, 5, 4, 12, 10, 2
IMPLS = ["triton", "reference"] if DEVICE.type == "cuda" else ["cpu", "triton", "reference"]


def draw(generator: torch.Generator, *sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


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


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


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
    zero = torch.zeros_like(base)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        moved = mk.camex_linear(v["x"], zero, None, v["gates"], deltas=experts - base)
    moved_exactly = torch.bmm(v["x"], (weights - base).mT)
    assert (moved.float() - moved_exactly).abs().max() < 0.02 * moved_exactly.abs().max()


def _extra_bytes(passes, segments: int, generator: torch.Generator) -> dict[str, int]:
    """Peak bytes of each pass beyond its results, at this many segments."""
    tokens, width, num_experts = 4, 16, 3

    def make(*sizes):
        return draw(generator, *sizes).float().cpu()

    x, dy = make(segments, tokens, width), make(segments, tokens, width)
    base, deltas = make(width, width), make(num_experts, width, width)
    gates = make(segments, num_experts)
    arguments = {
        "forward": (x, base, deltas, gates, None),
        "backward": (dy, x, base, deltas, gates, [True] * 5),
    }
    extra = {}
    for name, function in passes.items():
        peak = peak_bytes(lambda f=function, given=arguments[name]: f(*given), torch.device("cpu"))
        results = function(*arguments[name])
        results = results if isinstance(results, tuple) else (results,)
        extra[name] = peak - sum(r.untyped_storage().nbytes() for r in results)
    return extra


@pytest.fixture
def native():
    if reason := _extension.why_not():
        pytest.skip(reason)


@pytest.mark.usefixtures("native")
def test_memory_does_not_grow_with_the_segments_on_a_cpu(generator):
    passes = {"forward": cpu.linear_forward, "backward": cpu.linear_backward}
    few, many = (_extra_bytes(passes, segments, generator) for segments in (8, 64))
    # Forward, all but the result is a thread's own memory for a few rows, outside the allocator.
    assert few["forward"] == many["forward"] == 0
    # Not equal: results that come after the peak are taken off it as well.
    assert 0 < many["backward"] <= few["backward"]
    assert many["backward"] <= 4 * (2 * 3 + 2 * cpu.GROUP + 3) * 16 * 16


class _NoKernel:
    """Stands in for a kernel: the interpreter's own copies would count as memory."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def without_kernels(monkeypatch):
    from molex_kernels.ops.merging.kernels import parts

    for name in vars(parts).copy():
        if name.startswith("_merging_"):
            monkeypatch.setattr(parts, name, _NoKernel())


def test_memory_of_the_kernels_grows_by_the_gates_partial_sums_alone(without_kernels, generator):
    from molex_kernels.ops.merging.kernels import launch

    passes = {"forward": launch.linear_forward, "backward": launch.linear_backward}
    few, many = (_extra_bytes(passes, segments, generator) for segments in (8, 64))
    assert few["forward"] == many["forward"] == 0
    assert many["backward"] - few["backward"] <= 4 * 56 * 3  # one tile holds this weight


@pytest.mark.usefixtures("native", "without_kernels")
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_memory_of_the_deltas_does_not_grow_with_the_rank(impl, generator):
    from molex_kernels.ops.merging.kernels import launch

    module = cpu if impl == "cpu" else launch
    base, experts = (draw(generator, *s).float().cpu() for s in ((OUT, D), (E, OUT, D)))
    peaks = []
    for rank in (9, 33):
        curvature = KroneckerCurvature.identity(E, OUT, D, rank)
        needs = [True] * 2 + [False] * 4
        calls = (
            partial(module.deltas_forward, base, experts, *curvature, True),
            partial(module.deltas_backward, experts, base, experts, *curvature, True, needs),
        )
        peaks.append([peak_bytes(call, torch.device("cpu")) for call in calls])
    factors = 4 * 24 * E * (3 * 3 + 4 * 4 + 2 * 2 + 5 * 5)
    assert all(many - few <= factors for few, many in zip(*peaks, strict=True))


def test_the_measure_of_memory_sees_merged_weights(generator):
    from molex_kernels.ops.merging import reference

    few, many = (
        _extra_bytes({"forward": reference.linear}, segments, generator) for segments in (8, 64)
    )
    assert many["forward"] - few["forward"] >= 56 * 16 * 16 * 4


# Gates, losses and the dynamic base


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


# Modules


def published_gates(x: Tensor, module: mk.CAMExLinear) -> Tensor:
    return torch.softmax(x.mean(-2) @ module.w_gate, -1)


def published_weights(module: mk.CAMExLinear, gates: Tensor) -> Tensor:
    """Plain loops over experts and ranks; [..., O, D]."""
    tau = module.experts - module.base
    majority = tau.sum(0).sign()
    weights = module.base
    for e in range(module.experts.shape[0]):
        delta = 0
        for r in range(module.out1.shape[0]):
            left = torch.kron(module.out1[r, e], module.out2[r, e])
            right = torch.kron(module.in1[r, e], module.in2[r, e])
            delta = delta + left @ tau[e] @ right.T
        if module.mask == "ties":
            delta = delta * (tau[e].sign() == majority)
        weights = weights + gates[..., e, None, None] * delta
    return weights


def _module(generator, **options) -> mk.CAMExLinear:
    module = mk.CAMExLinear(D, OUT, E, rank=R, dtype=torch.float64, device=DEVICE, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(generator, *p.shape))
    return module.eval()


@pytest.mark.parametrize("mask", [None, "ties"])
def test_sequence_level_module_is_the_published_forward(mask, generator):
    module = _module(generator, mask=mask)
    x = draw(generator, 3, 7, D).requires_grad_()
    y, loss = module(x)
    gates = published_gates(x, module)
    want = torch.stack([x[b] @ published_weights(module, gates[b]).T for b in range(3)])
    assert same(y, want)
    importance = gates.sum(0)
    assert same(loss, 1e-2 * importance.var() / (importance.mean() ** 2 + 1e-10))
    leaves = [x, *(p for n, p in module.named_parameters() if n != "w_noise")]
    got = torch.autograd.grad(y.square().sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), leaves), strict=True):
        assert same(a, b, 1e-9)


def test_causal_segments_take_the_gate_before(generator):
    length, segment, batch = 8, 4, 2
    module = _module(generator, segment=segment, bias=True, loss_coef=1e-5)
    with torch.no_grad():
        module.bias.copy_(module.base_bias)  # the published bias cannot run: leave it out
    x = draw(generator, batch, length, D).requires_grad_()
    y, _ = module(x)
    rows = []
    for b in range(batch):
        parts = x[b].view(-1, segment, D)
        for s in range(length // segment):
            gates = published_gates(parts[max(s - 1, 0)], module)
            gates = gates if s else gates.detach()
            rows.append(parts[s] @ published_weights(module, gates).T + module.base_bias)
    want = torch.cat(rows).view(batch, length, OUT)
    assert same(y, want)
    got = torch.autograd.grad(y.square().sum(), (x, module.w_gate, module.experts))
    wanted = torch.autograd.grad(want.square().sum(), (x, module.w_gate, module.experts))
    assert all(same(a, b, 1e-9) for a, b in zip(got, wanted, strict=True))


def test_segments_do_not_see_what_comes_after(generator):
    module = _module(generator, segment=4)
    x = draw(generator, 1, 12, D)
    y, _ = module(x)
    changed = x.clone()
    changed[:, 8:] += 1
    assert torch.equal(module(changed)[0][:, :8], y[:, :8])


def test_a_uniform_start_is_strictly_causal(generator):
    x = draw(generator, 1, 8, D)
    changed = x.clone()
    changed[:, 2:] += 1
    own, uniform = _module(generator, segment=4), _module(generator, segment=4, first="uniform")
    assert torch.equal(uniform(changed)[0][:, :2], uniform(x)[0][:, :2])
    assert not torch.equal(own(changed)[0][:, :2], own(x)[0][:, :2])


def test_a_length_that_segments_do_not_divide_is_named(generator):
    module = _module(generator, segment=4)
    with pytest.raises(ValueError, match=r"segments of 4 divide, got 10; the nearest are 8 or 12"):
        module(draw(generator, 1, 10, D))
    with pytest.raises(ValueError, match=r"got 3; the nearest are 4"):
        module(draw(generator, 1, 3, D))


def test_dynamic_bases_go_from_layer_to_layer(generator):
    options = {"rank": R, "own_base": False, "dtype": torch.float64, "device": DEVICE}
    layers = [mk.CAMExMLP(D, OUT, E, activation="gelu", **options).eval() for _ in range(2)]
    bases = (draw(generator, OUT, D), draw(generator, D, OUT))
    x = draw(generator, 2, 6, D)
    y, _ = layers[0](x, bases=bases)
    deltas = layers[0].deltas(bases)
    again, _ = layers[0](x, bases=bases, deltas=deltas)
    assert same(again, y)
    moved = layers[0].next_bases(0.5, bases=bases, deltas=deltas)
    for base, delta, after in zip(bases, deltas, moved, strict=True):
        assert same(after, base + 0.5 / E * delta.sum(0))
    z, loss = layers[1](y, bases=moved)
    assert z.shape == x.shape
    assert loss.shape == ()
    with pytest.raises(ValueError, match="base: expected a tensor"):
        layers[0](x)


@pytest.mark.parametrize("transposed", [False, True])
def test_from_a_pretrained_layer(transposed, generator):
    linear = torch.nn.Linear(D, OUT, dtype=torch.float64, device=DEVICE)
    source = linear
    if transposed:
        source = torch.nn.Module()
        source.weight = torch.nn.Parameter(linear.weight.detach().T.clone())
        source.bias = linear.bias
    module = mk.CAMExLinear.from_linear(source, E, rank=R, transposed=transposed)
    assert torch.equal(module.experts, linear.weight.expand(E, -1, -1))
    assert torch.equal(module.base, linear.weight)
    assert torch.equal(module.bias, linear.bias.expand(E, -1))
    x = draw(generator, 2, 6, D)
    assert same(module(x)[0], linear(x))


def _published_state(module: mk.CAMExLinear, prefix: str) -> dict[str, Tensor]:
    names = {
        "w_gate": "w_gate",
        "w_noise": "w_noise",
        "weight": "experts",
        "res_weight": "base",
        "bias": "bias",
        "res_bias": "base_bias",
        "curve1_out": "out1",
        "curve2_out": "out2",
        "curve1_in": "in1",
        "curve2_in": "in2",
        "curve1_bias": "bias_out1",
        "curve2_bias": "bias_out2",
    }
    state = {p: getattr(module, name) for p, name in names.items()}
    state = {prefix + p: value.detach() for p, value in state.items() if value is not None}
    if prefix + "res_bias" in state:
        state[prefix + "res_bias"] = state[prefix + "res_bias"][None]
    return {**state, prefix + "mean": torch.zeros(1), prefix + "std": torch.ones(1)}


@pytest.mark.parametrize("bias", [False, True])
def test_published_names_load(bias, generator):
    module = _module(generator, bias=bias)
    other = _module(generator, bias=bias)
    other.load_published(_published_state(module, "wi."), "wi.")
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    state = _published_state(module, "")
    del state["curve2_in"]
    with pytest.raises(ValueError, match="curve2_in"):
        other.load_published(state)


def test_published_mlps_load(generator):
    options = {"rank": R, "dtype": torch.float64, "device": DEVICE}
    first, second = (mk.CAMExMLP(D, OUT, E, **options) for _ in range(2))
    state = _published_state(first.up, "wi.") | _published_state(first.down, "wo.")
    second.load_published(state)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_modules_compile_and_train(generator):
    module = mk.CAMExMLP(D, OUT, E, rank=1, mask=None, expert_dropout=0.1, bias=True, device=DEVICE)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * draw(generator, *p.shape, dtype=torch.float32))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = draw(generator, 2, 6, D, dtype=torch.float32)
    torch.manual_seed(1)
    y, loss = compiled(x)
    (y.square().mean() + loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    module.eval()
    assert torch.allclose(compiled(x)[0], module(x)[0], atol=1e-5)
