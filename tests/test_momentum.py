"""What the momentum ops mean: against simulations, chains of layers and one another."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import nn

import molex_kernels as mk
from molex_kernels import _philox
from molex_kernels.ops.momentum.types import Coefficients

IMPLS = ("triton", "reference") if DEVICE.type == "cuda" else ("triton", "cpu", "reference")
LAYERS = 8
RULES = {
    "heavy_ball": mk.HeavyBall(0.7, 1.1),
    "negative": mk.HeavyBall(-0.4),
    "nesterov": mk.Nesterov(0.8, 0.9),
    "adam": mk.Adam(0.8, eps=1e-2),
    "adam_published": mk.Adam(1.0, eps=1e-2, decay=1.0),
    "robust": mk.RobustMomentum(10.0, 1.0, 0.8),
    "ademamix": mk.AdEMAMix(0.5, beta3=0.99, alpha=2.0, eps=1e-1, alpha_warmup=5, beta3_warmup=6),
    "signum": mk.Signum(0.6),
    "mars": mk.Mars(0.5, correction=0.3, eps=1e-2),
}


def normal(generator, *sizes, dtype=torch.float64):
    return torch.randn(sizes, generator=generator).to(DEVICE, dtype)


def simulate(name, x, forces):
    """The chain of layers with nothing of the package in it: numbers and formulas only.

    `forces[l](point)` is the experts' output of layer l.
    """
    zero = torch.zeros_like(x)
    m = p = v = m1 = m2 = f_prev = zero
    x_prev = x
    ys = []
    for t, force in enumerate(forces, start=1):
        if name == "robust":
            kappa, rho, smooth = 10.0, 0.8, 10.0
            alpha = rho**3 / ((kappa - 1) * (1 - rho) ** 2 * (1 + rho))
            f = force(x + alpha * (x - x_prev))
            x_prev = x
            m = kappa * rho**3 / (kappa - 1) * m + kappa * (1 - rho) ** 2 * (1 + rho) / smooth * f
            x = x - m
            ys.append(x)
            continue
        f = force(x)
        if name == "heavy_ball":
            m = 0.7 * m + 1.1 * f
            x = x - m
        elif name == "negative":
            m = -0.4 * m + f
            x = x - m
        elif name == "nesterov":
            m = 0.8 * m + 0.9 * f
            x = x - 0.8 * m - 0.9 * f
        elif name in ("adam", "adam_published"):
            p = 0.9 * p + 0.1 * f
            v = 0.999 * v + 0.001 * f * f
            step = (0.8 if name == "adam" else 1.0) * p / (v + 1e-2) ** 0.5
            x = (x if name == "adam" else zero) - step
        elif name == "ademamix":
            done = min(t / 6, 1.0)
            low, high = math.log(0.9), math.log(0.99)
            beta3 = min(0.99, math.exp(low * high / ((1 - done) * high + done * low)))
            m1 = 0.9 * m1 + 0.1 * f
            v = 0.999 * v + 0.001 * f * f
            m2 = beta3 * m2 + (1 - beta3) * f
            mixed = m1 / (1 - 0.9**t) + 2.0 * min(t / 5, 1.0) * m2
            x = x - 0.5 * mixed / ((v / (1 - 0.999**t)) ** 0.5 + 1e-1)
        elif name == "signum":
            v = 0.6 * v + 0.4 * f.sign()
            x = x - v
        else:
            c = f + 0.3 * 9 * (f - f_prev.detach())
            f_prev = f
            norm = (c * c).sum() ** 0.5
            c = c / norm if norm > 1 else c
            p = 0.9 * p + 0.1 * c
            v = 0.999 * v + 0.001 * c * c
            x = x - 0.5 * p / (v + 1e-2) ** 0.5
        ys.append(x)
    return ys


def chain(rule, x, forces, impl):
    state, ys = None, []
    for force in forces:
        f = force(rule.lookahead(x, state))
        x, state = mk.momentum_update(x, f, state, rule, impl=impl)
        ys.append(x)
    return ys


def linear_forces(weights):
    return [lambda point, w=w: torch.tanh(point @ w) + 0.1 * point for w in weights]


@pytest.mark.parametrize("name", RULES)
def test_eight_layers_agree_with_a_simulation(name, generator):
    x = normal(generator, 6, 5).requires_grad_()
    weights = [normal(generator, 5, 5).requires_grad_() for _ in range(LAYERS)]
    upstream = normal(generator, LAYERS, 6, 5)
    want = torch.stack(simulate(name, x, linear_forces(weights)))
    got = torch.stack(chain(RULES[name], x, linear_forces(weights), "reference"))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves = [x, *weights]
    expected = torch.autograd.grad(want, leaves, upstream)
    gradients = torch.autograd.grad(got, leaves, upstream)
    for a, b in zip(gradients, expected, strict=True):
        scale = max(b.abs().max().item(), 1.0)
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * scale)


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
@pytest.mark.parametrize("name", RULES)
def test_eight_layers_in_single_precision(name, impl, generator):
    """The kernels carry state and gradients through the whole chain."""
    leaves = [normal(generator, 6, 5), *(0.5 * normal(generator, 5, 5) for _ in range(LAYERS))]
    upstream = normal(generator, 6, 5)

    def run(dtype, impl):
        x, *weights = (leaf.to(dtype).detach().requires_grad_() for leaf in leaves)
        y = chain(RULES[name], x, linear_forces(weights), impl)[-1]
        return [y, *torch.autograd.grad(y, [x, *weights], upstream.to(dtype))]

    for exact, own, got in zip(
        run(torch.float64, "reference"),
        run(torch.float32, "reference"),
        run(torch.float32, impl),
        strict=True,
    ):
        error = (got - exact).abs().max()
        allowed = 4 * ((own - exact).abs().max() + 1e-6 * exact.abs().max())
        assert error <= allowed


def moe_inputs(generator, dtype=torch.float32, tokens=9, width=12, hidden=6, experts=4, top_k=2):
    def draw(*sizes):
        return normal(generator, *sizes, dtype=dtype)

    scores = torch.randn(tokens, experts, generator=generator)
    return {
        "x": draw(tokens, width),
        "expert_index": scores.topk(top_k).indices.to(DEVICE),
        "expert_weight": draw(tokens, top_k).softmax(1),
        "w_up": draw(experts, hidden, width),
        "w_down": draw(experts, width, hidden),
        "b_up": draw(experts, hidden),
        "b_down": draw(experts, width),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", RULES)
def test_fused_is_the_experts_and_then_the_update(name, impl, generator):
    inputs = moe_inputs(generator)
    rule = RULES[name]
    width = inputs["x"].shape[1]
    norm = (normal(generator, width, dtype=torch.float32), None, 1e-5)
    inner = normal(generator, *inputs["x"].shape, dtype=torch.float32)
    _, state = mk.momentum_update(inner, inner.flip(0), None, rule, impl=impl)
    tensors = [t for t in state if isinstance(t, torch.Tensor)]
    leaves = [
        t.requires_grad_()
        for t in (inner, norm[0], *tensors, *inputs.values())
        if t.is_floating_point() and t.is_leaf
    ]

    x = inputs.pop("x")
    fused, fused_state = mk.moe_mlp_momentum(
        x, state=state, rule=rule, norm=norm, expert_input=inner, impl=impl, **inputs
    )
    f = mk.moe_mlp(inner, impl=impl, **inputs)
    y, new = mk.momentum_update(x, f, state, rule, norm=norm, impl=impl)
    close = {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(fused, y, **close)
    for a, b in zip(fused_state, new, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, **close)
        else:
            assert a == b
    upstream = normal(generator, *y.shape, dtype=torch.float32)
    gradients = (
        torch.autograd.grad([out, s[0]], leaves, [upstream, upstream], allow_unused=True)
        for out, s in ((fused, fused_state), (y, new))
    )
    compared = 0
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            scale = max(b.abs().max().item(), 1.0)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * scale)
            compared += bool(a.abs().max() > 0)
    assert compared >= 3


@pytest.mark.parametrize("impl", IMPLS)
def test_leading_dimensions_are_tokens(impl, generator):
    inputs = moe_inputs(generator, tokens=12)
    rule = mk.HeavyBall(0.5)
    flat, (m,) = mk.moe_mlp_momentum(**inputs, state=None, rule=rule, impl=impl)
    for name in ("x", "expert_index", "expert_weight"):
        inputs[name] = inputs[name].view(3, 4, -1)
    shaped, (shaped_m,) = mk.moe_mlp_momentum(**inputs, state=None, rule=rule, impl=impl)
    assert shaped.shape == shaped_m.shape == (3, 4, 12)
    assert torch.equal(shaped.view(12, 12), flat)
    assert torch.equal(shaped_m.view(12, 12), m)


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_have_a_defined_gradient(impl):
    """A root of 0 has no slope: nothing becomes NaN where f and the state are 0."""
    for rule in (mk.AdEMAMix(), mk.Mars(), mk.Adam(), mk.Signum(0.9)):
        x = torch.ones(4, 8, device=DEVICE, requires_grad=True)
        f = torch.zeros(4, 8, device=DEVICE, requires_grad=True)
        y, state = mk.momentum_update(x, f, None, rule, impl=impl)
        gradients = torch.autograd.grad((y.sum() + state[1 % len(rule.states)].sum()), (x, f))
        assert all(torch.isfinite(t).all() for t in (y, *gradients)), rule


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", [mk.HeavyBall(0.7), mk.Adam(), mk.AdEMAMix()], ids=repr)
def test_narrow_state_stays_narrow(rule, impl, generator):
    x, f = (normal(generator, 4, 8, dtype=torch.float16) for _ in range(2))
    _, state = mk.momentum_update(x, f, None, rule, impl=impl)
    assert state[0].dtype == torch.float32
    narrow = tuple(s.half() if isinstance(s, torch.Tensor) else s for s in state)
    y, state = mk.momentum_update(x, f, narrow, rule, impl=impl)
    assert y.dtype == torch.float16
    assert state[0].dtype == torch.float16


@pytest.mark.parametrize("impl", IMPLS)
def test_state_survives(impl, generator):
    x, f, m = (normal(generator, 4, 8, dtype=torch.float32) for _ in range(3))
    before = m.clone()
    mk.momentum_update(x, f, (m,), mk.HeavyBall(0.7), impl=impl)
    with pytest.raises(ValueError, match="norm"):
        mk.momentum_update(x, f, (m,), mk.HeavyBall(0.7), norm=(x[0], None, -1.0), impl=impl)
    assert torch.equal(m, before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "rule", [mk.HeavyBall(0.7), mk.Nesterov(0.7), mk.Signum(0.6), mk.Adam()], ids=lambda r: r.kind
)
def test_a_state_of_16_bits_gives_fp32_leaves_their_digits(rule, impl, generator):
    """The norm saw the state before it was rounded, and so does the gradient of its weight."""
    half = torch.float16  # which the interpreter of Triton computes in, too
    x, f, up = (normal(generator, 33, 40).to(half) for _ in range(3))
    state = tuple((normal(generator, 33, 40).square() + 0.5).to(half) for _ in rule.states)
    weight = normal(generator, 40).float()
    found = []
    for dtype in (None, torch.float64):
        given = [t if dtype is None else t.to(dtype) for t in (x, f, *state)]
        given = [t.detach().requires_grad_() for t in given]
        leaf = weight.to(dtype or weight.dtype).requires_grad_()
        y, _ = mk.momentum_update(
            *given[:2],
            tuple(given[2:]),
            rule,
            norm=(leaf, None, 1e-5),
            impl="reference" if dtype else impl,
        )
        found.append(torch.autograd.grad(y, leaf, up.to(y.dtype))[0].double())
    assert (found[0] - found[1]).norm() < 2e-6 * found[1].norm()


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
def test_wide_rows_are_normalised_too(impl, generator):
    x, f = (normal(generator, 2, 4100, dtype=torch.float32).requires_grad_() for _ in range(2))
    weight = normal(generator, 4100, dtype=torch.float32).requires_grad_()
    results = []
    for name in (impl, "reference"):
        norm = (weight, None, 1e-5)
        y, _ = mk.momentum_update(x, f, None, mk.Adam(eps=1e-2), norm=norm, impl=name)
        results.append([y, *torch.autograd.grad(y, (x, f, weight), y.detach() + 1.0)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_a_fixed_linear_rule_keeps_nothing(generator):
    """No activation memory: the backward pass of heavy ball needs no tensor at all."""
    x, f = (normal(generator, 4, 8, dtype=torch.float32).requires_grad_() for _ in range(2))
    impl = "triton" if DEVICE.type == "cuda" else "cpu"
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, state = mk.momentum_update(x, f, None, mk.HeavyBall(0.7), impl=impl)
        y, _ = mk.momentum_update(y, f, state, mk.Nesterov(0.7), impl=impl)
    assert not any(t.numel() for t in kept)
    assert torch.autograd.grad(y.sum(), (x, f))[1].abs().min() > 0


def test_robust_constants():
    rule = mk.RobustMomentum(smoothness=4.0, convexity=1.0, rho=0.6)
    assert rule.mu == pytest.approx(4 * 0.216 / 3)
    assert rule.gamma == pytest.approx(4 * 0.16 * 1.6 / 4)
    assert rule.alpha == pytest.approx(0.216 / (3 * 0.16 * 1.6))


def test_robust_is_gradient_descent_that_converges(generator):
    """On a quadratic of that smoothness and convexity the method contracts at rate rho."""
    rule = mk.RobustMomentum(smoothness=10.0, convexity=1.0, rho=0.75)
    curvature = torch.linspace(1.0, 10.0, 7, dtype=torch.float64)
    x, state = normal(generator, 1, 7).cpu(), None
    start = x.norm()
    for _ in range(60):
        f = curvature * rule.lookahead(x, state)
        x, state = mk.momentum_update(x, f, state, rule)
    assert x.norm() < start * 100 * 0.75**60


def test_rules_are_values():
    assert mk.HeavyBall(0.7) == mk.HeavyBall(0.7, 1.0)
    assert mk.HeavyBall(0.7) != mk.Nesterov(0.7)
    assert replace(mk.Adam(), decay=1.0).decay == 1.0
    assert len(mk.Adam().coefficients(1)) == len(Coefficients._fields)


def test_the_numbers_keep_the_order_that_the_operators_expect():
    from molex_kernels.ops.momentum.op import KEEP

    assert Coefficients._fields[KEEP] == "keep"


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_is_replayed_and_unbiased(impl, generator):
    inputs = moe_inputs(generator, tokens=64, width=32)
    x = inputs["x"]
    seed = torch.randint(2**62, (), generator=generator).to(DEVICE)
    options = {"state": None, "rule": mk.HeavyBall(0.0), "impl": impl}
    whole, (f,) = mk.moe_mlp_momentum(**inputs, **options)
    dropped = {"dropout_p": 0.25, "dropout_seed": seed}
    y, (g,) = mk.moe_mlp_momentum(**inputs, **options, **dropped)
    again, _ = mk.moe_mlp_momentum(**inputs, **options, **dropped)
    assert torch.equal(y, again)
    kept = g != 0
    share = kept.double().mean().item()
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / kept.numel())
    torch.testing.assert_close(g[kept], f[kept] / 0.75, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, x - g)
    assert not torch.equal(whole, y)
    other, _ = mk.moe_mlp_momentum(**inputs, **options, dropout_p=0.25, dropout_seed=seed + 1)
    assert not torch.equal(other, y)


def test_dropout_draws_from_torchs_generator(generator):
    inputs = moe_inputs(generator)
    options = {"state": None, "rule": mk.HeavyBall(0.5), "dropout_p": 0.5}
    ys = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ys.append(mk.moe_mlp_momentum(**inputs, **options)[0])
    assert torch.equal(ys[0], ys[1])
    assert not torch.equal(ys[0], ys[2])


def test_philox_words():
    """Against a plain-integer implementation, positions beyond 32 bits included."""

    def word(seed, position):
        c = [position & 0xFFFFFFFF, position >> 32, 0, 0]
        k = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(7):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c[0]

    seed = 0x1234_5678_9ABC_DEF0
    assert _philox.words(torch.tensor(seed), 100).tolist() == [word(seed, p) for p in range(100)]


def published_layer(layer, x, m, rule):
    """`CustomizedMoEPositionwiseFFMoM` and its surroundings, one line per line."""
    probabilities, index = torch.topk(layer.router.weight @ x.T + layer.router.bias[:, None], 2, 0)
    probabilities = probabilities.softmax(0)
    f = torch.zeros_like(x)
    experts = layer.experts
    for k, t in itertools.product(range(2), range(len(x))):
        e = index[k, t]
        hidden = F.relu(F.linear(x[t], experts.w_up[e], experts.b_up[e]))
        f[t] += probabilities[k, t] * F.linear(hidden, experts.w_down[e], experts.b_down[e])
    m = rule.mu * m + rule.gamma * layer.sign * f
    s = layer.norm(x - m)
    return layer.norm_out(x + s), m


@pytest.mark.parametrize("sign", [1, -1])
def test_module_is_the_published_layer(sign, generator):
    rule = mk.HeavyBall(0.7, 0.9)
    layers = [
        mk.MomentumMoE(8, 6, 4, 2, rule, sign=sign, dtype=torch.float64, device=DEVICE)
        for _ in range(3)
    ]
    x = normal(generator, 10, 8)
    y, state, want, m = x, None, x, torch.zeros_like(x)
    for layer in layers:
        y, state, routing = layer(y, state)
        want, m = published_layer(layer, want, m, rule)
        assert routing[0].shape == (10, 2)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state[0], m, rtol=1e-11, atol=1e-11)


def test_pre_ln_wiring(generator):
    rule = mk.RobustMomentum(10.0, 1.0, 0.8)
    layer = mk.MomentumMoE(
        8, 6, 4, 2, rule, wiring="pre_ln", dtype=torch.float64, activation="gelu", device=DEVICE
    )
    x = normal(generator, 2, 5, 8)
    state = (normal(generator, 2, 5, 8), normal(generator, 2, 5, 8))
    y, new, _ = layer(x, state)
    inner = layer.norm(x + rule.alpha * (x - state[1]))
    f = layer.experts(inner, layer.router(inner))
    m = rule.mu * state[0] + rule.gamma * f
    torch.testing.assert_close(y, x - m, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(new[0], m, rtol=1e-11, atol=1e-11)
    assert torch.equal(new[1], x)


def test_published_adam_goes_on_as_heavy_ball(generator):
    """Adam in the first layer and heavy ball from the second, m carried from the first."""
    adam, ball = mk.Adam(0.8, decay=1.0), mk.HeavyBall(0.7, 0.9)
    x, f0, f1 = (normal(generator, 4, 6) for _ in range(3))
    y, state = mk.momentum_update(x, f0, None, adam)
    p, v = 0.1 * f0, 0.001 * f0**2
    torch.testing.assert_close(y, x - (0.8 / torch.sqrt(v + 1e-8) * p + x))
    y, (m,) = mk.momentum_update(y, f1, adam.heavy_ball_state(state, gamma=0.9), ball)
    torch.testing.assert_close(m, 0.7 * (0.9 * f0) + 0.9 * f1)


def test_learned_numbers_are_parameters(generator):
    rule = mk.Nesterov(nn.Parameter(torch.tensor(0.6)), nn.Parameter(torch.tensor([0.9])))
    layers = nn.ModuleList(mk.MomentumMoE(8, 6, 4, 2, rule).to(DEVICE) for _ in range(2))
    assert sum(p.numel() == 1 for p in layers.parameters()) == 2  # shared by the layers
    x, state = normal(generator, 5, 8, dtype=torch.float32), None
    for layer in layers:
        x, state, _ = layer(x, state)
    x.square().sum().backward()
    assert layers[0].mu.grad.abs() > 0
    assert layers[1].gamma.grad.shape == (1,)


def test_load_published(generator):
    layer = mk.MomentumMoE(8, 6, 4, 2, mk.HeavyBall(0.7))
    names = {
        "router.weight": "smoe.gate.gate.weight",
        "router.bias": "smoe.gate.gate.bias",
        "experts.w_up": "smoe.experts.htoh4.weight",
        "experts.b_up": "smoe.experts.htoh4.bias",
        "experts.w_down": "smoe.experts.h4toh.weight",
        "experts.b_down": "smoe.experts.h4toh.bias",
        "norm.weight": "smoe.layer_norm.weight",
        "norm.bias": "smoe.layer_norm.bias",
        "norm_out.weight": "norm2.weight",
        "norm_out.bias": "norm2.bias",
    }
    published = {
        name: torch.randn(layer.get_parameter(own).shape, generator=generator)
        for own, name in names.items()
    }
    published["norm1.weight"] = torch.ones(8)
    layer.load_published(published)
    for own, name in names.items():
        assert torch.equal(layer.get_parameter(own), published[name]), own
    assert set(names) == {name for name, _ in layer.named_parameters()}
    del published["norm2.bias"]
    with pytest.raises(ValueError, match=r"norm2\.bias"):
        layer.load_published(published)


def test_dropout_only_in_training(generator):
    layer = mk.MomentumMoE(8, 6, 4, 2, mk.HeavyBall(0.7), dropout=0.5).to(DEVICE)
    x = normal(generator, 20, 8, dtype=torch.float32)
    assert not torch.equal(layer(x).y, layer(x).y)
    layer.eval()
    assert torch.equal(layer(x).y, layer(x).y)


def test_autocast_casts_the_experts_alone(generator):
    inputs = moe_inputs(generator)
    for name in ("w_up", "w_down", "b_up", "b_down"):
        inputs[name].requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y, (m,) = mk.moe_mlp_momentum(**inputs, state=None, rule=mk.HeavyBall(0.5))
        f = mk.moe_mlp(**inputs)
    assert y.dtype == m.dtype == torch.float32
    assert f.dtype == torch.bfloat16
    torch.testing.assert_close(m, f.float(), rtol=0.02, atol=0.02 * f.abs().max().item())
    y.sum().backward()
    assert inputs["w_up"].grad.dtype == torch.float32


def test_the_thread_count_changes_nothing(generator):
    if DEVICE.type == "cuda":
        pytest.skip("a CPU implementation")
    x, f, p = (normal(generator, 300, 48, dtype=torch.float32).requires_grad_() for _ in range(3))
    v = torch.rand(300, 48, generator=generator)
    gamma = torch.tensor(0.9, requires_grad=True)
    weight = normal(generator, 48, dtype=torch.float32).requires_grad_()
    outcomes = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, state = mk.momentum_update(
                x, f, (p, v), mk.Adam(gamma), norm=(weight, None, 1e-5), impl="cpu"
            )
            leaves = (x, f, p, gamma, weight)
            outcomes.append([y, *state, *torch.autograd.grad(y, leaves, x.detach())])
            corrected, state = mk.momentum_update(
                x, f, (p, v, x.detach()), mk.Mars(gamma), impl="cpu"
            )
            made = torch.autograd.grad(corrected, (f, p, gamma), x.detach())
            outcomes[-1] += [corrected, *state, *made]
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_only_what_is_needed_is_computed(generator):
    """Frozen experts under a trained stream: no gradient reaches them, and none is made."""
    inputs = moe_inputs(generator)
    inputs["x"].requires_grad_()
    y, _ = mk.moe_mlp_momentum(
        **inputs, state=None, rule=mk.HeavyBall(0.5), expert_input=inputs["x"].detach()
    )
    upstream = normal(generator, *y.shape, dtype=torch.float32)
    assert torch.equal(torch.autograd.grad(y, inputs["x"], upstream)[0], upstream)
