"""The soft mixture of experts, beside a transcription of the published equations."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor, nn

import molex_kernels as mk
from molex_kernels import published
from molex_kernels.testing import budget

B, M, D, WIDE, E, P = 2, 7, 5, 6, 3, 2


def _layer(seed: int, dtype: torch.dtype = torch.float64, **options: Any) -> mk.SoftMoE:
    torch.manual_seed(seed)
    layer = mk.SoftMoE(D, WIDE, E, P, **options, device=DEVICE, dtype=dtype)
    if layer.scale is not None:
        nn.init.constant_(layer.scale, 1.7)
    return layer


def _tokens(generator: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=generator).to(DEVICE)


def _previous(generator: torch.Generator, top_k: int = 2) -> mk.Routing:
    """A routing in which every cluster has tokens."""
    index = torch.rand(B * M, E, generator=generator).argsort(1)[:, :top_k]
    index[:E, 0] = torch.arange(E)
    index[:E, 1] = torch.arange(E).roll(1)
    weight = torch.rand(B * M, top_k, dtype=torch.float64, generator=generator).softmax(1)
    return mk.Routing(index.to(DEVICE), weight.to(DEVICE), torch.zeros(B * M, E, device=DEVICE))


def _weights(v: Tensor, prev: mk.Routing, layer: mk.SoftMoE, variance: bool) -> Tensor:
    """ACMoE's: for each cluster the inverse of its spread, clipped, around 1."""
    tokens = v.detach().reshape(-1, D)
    rows = []
    for cluster in range(E):
        mine = tokens[prev.expert_index[:, 0] == cluster]
        spread = (mine - mine.mean(0)).abs().mean(0)
        if variance:
            rows.append(1 / ((mine**2).mean(0) - mine.mean(0) ** 2 + 1e-4))
        else:
            rows.append(1 / (spread + 0.35))
    table = torch.stack(rows)
    before = table.mean()
    table = table.clamp(max=(5 if layer.clip is None else layer.clip) * before)
    table = table / (before if variance else table.mean())
    if layer.mix:
        return (table[prev.expert_index] * prev.expert_weight[..., None]).sum(1)
    return table[prev.expert_index[:, 0]]


def _published(
    layer: mk.SoftMoE,
    x: Tensor,
    prev: mk.Routing | None = None,
    plain: bool = False,
    variance: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output, and the logits [B, M, E, P]; experts and slots one by one."""
    v, phi = x, layer.phi
    if layer.scale is not None:
        v = x / x.norm(dim=2, keepdim=True)
        phi = layer.scale * phi / phi.norm(dim=0)
    if prev is not None:
        v = v * _weights(v, prev, layer, variance).view_as(v)
    logits = torch.einsum("bmd,dnp->bmnp", v, phi)
    combine = logits.flatten(2).softmax(2).view_as(logits)
    y = torch.zeros_like(x)
    e = layer.experts
    for expert in range(E):
        for slot in range(P):
            dispatch = logits[:, :, expert, slot].softmax(1)
            u = (dispatch[..., None] * (x if plain else v)).sum(1)
            hidden = F.gelu(u @ e.w_up[expert].T + (0 if e.b_up is None else e.b_up[expert]))
            out = hidden @ e.w_down[expert].T + (0 if e.b_down is None else e.b_down[expert])
            y = y + combine[:, :, expert, slot, None] * out[:, None]
    return y, logits


VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "plain": {"slot_inputs": "plain", "bias": False},
    "unnormalized": {"normalize": False},
    "clusters": {"empty": "published"},
    "mixed": {"mix": True},
    "mixed-plain": {"mix": True, "slot_inputs": "plain"},
    "variance": {"stat": "variance", "eps": 1e-4, "clip": 1.1, "norm": "global_pre"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_published_equations(name: str, seed: int, generator: torch.Generator):
    layer = _layer(seed, top_k=4, **VARIANTS[name])
    x = _tokens(generator, B, M, D).requires_grad_()
    clustered = name in ("clusters", "mixed", "mixed-plain", "variance")
    prev = _previous(generator) if clustered else None
    want, logits = _published(
        layer, x, prev, layer.slot_inputs == "plain", variance=name == "variance"
    )
    got, routing = layer(x, prev)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    values, slots = logits.flatten(0, 1).flatten(1).topk(4)
    assert torch.equal(routing.expert_index, slots // P)
    assert torch.allclose(routing.expert_weight, values.softmax(1), rtol=1e-10)
    assert routing.logits.shape == (B * M, E * P)

    grad = _tokens(generator, B, M, D)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad(got, leaves, grad)
    theirs = torch.autograd.grad(want, leaves, grad)
    names = ["x", *(own for own, _ in layer.named_parameters())]
    for own, one, other in zip(names, ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-11), own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_budget_of_the_reference(
    dtype: torch.dtype, seed: int, generator: torch.Generator
):
    fast = _layer(seed, dtype, mix=True)
    plain = _layer(seed, dtype, mix=True, impl="reference")
    exact = _layer(seed, mix=True)

    def draw() -> dict[str, budget.Errors]:
        with torch.no_grad():
            for name, parameter in fast.named_parameters():
                parameter.copy_(_tokens(generator, *parameter.shape))
                for module in (plain, exact):
                    module.get_parameter(name).copy_(parameter)
        x, grad = _tokens(generator, B, M, D).to(dtype), _tokens(generator, B, M, D).to(dtype)
        prev = _previous(generator)
        results = []
        for module, kind in ((fast, dtype), (exact, torch.float64), (plain, dtype)):
            leaf = x.to(kind, copy=True).requires_grad_()
            y, _ = module(leaf, prev)
            assert y.dtype == kind
            leaves = [leaf, *module.parameters()]
            results.append([y, *torch.autograd.grad(y, leaves, grad.to(kind))])
        names = ["y", "x", *(own for own, _ in fast.named_parameters())]
        return {
            name: budget.measure(name, *three, dtype)
            for name, *three in zip(names, *results, strict=True)
        }

    budget.judge(draw)


def test_masked_tokens_are_not_there(seed: int, generator: torch.Generator):
    layer = _layer(seed, top_k=3, mix=True)
    x = _tokens(generator, B, M, D)
    prev = _previous(generator)
    mask = torch.ones(B, M, dtype=torch.bool, device=DEVICE)
    mask[:, 5:] = False
    short = mk.Routing(*(part.view(B, M, -1)[:, :5].flatten(0, 1) for part in prev))
    want, routing = layer(x[:, :5], short)
    x[:, 5:] = float("nan")
    x.requires_grad_()
    got, masked = layer(x, prev, token_mask=mask)
    assert torch.allclose(got[:, :5], want, rtol=1e-10, atol=1e-12)
    assert not got[:, 5:].any()
    assert torch.equal(masked.expert_index.view(B, M, 3)[:, :5].flatten(0, 1), routing.expert_index)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad[:, :5].any()
    assert not grad[:, 5:].any()
    assert grad.isfinite().all()
    mask[1] = False  # and a sequence without any
    got, _ = layer(x, prev, token_mask=mask)
    assert got.isfinite().all()
    assert not got[1].any()


def test_ids_of_no_cluster_weigh_one(seed: int, generator: torch.Generator):
    x = _tokens(generator, B, M, D)
    prev = _previous(generator)
    index = prev.expert_index.clone()
    index[5:] = torch.where(index[5:] == 0, E, index[5:])
    v = F.normalize(x, dim=2).flatten(0, 1)
    table = mk.ac_weights(v, index[:, 0], E, recipe="softmoe")
    table = torch.cat([table, torch.ones_like(table[:1])])
    for mix in (False, True):
        layer, bare = _layer(seed, mix=mix), _layer(seed, normalize=False)
        bare.experts.load_state_dict(layer.experts.state_dict())
        with torch.no_grad():
            bare.phi.copy_(layer.scale * F.normalize(layer.phi, dim=0))
        rows = table[index[:, 0]]
        if mix:
            rows = (table[index] * prev.expert_weight[..., None]).sum(1)
        want, _ = bare((v * rows).view_as(x))
        got, _ = layer(x, prev._replace(expert_index=index))
        assert torch.allclose(got, want, rtol=1e-10)


def test_the_largest_slots_of_one_expert_are_its_cluster(seed: int, generator: torch.Generator):
    first, second = _layer(seed, top_k=1), _layer(seed + 1)
    x = _tokens(generator, B, M, D)
    _, routing = first(x)
    table = mk.ac_weights(
        F.normalize(x, dim=2).flatten(0, 1), routing.expert_index[:, 0], E, recipe="softmoe"
    )
    weighed = F.normalize(x, dim=2) * table[routing.expert_index[:, 0]].view_as(x)
    unnormalized = _layer(seed + 1, normalize=False)
    unnormalized.experts.load_state_dict(second.experts.state_dict())
    unnormalized.phi.data.copy_(second.scale * F.normalize(second.phi, dim=0))
    assert torch.allclose(second(x, routing)[0], unnormalized(weighed)[0], rtol=1e-10)


def test_no_tokens(seed: int):
    layer = _layer(seed, top_k=2)
    for sizes in ((2, 0), (0, 3)):
        y, routing = layer(torch.zeros(*sizes, D, dtype=torch.float64, device=DEVICE))
        assert y.shape == (*sizes, D)
        assert routing.expert_index.shape == (0, 2)


def test_autocast(seed: int, generator: torch.Generator):
    layer = _layer(seed, torch.float32, top_k=3)
    x = _tokens(generator, B, M, D).float().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y, routing = layer(x, _previous(generator))
    _plain, precise = layer(x)
    assert y.dtype == torch.bfloat16
    assert routing.logits.dtype == torch.float32
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        _, same = layer(x)
    assert torch.equal(same.logits, precise.logits)  # no choice hangs on 16 bits
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (x, *layer.parameters()))


def test_bad_input():
    layer = _layer(0)
    x = torch.zeros(B, M, D, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="slots: expected at least 1, got 0"):
        mk.SoftMoE(D, WIDE, E, 0)
    with pytest.raises(ValueError, match=r"top_k: .* slots, got 7"):
        mk.SoftMoE(D, WIDE, E, P, top_k=7)
    with pytest.raises(ValueError, match="slot_inputs: expected one of"):
        mk.SoftMoE(D, WIDE, E, slot_inputs="x")
    with pytest.raises(ValueError, match="stat: expected one of"):
        mk.SoftMoE(D, WIDE, E, stat="std")
    with pytest.raises(ValueError, match=r"x: expected shape \[B, M, D\] with D=5, got \[7, 5\]"):
        layer(x[0])
    with pytest.raises(TypeError, match=r"x: expected dtype float64, .*got float32"):
        layer(x.float())
    with pytest.raises(ValueError, match=r"token_mask: expected shape \[B, M\]"):
        layer(x, token_mask=torch.ones(B, 2, dtype=torch.bool, device=DEVICE))
    index = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"prev.expert_index: expected shape .*T=14"):
        layer(x, (index, index.double()))
    index = torch.zeros(B * M, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"prev.expert_weight: expected shape .*K'=2"):
        layer(x, (index, index[:, :1].double()))
    with pytest.raises(TypeError, match="prev: expected a Routing"):
        layer(x, x)


def test_a_whole_checkpoint(seed: int, generator: torch.Generator):
    state = checkpoints.make(checkpoints.soft_moe(), seed)
    layers, unused = published.load("acmoe-softmoe", state, top_k=2, mix=True)
    assert list(layers) == ["module.blocks.1.mlp.", "module.blocks.2.mlp."]
    assert [name for name in unused if ".mlp." in name] == [
        f"module.blocks.0.mlp.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    ]
    first, second = layers.values()
    x = torch.randn(B, M, checkpoints.D, dtype=torch.float64, generator=generator)
    _, routing = first(x)
    y, _ = second(x, routing)
    assert y.shape == x.shape
    for number in range(checkpoints.E):
        name = f"module.blocks.2.mlp.experts.{number}.fc2.bias"
        assert torch.equal(second.experts.b_down[number], state[name])


def test_published_names_are_checked(seed: int):
    state = checkpoints.make(checkpoints.soft_moe(), seed)
    prefix = "module.blocks.1.mlp."
    layer = mk.SoftMoE(checkpoints.D, checkpoints.WIDE, checkpoints.E, checkpoints.SLOTS)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    lacking = {k: v for k, v in state.items() if k != f"{prefix}experts.2.fc1.bias"}
    with pytest.raises(ValueError, match=r"expected a name 'module.*experts\.2\.fc1\.bias'"):
        layer.load_published(lacking, prefix=prefix)
    more = {**state, f"{prefix}experts.4.fc1.bias": torch.zeros(checkpoints.WIDE)}
    with pytest.raises(ValueError, match=r"no place for 'module.*experts\.4\.fc1\.bias'"):
        layer.load_published(more, prefix=prefix)
    other = {**state, f"{prefix}experts.0.fc2.weight": torch.zeros(1, 1)}
    with pytest.raises(ValueError, match=r"experts\.0\.fc2\.weight: expected shape \[8, 6\]"):
        layer.load_published(other, prefix=prefix)
    unnormalized = mk.SoftMoE(
        checkpoints.D, checkpoints.WIDE, checkpoints.E, checkpoints.SLOTS, normalize=False
    )
    with pytest.raises(ValueError, match=r"no place for 'module.*scale'"):
        unnormalized.load_published(state, prefix=prefix)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
