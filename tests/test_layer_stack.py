"""LayerExpertStack against the published algorithm run on transformers' own layers, one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import DEVICE

import molex_kernels as mk

transformers = pytest.importorskip("transformers", exc_type=ImportError)

LAYERS, WIDTH = 3, 16


def _model(kind, generator):
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=2, vocab_size=20)
        model = transformers.GPT2Model(config)
    else:
        config = transformers.BertConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=24,
            vocab_size=20,
        )
        model = transformers.BertModel(config)
    model = model.to(DEVICE, torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise.to(DEVICE)
    return model


def _layers(model):
    return model.h if hasattr(model, "h") else model.encoder.layer


def _run(layer, z):
    if not hasattr(layer, "ln_1"):
        return layer(z)
    length = z.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=z.dtype, device=z.device).triu(1)
    return layer(z, None, mask.expand(z.shape[0], 1, -1, -1))


def _published(layers, gates, mixing, z, limit, vote):
    """Two whole blocks in sequence, the choice read by the host."""
    balance = 0.0
    chosen = []
    for t, layer in enumerate(layers):
        if t >= limit:
            z = _run(layer, z)
            chosen.append(t)
            continue
        logits = gates[t if len(gates) > 1 else 0](z)
        scores = torch.softmax(logits, -1)
        if vote == "mode":
            j = torch.mode(logits.argmax(-1).flatten()).values.item()
        elif vote == "mean_softmax":
            j = scores.mean((0, 1)).argmax().item()
        else:
            j = torch.sigmoid(logits).mean((0, 1)).argmax().item()
        balance = balance + LAYERS * scores.mean((0, 1))[j]
        c = mixing(t)
        z = c[0] * _run(layer, z) + c[1] * _run(layers[j], z)
        chosen.append(j)
    return z, balance, chosen


def _close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_single_branch_is_the_model_itself(kind, generator):
    model = _model(kind, generator)
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    want = z
    for layer in _layers(model):
        want = _run(layer, want)
    stack = mk.LayerExpertStack.from_transformers(model, layers_to_use=0)
    got = stack(z)
    _close(got.hidden, want)
    assert got.chosen.tolist() == list(range(LAYERS))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vote": "mean_softmax", "layers_to_use": 2},
        {"vote": "mean_sigmoid", "individual_gates": True, "mixing": (0.5, 0.5)},
        {"learn_mixing": True},
        {"learn_mixing": True, "individual_mixing": True, "individual_gates": True},
    ],
    ids=lambda o: "-".join(map(str, o)) or "default",
)
def test_agrees_with_two_blocks_in_sequence(kind, options, generator):
    model = _model(kind, generator)
    plain = copy.deepcopy(model)
    stack = mk.LayerExpertStack.from_transformers(model, freeze=False, **options)
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    gates = copy.deepcopy(stack.gates)
    start = stack.mixing.detach().clone().requires_grad_(options.get("learn_mixing", False))

    def mixing(t):
        row = start[t if start.shape[0] > 1 else 0]
        return torch.softmax(row, 0) if start.requires_grad else row

    want, balance, chosen = _published(
        *(_layers(plain), gates, mixing, theirs),
        options.get("layers_to_use", LAYERS),
        options.get("vote", "mode"),
    )
    got = stack(ours)
    _close(got.hidden, want)
    _close(got.balance_loss, balance)
    assert got.chosen.tolist() == chosen

    upstream = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    ((got.hidden * upstream).sum() + got.balance_loss).backward()
    ((want * upstream).sum() + balance).backward()
    _close(ours.grad, theirs.grad)
    for one, other in zip(stack.gates.parameters(), gates.parameters(), strict=True):
        _close(one.grad, other.grad)
    if start.requires_grad:
        _close(stack.mixing.grad, start.grad)
    kind_of = stack.facts.layout
    for name, path in (
        *kind_of.linears.items(),
        ("norm1", kind_of.norm1),
        ("norm2", kind_of.norm2),
    ):
        for t, layer in enumerate(_layers(plain)):
            part = layer.get_submodule(path)
            for stacked, own in ((stack.weights, part.weight), (stack.biases, part.bias)):
                want_grad = torch.zeros_like(own) if own.grad is None else own.grad
                _close(stacked[name].grad[t], want_grad)


def test_the_model_shares_the_stack_and_a_cache_is_refused(generator):
    model = _model("bert", generator)
    stack = mk.LayerExpertStack.from_transformers(model)
    query = _layers(model)[1].attention.self.query
    assert query.weight.data_ptr() == stack.weights["q"][1].data_ptr()
    with pytest.raises(NotImplementedError, match="cache: expected None"):
        stack(torch.zeros(1, 2, WIDTH, dtype=torch.float64, device=DEVICE), cache=object())
