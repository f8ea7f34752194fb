"""A shared expert: its equation, its place under momentum, and transformers' blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor

import molex_kernels as mk

T, D, H, E, K, S = 14, 8, 6, 4, 2, 5


def _act(hidden: Tensor, activation: str, layout: str) -> Tensor:
    if activation == "relu":
        return hidden.relu()
    if layout == "interleaved":
        return F.silu(hidden[..., 0::2]) * hidden[..., 1::2]
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def _routing(generator) -> tuple[Tensor, Tensor]:
    index = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    return index.to(DEVICE), torch.rand(T, K, generator=generator).to(DEVICE)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("activation", "layout", "bias"),
    [("relu", "concat", True), ("swiglu", "concat", False), ("swiglu", "interleaved", True)],
)
def test_it_is_added_to_the_others(generator, activation, layout, bias, gated: bool):
    options: dict[str, Any] = {"activation": activation, "gate_layout": layout, "bias": bias}
    layer = mk.MoEMLP(D, H, E, **options, shared_width=S, shared_gate=gated).to(DEVICE)
    plain = mk.MoEMLP(D, H, E, **options).to(DEVICE)
    state = layer.state_dict()
    plain.load_state_dict({n: v for n, v in state.items() if not n.startswith("shared.")})
    wide = 2 * S if activation == "swiglu" else S
    sizes = {"w_up": (wide, D), "w_down": (D, S)}
    sizes |= {"b_up": (wide,), "b_down": (D,)} if bias else {}
    sizes |= {"w_gate": (1, D)} if gated else {}
    assert {n: tuple(p.shape) for n, p in layer.shared.named_parameters()} == sizes

    x = torch.randn(T, D, generator=generator).to(DEVICE).requires_grad_()
    routing = _routing(generator)
    y = layer(x, routing)
    double = x.detach().double().requires_grad_()
    leaves = {n: p.detach().double().requires_grad_() for n, p in layer.shared.named_parameters()}
    hidden = F.linear(double, leaves["w_up"], leaves.get("b_up"))
    want = F.linear(_act(hidden, activation, layout), leaves["w_down"], leaves.get("b_down"))
    if gated:
        want = torch.sigmoid(double @ leaves["w_gate"].T) * want
    torch.testing.assert_close(y.double(), plain(x, routing).double() + want, rtol=1e-4, atol=1e-5)

    upstream = torch.randn(T, D, generator=generator).to(DEVICE)
    (through_others,) = torch.autograd.grad(plain(x, routing), x, upstream)
    wanted = torch.autograd.grad(want, [double, *leaves.values()], upstream.double())
    got = torch.autograd.grad(y, [x, *layer.shared.parameters()], upstream)
    torch.testing.assert_close(got[0] - through_others, wanted[0].float(), rtol=1e-3, atol=1e-4)
    for name, ours, theirs in zip(leaves, got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4, msg=name)
    batched = [part.view(2, 7, K) for part in routing]
    torch.testing.assert_close(layer(x.view(2, 7, D), batched), y.view(2, 7, D))


def test_what_it_is_like():
    layer = mk.MoEMLP(D, H, E, shared_width=400, shared_gate=True, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert "(shared): SharedExpert(d_model=8, width=400, gate=True)" in repr(layer)
    assert layer.shared.w_down.abs().max() <= 0.05
    assert mk.MoEMLP(D, H, E).shared is None
    layer = mk.MoEMLP(D, H, E, shared_width=S, shared_gate=True, device="meta")
    layer = layer.to_empty(device=DEVICE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    published = {
        "htoh4.weight": torch.ones(E, H, D),
        "htoh4.bias": torch.ones(E, H),
        "h4toh.weight": torch.ones(E, D, H),
        "h4toh.bias": torch.ones(E, D),
    }
    before = copy.deepcopy(layer.shared.state_dict())
    layer.load_published(published)
    assert (layer.w_up == 1).all()
    assert all(torch.equal(v, before[n]) for n, v in layer.shared.state_dict().items())
    for options, message in (
        ({"shared_gate": True}, "shared_gate: expected False with shared_width=0, got True"),
        ({"shared_width": -1}, "shared_width: expected at least 0, got -1"),
        ({"shared_width": 2.0}, "shared_width: expected an int, got float"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            mk.MoEMLP(D, H, E, **options)


@pytest.mark.parametrize("wiring", ["published", "pre_ln"])
@pytest.mark.parametrize("sign", [1, -1])
def test_momentum_is_of_the_whole_layers_output(generator, sign: int, wiring: str):
    rule = mk.HeavyBall(0.7, 0.9)
    options: dict[str, Any] = {"sign": sign, "wiring": wiring, "dtype": torch.float64}
    layer = mk.MomentumMoE(D, H, E, K, rule, shared_width=S, shared_gate=True, **options)
    layer = layer.to(DEVICE)
    x, m = (torch.randn(T, D, generator=generator).to(DEVICE).double() for _ in range(2))
    got = layer(x, (m,))

    inner = x if wiring == "published" else layer.norm(x)
    routing = layer.router(inner)
    f = mk.moe_mlp(
        inner, *routing[:2], layer.experts.w_up, layer.experts.w_down,
        b_up=layer.experts.b_up, b_down=layer.experts.b_down,
    )  # fmt: skip
    f = sign * (f + layer.experts.shared(inner))
    state = rule.mu * m + rule.gamma * f
    want = x - state
    if wiring == "published":
        want = layer.norm_out(x + layer.norm(want))
    torch.testing.assert_close(got.state[0], state)
    torch.testing.assert_close(got.y, want)


def test_experts_with_a_shared_one_in_the_place_of_others(generator):
    """Who puts them into a layer loses nothing of them."""
    layer = mk.MomentumMoE(D, H, E, K, mk.HeavyBall(0.7), sign=-1).to(DEVICE)
    x = torch.randn(T, D, generator=generator).to(DEVICE)
    without = layer(x).y
    shared = mk.MoEMLP(D, H, E, shared_width=S).to(DEVICE)
    shared.load_state_dict(layer.experts.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in shared.shared.parameters():
            parameter.zero_()
    layer.experts = shared
    torch.testing.assert_close(layer(x).y, without, rtol=1e-5, atol=1e-5)
    shared.shared.reset_parameters()
    assert not torch.allclose(layer(x).y, without, rtol=1e-2)


SIZES = {
    "hidden_size": D,
    "moe_intermediate_size": H,
    "num_experts_per_tok": K,
    "vocab_size": 20,
    "pad_token_id": 0,
}


def _block(transformers: Any, generator: torch.Generator, kind: str) -> torch.nn.Module:
    if kind == "qwen2_moe":
        options = {"num_experts": E, "shared_expert_intermediate_size": S}
        config = transformers.Qwen2MoeConfig(**SIZES, **options, norm_topk_prob=True)
        block = transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config)
    else:
        options = {"n_routed_experts": E, "n_shared_experts": 2, "n_group": 2, "topk_group": 1}
        config = transformers.DeepseekV3Config(**SIZES, **options, routed_scaling_factor=2.5)
        block = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE(config)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
        for tensor in block.buffers():
            tensor.abs_()  # theirs takes a key below 0 for worse than one of a group left out
    return block.to(DEVICE).eval()


def _ours(block: torch.nn.Module, kind: str) -> tuple[mk.TopKRouter, mk.MoEMLP]:
    """The block as this package has it, with the block's weights."""
    is_qwen = kind == "qwen2_moe"
    theirs = block.shared_expert if is_qwen else block.shared_experts
    width = theirs.down_proj.weight.shape[1]
    options = {"activation": "swiglu", "bias": False, "shared_width": width}
    experts = mk.MoEMLP(D, H, E, **options, shared_gate=is_qwen)
    options = {"score": "softmax" if is_qwen else "sigmoid", "renormalize": True}
    if not is_qwen:
        options |= {"num_groups": 2, "top_groups": 1, "scaling": 2.5, "expert_bias": True}
    router = mk.TopKRouter(D, E, K, **options)
    state = {
        "w_up": block.experts.gate_up_proj,
        "w_down": block.experts.down_proj,
        "shared.w_up": torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]),
        "shared.w_down": theirs.down_proj.weight,
    }
    choice = {"weight": block.gate.weight}
    if is_qwen:
        state["shared.w_gate"] = block.shared_expert_gate.weight
    else:
        choice["expert_bias"] = block.gate.e_score_correction_bias
    experts.load_state_dict(state)
    router.load_state_dict(choice)
    return router.to(DEVICE).eval(), experts.to(DEVICE)


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3"])
def test_it_is_that_of_transformers(generator, kind: str):
    """And their block keeps its own where its experts run here."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from molex_kernels.integrations.transformers import install_experts

    install_experts()
    block = _block(transformers, generator, kind)
    x = torch.randn(3, 7, D, generator=generator).to(DEVICE)
    results = []
    with torch.no_grad():
        for implementation in ("eager", "molex"):
            block.experts.config._experts_implementation = implementation
            results.append(block(x))
        router, experts = _ours(block, kind)
        routing = router(x)
        results.append(experts(x, [part.view(3, 7, K) for part in routing[:2]]))
    theirs = results[0][0] if isinstance(results[0], tuple) else results[0]
    for got in results[1:]:
        got = got[0] if isinstance(got, tuple) else got
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-5)
