"""Adaptive-clustering routers in transformers' models, against `ac_route` at every gate."""

from __future__ import annotations

import copy
import pickle

import mixtures
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import molex_kernels as mk
from molex_kernels.integrations.transformers import (
    install_ac_router,
    install_experts,
    uninstall,
)


def _gates(model):
    """By layer."""
    found = {}
    for index, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "experts"):
                found[index] = getattr(module, "gate", None) or module.router
    return found


def _watched(model, **inputs):
    """What each gate gets and gives, and the logits."""
    seen, hooks = {}, []
    for index, gate in _gates(model).items():
        keep = lambda module, args, out, index=index: seen.update({index: (args[0], *out)})  # noqa: E731
        hooks.append(gate.register_forward_hook(keep))
    logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize("options", [{}, {"mix": True, "stat": "variance"}], ids=["mad", "mix"])
@pytest.mark.parametrize("kind", mixtures.MODELS)
def test_gates_route_by_the_layer_before(kind, options, generator):
    model = mixtures.mixture(kind, generator).double()
    tokens = mixtures.words(generator, 2, 11)
    before, logits = _watched(model, input_ids=tokens)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gates = _gates(model)
    first, *rest = gates
    assert install_ac_router(model, **options) == rest
    seen, adaptive = _watched(model, input_ids=tokens)
    for got, want in zip(seen[first], before[first], strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(adaptive, logits)
    previous = seen[first]
    for index in rest:
        x, z, score, chosen = seen[index]
        gate = gates[index]
        weight = previous[2] / previous[2].sum(1, keepdim=True)
        want = mk.ac_route(
            x.reshape(-1, 16),
            gate.weight,
            previous[3],
            weight,
            top_k=2,
            gate_bias=getattr(gate, "bias", None),
            impl="reference",
            **options,
        )
        assert torch.equal(chosen, want.expert_index)
        close = 1e-10 if z.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(z.double(), want.logits, atol=close, rtol=close)
        scores = want.expert_weight
        if kind in ("olmoe", "qwen2_moe", "qwen3_moe-dense_third"):
            scores = want.logits.softmax(1).gather(1, chosen)
        torch.testing.assert_close(score.double(), scores, atol=1e-6, rtol=1e-6)
        assert [v.dtype for v in seen[index]] == [v.dtype for v in before[index]]
        previous = seen[index]
    assert uninstall(model)
    assert not uninstall(model)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(model(tokens).logits, logits)
    assert not any(hasattr(m, "molex_place") for m in model.modules())


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "granitemoe"])
def test_gates_return_the_dtypes_of_the_model(kind, generator):
    model = mixtures.mixture(kind, generator)
    tokens = mixtures.words(generator, 2, 11)
    for dtype, cast in ((torch.bfloat16, False), (torch.float32, True)):
        model = model.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            before, _ = _watched(model, input_ids=tokens)
            install_ac_router(model)
            seen, _ = _watched(model, input_ids=tokens)
        assert [v.dtype for v in seen[1]] == [v.dtype for v in before[1]]
        uninstall(model)


def test_chosen_layers_alone(generator):
    model = mixtures.mixture("mixtral", generator, num_hidden_layers=4)
    tokens = mixtures.words(generator, 2, 11)
    before, logits = _watched(model, input_ids=tokens)
    for layers in ((), (0,)):
        assert install_ac_router(model, layers=layers) == []
        assert torch.equal(model(tokens).logits, logits)
    assert install_ac_router(model, layers=[3, 2, 3]) == [2, 3]
    assert install_ac_router(model, layers=[2], clip=1.5) == [2]  # in the place of the first
    seen, _ = _watched(model, input_ids=tokens)
    for index in (0, 1):
        assert torch.equal(seen[index][1], before[index][1])
    gate, previous = _gates(model)[2], seen[1]
    for index, expected in ((2, True), (3, False)):
        x, z = seen[index][:2]
        plain = x.reshape(-1, 16) @ _gates(model)[index].weight.mT
        assert torch.allclose(z, plain, atol=1e-5) is not expected
    want = mk.ac_route(seen[2][0], gate.weight, previous[3], top_k=2, clip=1.5)
    torch.testing.assert_close(seen[2][1], want.logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_repeat_what_they_did(use_reentrant, generator):
    """Also where another forward pass has run since."""
    model = mixtures.mixture("mixtral", generator, num_hidden_layers=3).train()
    install_ac_router(model)
    batches = [mixtures.words(generator, 2, 11), mixtures.words(generator, 2, 11)]
    losses, expected = mixtures.gradients(model, *batches)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again, got = mixtures.gradients(model, *batches)
    assert again == losses
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_a_checkpoint_around_a_layer_is_refused(generator):
    model = mixtures.mixture("mixtral", generator).train()
    install_ac_router(model)
    for layer in model.model.layers:
        run = layer.__call__
        layer.register_forward_pre_hook(lambda *_: None)
        hidden = torch.randn(1, 5, 16, requires_grad=True)
        with pytest.raises(RuntimeError, match="expected to run inside the forward pass of its"):
            checkpoint(run, hidden, use_reentrant=False)


def test_compiled_copied_pickled_saved(generator, tmp_path):
    model = mixtures.mixture("mixtral", generator)
    tokens = mixtures.words(generator, 2, 11)
    install_ac_router(model)
    expected = model(tokens).logits
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(tokens).logits.count_nonzero() == 0
    uninstall(copied)
    assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not torch.equal(loaded(tokens).logits, expected)
    install_ac_router(loaded)
    torch.testing.assert_close(loaded(tokens).logits, expected)
    install_experts()
    model.set_experts_implementation("molex")  # those of the model's own code wait for the device
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_text_is_generated_without_a_cache(generator):
    model = mixtures.mixture("mixtral", generator)
    install_ac_router(model)
    tokens = expected = mixtures.words(generator, 2, 6)
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, use_cache=False, **options), expected)
    with pytest.raises(NotImplementedError, match="cache: expected None with install_ac_router"):
        model.generate(tokens, **options)
    uninstall(model)
    model.generate(tokens, **options)


def test_padding_takes_no_part(generator):
    model = mixtures.mixture("mixtral", generator)
    install_ac_router(model)
    tokens = mixtures.words(generator, 2, 11)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    other = torch.where(mask.bool(), tokens, (tokens + 3) % mixtures.WORDS)
    kept = mask.bool()
    runs = [_watched(model, input_ids=t, attention_mask=mask) for t in (tokens, other)]
    torch.testing.assert_close(*(logits[kept] for _, logits in runs))
    seen, _ = _watched(model, input_ids=tokens)
    masked, everything = (s[1][1].view(2, 11, -1)[kept] for s in (runs[0][0], seen))
    assert not torch.equal(masked, everything)


def test_models_that_it_does_not_know(generator):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    model = mixtures.mixture("mixtral", generator)
    classes = [type(module) for module in model.modules()]
    for options, error, message in (
        ({"layers": 1}, TypeError, "layers: expected indices"),
        ({"layers": [2]}, ValueError, "layers: expected .* at most 1"),
        ({"layers": [1.0]}, TypeError, "layers: expected an int"),
        ({"top_k": 3}, TypeError, r"options: expected some of .*got \['top_k'\]"),
        ({"stat": "median"}, ValueError, "stat: expected"),
    ):
        with pytest.raises(error, match=message):
            install_ac_router(model, **options)
    with pytest.raises(TypeError, match="model: expected a module, got str"):
        install_ac_router("mixtral")
    dense = nn.Module()
    dense.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"expected one stack of layers with experts, got .* 0"):
        install_ac_router(dense)
    mixed = mixtures.mixture("qwen3_moe-dense_third", generator)
    with pytest.raises(ValueError, match=r"layers with experts, \[0, 2\], got 1"):
        install_ac_router(mixed, layers=[1])
    gate = _gates(model)[1]
    small = nn.Parameter(torch.zeros(3, 16))
    gate.weight, kept = small, gate.weight
    with pytest.raises(ValueError, match="as many experts in layer 1 as in 0, got 3 and 4"):
        install_ac_router(model)
    gate.weight = kept
    gate.register_buffer("correction", torch.zeros(4))
    with pytest.raises(ValueError, match=r"the gate of layers\.1 to be a weight"):
        install_ac_router(model)
    del gate.correction
    gate.forward = lambda x: x
    with pytest.raises(ValueError, match="run the forward of its class, got MixtralTopKRouter"):
        install_ac_router(model)
    del gate.forward
    config = transformers.PhimoeConfig(**mixtures.SIZES, num_hidden_layers=2)
    with pytest.raises(ValueError, match="got PhimoeTopKRouter, one that chooses or weighs"):
        install_ac_router(transformers.PhimoeForCausalLM(config))
    assert [type(module) for module in model.modules()] == classes


def test_weights_may_come_later(generator):
    model = mixtures.mixture("mixtral", generator)
    expected = copy.deepcopy(model)
    install_ac_router(expected)
    tokens = mixtures.words(generator, 2, 11)
    with torch.device("meta"):
        empty = type(model)(model.config)
    install_ac_router(empty)
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.model.rotary_emb = model.model.rotary_emb
    torch.testing.assert_close(empty.eval()(tokens).logits, expected(tokens).logits)
