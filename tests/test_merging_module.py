"""The modules of merging: the published forward, causal segments, published checkpoints."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from merging import OUT, D, E, R, draw, same
from torch import Tensor

import molex_kernels as mk


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


@pytest.mark.parametrize("segment", [None, 3], ids=["sequences", "segments"])
def test_padding_takes_no_part_in_the_gates(segment, generator):
    """The gates and the loss are those of the tokens that count, whatever the padding holds."""
    module = _module(generator, segment=segment, top_k=2)
    x = draw(generator, 3, 6, D)
    lengths = torch.tensor([6, 4, 0], device=DEVICE)
    token_mask = torch.arange(6, device=DEVICE) < lengths[:, None]
    wild = torch.where(token_mask[..., None], x, torch.nan).requires_grad_()
    gates, load = module.gates(wild, token_mask)
    for b, length in enumerate(lengths.tolist()):
        parts = x[b, :length].split(segment or 6)
        for s in range(gates.shape[1]):
            want = torch.zeros(E, dtype=x.dtype, device=DEVICE)
            if s < len(parts) and len(parts[s]):
                want = mk.noisy_topk_gates(
                    parts[s].mean(0)[None], module.w_gate, top_k=2, training=False
                )[0][0]
            assert same(gates[b, s], want)
    assert same(load, (gates > 0).sum((0, 1)).double())
    y, loss = module(wild, token_mask=token_mask)
    assert same(loss, 1e-2 * mk.cv_squared_loss(gates, load))
    assert y[0].isfinite().all()
    (gradient,) = torch.autograd.grad(loss, wild)
    assert not gradient[~token_mask].any()
    assert gradient[0].any()
    finite = torch.where(token_mask[..., None], x, 0)
    assert torch.equal(module(finite)[1], module(finite, token_mask=token_mask.new_ones(3, 6))[1])


def test_a_merged_mlp_passes_its_mask_on(generator):
    mlp = mk.CAMExMLP(D, OUT, E, rank=0, dtype=torch.float64, device=DEVICE).eval()
    x = draw(generator, 2, 5, D)
    token_mask = torch.arange(5, device=DEVICE) < torch.tensor([[5], [3]], device=DEVICE)
    y, loss = mlp(x, token_mask=token_mask)
    for b, length in enumerate((5, 3)):
        assert same(y[b, :length], mlp(x[b : b + 1, :length])[0][0])
    assert not same(loss, mlp(x)[1])


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
