"""Momentum in transformers' models, against the equations of the rules on the stream itself."""

from __future__ import annotations

import copy
import pickle

import mixtures
import pytest
import torch
from torch import nn

import molex_kernels as mk
from molex_kernels.integrations.transformers import (
    install_ac_router,
    install_experts,
    install_momentum,
    uninstall,
)

RULES = [
    mk.HeavyBall(0.7),
    mk.HeavyBall(0.6, 0.5),
    mk.Nesterov(0.7, 0.5),
    mk.Adam(gamma=0.1),
    mk.AdEMAMix(gamma=0.1),
    mk.Signum(0.9),
    mk.Mars(gamma=0.1),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", mixtures.MODELS)
def test_layers_step_against_their_experts(kind, rule, generator):
    model = mixtures.mixture(kind, generator, num_hidden_layers=4).double()
    tokens = mixtures.words(generator, 2, 11)
    logits = model(tokens).logits
    blocks = mixtures.blocks(model)
    assert install_momentum(model, rule) == list(blocks)
    seen, hooks = {}, []
    for index, block in blocks.items():
        layer = model.model.layers[index]
        stream = layer.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args, index=index: seen.update({(index, "x"): args[0]})
        )
        inner = block.register_forward_pre_hook(
            lambda module, args, index=index: seen.update({(index, "inner"): args[0]})
        )
        outer = layer.register_forward_hook(
            lambda module, args, y, index=index: seen.update({(index, "y"): y})
        )
        hooks += [stream, inner, outer]
    assert not torch.equal(model(tokens).logits, logits)
    state = None
    for hook in hooks:
        hook.remove()
    for index, block in blocks.items():
        f = type(block).__bases__[1].forward(block, seen[index, "inner"])
        f = f[0] if isinstance(f, tuple) else f
        y, state = mk.momentum_update(seen[index, "x"], -f, state, rule, impl="reference")
        torch.testing.assert_close(seen[index, "y"], y, atol=1e-10, rtol=1e-10)
    assert uninstall(model)
    assert torch.equal(model(tokens).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_momentum_nothing_changes(dtype, generator):
    model = mixtures.mixture("mixtral", generator, num_hidden_layers=3).to(dtype)
    tokens = mixtures.words(generator, 2, 11)
    logits = model(tokens).logits
    for rule, layers in ((mk.HeavyBall(0.0), None), (mk.HeavyBall(0.9), [2]), (RULES[0], [])):
        assert install_momentum(model, rule, layers=layers) == (
            [0, 1, 2] if layers is None else layers
        )
        assert torch.equal(model(tokens).logits, logits)
    install_momentum(model, mk.HeavyBall(0.9), layers=[0, 2])
    both = model(tokens).logits
    assert not torch.equal(both, logits)
    install_momentum(model, mk.HeavyBall(0.9), layers=[0, 1])
    assert not torch.equal(model(tokens).logits, both)


def test_checkpointed_layers_repeat_what_they_did(generator):
    """Also where another forward pass has run since; and gradients go along the momentum."""
    model = mixtures.mixture("mixtral", generator, num_hidden_layers=3).train()
    install_momentum(model, mk.AdEMAMix(gamma=0.1, alpha_warmup=2))
    install_ac_router(model)
    batches = [mixtures.words(generator, 2, 11) for _ in range(2)]
    losses, expected = mixtures.gradients(model, *batches)
    model.gradient_checkpointing_enable()
    again, got = mixtures.gradients(model, *batches)
    assert again == losses
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="expected use_reentrant=False with install_momentum"):
        mixtures.gradients(model, *batches)
    with torch.no_grad():
        model(batches[0])


def test_gradients_are_those_of_autograd(generator):
    model = mixtures.mixture("mixtral", generator, num_hidden_layers=3).double()
    plain = copy.deepcopy(model)
    install_momentum(model, mk.HeavyBall(0.7, 0.5))
    carried = {"p": 0.0}

    def step(module, args, output):
        carried["p"] = 0.7 * carried["p"] + 0.5 * output
        return carried["p"]

    for block in mixtures.blocks(plain).values():
        block.register_forward_hook(step)
    tokens = mixtures.words(generator, 2, 11)
    losses, expected = mixtures.gradients(plain, tokens)
    ours, got = mixtures.gradients(model, tokens)
    torch.testing.assert_close(ours, losses)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        close = 1e-6 * gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, atol=close, rtol=0, msg=name)


def test_text_is_generated_with_a_cache(generator):
    model = mixtures.mixture("mixtral", generator, num_hidden_layers=3)
    install_momentum(model, mk.HeavyBall(0.7))
    tokens = expected = mixtures.words(generator, 2, 6)
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **options), expected)
    install_momentum(model, mk.Mars(gamma=0.1))
    with pytest.raises(NotImplementedError, match="cache: expected None with install_momentum"):
        model.generate(tokens, **options)
    model.generate(tokens, use_cache=False, **options)
    install_momentum(model, mk.HeavyBall(0.7))
    assert torch.equal(model.generate(tokens, **options), expected)


def test_compiled_copied_pickled(generator):
    model = mixtures.mixture("mixtral", generator, num_hidden_layers=3)
    tokens = mixtures.words(generator, 2, 11)
    install_momentum(model, mk.AdEMAMix(gamma=0.1))
    install_ac_router(model)
    expected = model(tokens).logits
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens).logits, expected)
    install_experts()
    model.set_experts_implementation("molex")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_rules_and_models_that_it_does_not_take(generator):
    model = mixtures.mixture("mixtral", generator)
    classes = [type(module) for module in model.modules()]
    for rule, options, error, message in (
        ("heavy", {}, TypeError, r"rule: expected a rule such as HeavyBall\(0.7\), got str"),
        (mk.RobustMomentum(2.0, 1.0, 0.5), {}, ValueError, "needs the stream as well"),
        (mk.Adam(decay=0.1), {}, ValueError, "needs the stream as well"),
        (mk.HeavyBall(torch.tensor(0.7)), {}, ValueError, "rule: expected numbers, got a tensor"),
        (mk.HeavyBall(0.7), {"layers": [2]}, ValueError, "layers: expected .* at most 1"),
        (mk.HeavyBall(0.7), {"impl": "cuda12"}, ValueError, "impl: expected"),
    ):
        with pytest.raises(error, match=message):
            install_momentum(model, rule, **options)
    assert [type(module) for module in model.modules()] == classes
    layer = model.model.layers[1]
    layer.inner = nn.Module()
    layer.inner.block, layer.mlp = layer.mlp, nn.Identity()
    with pytest.raises(ValueError, match=r"expected layers\.1 to have a child with experts"):
        install_momentum(model, mk.HeavyBall(0.7))
