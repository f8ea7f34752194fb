"""Layer experts inside of transformers' models, against the stack outside of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import DEVICE
from layer_models import LAYERS, MODELS, OF_IMAGES, bias_tables, layers_of, make
from mixtures import mixture

import molex_kernels as mk
from molex_kernels.integrations.transformers import (
    install_layer_experts,
    install_momentum,
    uninstall,
)

pytest.importorskip("transformers", exc_type=ImportError)


def _inputs(kind, generator):
    if kind in OF_IMAGES:
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator).to(DEVICE)}
    ids = torch.randint(3, 20, (2, 7), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _gradients(experts):
    return {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}


def _close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_in_the_model_are_those_of_the_stack(kind, generator):
    model = make(kind, generator)
    options = {"straight_through": True, "learn_mixing": True, "lora_rank": 2}
    stack = mk.LayerExpertStack.from_transformers(copy.deepcopy(model), **options)
    inputs = _inputs(kind, generator)
    if kind in OF_IMAGES:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    names = list(model.state_dict())
    plain = model(**inputs).last_hidden_state
    experts = install_layer_experts(model, **options)
    assert not any(table.weight.requires_grad for table in bias_tables(model))
    with torch.no_grad():
        for b in experts.lora_b.values():
            b += torch.randn(b.shape, generator=generator, dtype=b.dtype).to(DEVICE)
    own = {name: value for name, value in stack.state_dict().items() if "weights" not in name}
    own = {name: value for name, value in own.items() if "biases" not in name}
    assert set(own) == set(experts.state_dict())
    stack.load_state_dict(experts.state_dict(), strict=False)
    seen = []
    hook = layers_of(model)[-1].register_forward_hook(lambda module, args, y: seen.append(y))
    out = model(**inputs, output_hidden_states=True)
    assert not torch.equal(out.last_hidden_state, plain)
    hook.remove()
    there = inputs.get("attention_mask")
    want = stack(out.hidden_states[0].detach(), None if there is None else there.bool())
    seen = [y[0] if isinstance(y, tuple) else y for y in seen]
    assert experts.last.chosen.tolist() == want.chosen.tolist()
    _close(seen[0], want.hidden)
    _close(experts.last.balance_loss, want.balance_loss)
    upstream = torch.randn(want.hidden.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    ((seen[0] * upstream).sum() + experts.last.balance_loss).backward()
    ((want.hidden * upstream).sum() + want.balance_loss).backward()
    expected = _gradients(stack)
    got = _gradients(experts)
    assert set(got) == set(expected)
    assert any("gates" in name for name in got)
    for name, gradient in expected.items():
        _close(got[name], gradient)
    assert uninstall(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(**inputs).last_hidden_state, plain)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gemma", "gpt_neox", "gpt2", "bert", "opt", "t5"]
)
def test_without_mixed_layers_it_is_the_model(kind, attention, generator):
    """Norms of the model's own here, which compute in fp32."""
    model = make(kind, generator, dtype=torch.float32)
    model.set_attn_implementation(attention)
    inputs = _inputs(kind, generator)
    want = model(**inputs).last_hidden_state
    experts = install_layer_experts(model, layers_to_use=0)
    got = model(**inputs).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert experts.last.chosen.tolist() == list(range(LAYERS))


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_checkpointed_layers_repeat_what_they_did(kind, generator):
    """Bit for bit, with two forward passes before their backward passes."""
    model = make(kind, generator, dtype=torch.float32).train()
    experts = install_layer_experts(model, straight_through=True, freeze=False)
    batches = [_inputs(kind, generator) for _ in range(2)]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        losses = []
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            losses.append(hidden.square().mean() + 0.1 * experts.last.balance_loss)
        for loss in losses:
            loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    for name in ("out_dropout", "down_dropout", "up_dropout", "attention_dropout"):
        object.__setattr__(experts.facts, name, 0.0)
    expected = gradients()
    assert any("gates" in name for name in expected)
    model.gradient_checkpointing_enable()
    runs, layer = [], experts._layer
    experts._layer = lambda *args: (runs.append(args[0]), layer(*args))[1]
    got = gradients()
    assert sorted(runs) == sorted(4 * list(range(LAYERS)))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="expected use_reentrant=False with install_layer"):
        gradients()


@pytest.mark.parametrize(
    ("kind", "head"), [("llama", "AutoModelForCausalLM"), ("t5", "AutoModelForSeq2SeqLM")]
)
def test_it_is_saved_and_loaded_with_the_model(kind, head, generator, tmp_path):
    from safetensors.torch import load_file

    model = make(kind, generator, head, torch.float32)
    options = {"individual_gates": True, "lora_rank": 2}
    install_layer_experts(model, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molex_experts" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(DEVICE))
    inputs = _inputs(kind, generator)
    if kind == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    want = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).to(DEVICE)
    install_layer_experts(again, **options)
    assert not torch.equal(again(**inputs).logits, want)
    saved = load_file(tmp_path / "model.safetensors")
    again.load_state_dict(saved, strict=False)
    # Products of fp32 differ in their last bits with the alignment of the weights in memory.
    torch.testing.assert_close(again(**inputs).logits, want, rtol=1e-5, atol=1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).logits, want)
        assert uninstall(twin)
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("first", ["peft", "experts"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "t5"])
def test_adapters_of_peft_stay_the_models(kind, first, generator):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    targets = {
        "llama": ["q_proj", "k_proj", "gate_proj", "down_proj"],
        "gpt_neox": ["query_key_value", "dense_4h_to_h"],
        "t5": ["q", "k", "wo"],
    }[kind]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = make(kind, generator)
    experts = install_layer_experts(model) if first == "experts" else None
    model = peft.get_peft_model(model, config).to(torch.float64).eval()
    if experts is None:
        experts = install_layer_experts(model)
    twin = copy.deepcopy(model)
    uninstall(twin)
    assert all("lora_" in name for name, p in twin.named_parameters() if p.requires_grad)
    stack = mk.LayerExpertStack.from_transformers(twin)
    stack.gates.load_state_dict(experts.gates.state_dict())
    inputs = _inputs(kind, generator)
    seen = []
    layers_of(model)[-1].register_forward_hook(lambda module, args, y: seen.append(y))
    out = model(**inputs, output_hidden_states=True)
    want = stack(out.hidden_states[0].detach(), inputs["attention_mask"].bool())
    seen = [y[0] if isinstance(y, tuple) else y for y in seen]
    _close(seen[0], want.hidden)
    seen[0].square().sum().backward()
    want.hidden.square().sum().backward()
    path = stack.facts.layout.linears
    assert len(stack.lora_a) == len(targets)
    for name, a in stack.lora_a.items():
        for t, layer in enumerate(layers_of(model)):
            part = layer.get_submodule(path[name])
            _close(part.lora_A["default"].weight.grad, a.grad[t])
            _close(part.lora_B["default"].weight.grad, stack.lora_b[name].grad[t])
    with pytest.raises(ValueError, match="lora_rank: expected 0 where the model has adapters"):
        install_layer_experts(model, lora_rank=2)


def test_adapters_that_are_switched_off_add_nothing(generator):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model = make("llama", generator)
    inputs = _inputs("llama", generator)
    plain = model(**inputs).last_hidden_state
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, config).to(torch.float64).eval()
    install_layer_experts(model, layers_to_use=0)
    with model.disable_adapter():
        _close(model(**inputs).last_hidden_state, plain)
    assert not torch.allclose(model(**inputs).last_hidden_state, plain)


def test_text_is_generated_without_a_cache(generator):
    model = make("qwen2", generator, "AutoModelForCausalLM", torch.float32)
    install_layer_experts(model)
    tokens = expected = torch.randint(3, 20, (2, 5), generator=generator).to(DEVICE)
    for _ in range(3):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    options["eos_token_id"] = None
    with pytest.raises(NotImplementedError, match=r"expected (None|False) with install_layer_exp"):
        model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, use_cache=False, **options), expected)
    with pytest.raises(NotImplementedError, match="output_attentions: expected False"):
        model(tokens, output_attentions=True)


def test_a_mixed_encoder_has_a_decoder_with_a_cache(generator):
    model = make("t5", generator, "AutoModelForSeq2SeqLM", torch.float32)
    inputs = _inputs("t5", generator)
    options = {**inputs, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    options |= {"decoder_start_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**options).logits[0]
    experts = install_layer_experts(model)
    kept, again = (model.generate(**options, use_cache=use) for use in (True, False))
    assert experts.last.chosen.shape == (LAYERS,)
    assert not torch.allclose(kept.logits[0], plain)
    for one, other in zip(kept.logits, again.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_compiles_without_a_graph_break(kind, generator):
    model = make(kind, generator, dtype=torch.float32)
    install_layer_experts(model)
    inputs = _inputs(kind, generator)
    want = model(**inputs).last_hidden_state
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, want)


def test_under_autocast_and_in_bf16(generator):
    model = make("qwen3", generator, "AutoModelForCausalLM", torch.float32)
    inputs = _inputs("qwen3", generator)
    plain = model(**inputs, labels=inputs["input_ids"]).loss
    install_layer_experts(model, layers_to_use=0)
    with torch.autocast(plain.device.type, torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(loss.float(), plain, rtol=0.1, atol=0.1)
    half = model.to(torch.bfloat16)(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(half.float(), plain, rtol=0.1, atol=0.1)


def test_bad_calls_are_refused_and_change_nothing(generator):
    model = make("llama", generator, dtype=torch.float32)
    before = {name: type(module) for name, module in model.named_modules()}
    for options, error, text in (
        ({"rank": 2}, TypeError, "options: expected some of"),
        ({"vote": "most"}, ValueError, "vote: expected"),
        ({"lora_targets": ("gates",), "lora_rank": 2}, ValueError, "lora_targets: expected"),
    ):
        with pytest.raises(error, match=text):
            install_layer_experts(model, **options)
    experts = install_layer_experts(model)
    with pytest.raises(ValueError, match="vote: expected"):
        install_layer_experts(model, vote="most")
    assert model.molex_experts is experts
    model(**_inputs("llama", generator))
    assert experts.last is not None
    assert not layers_of(model)[0].mlp.up_proj.weight.requires_grad
    uninstall(model)
    layers_of(model)[1].self_attn.q_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="q_proj without hooks"):
        install_layer_experts(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_weights_that_were_put_there_since_train_after_it(generator):
    model = make("llama", generator, dtype=torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    install_layer_experts(model)
    model.load_state_dict(weights, strict=False, assign=True)
    assert not layers_of(model)[0].mlp.up_proj.weight.requires_grad
    uninstall(model)
    assert all(p.requires_grad for p in model.parameters())


def test_models_beside_each_other_are_uninstalled_together(generator):
    models = {"dense": make("llama", generator), "sparse": mixture("mixtral", generator)}
    both = torch.nn.ModuleDict(models)
    classes = [type(module) for module in both.modules()]
    install_layer_experts(both["dense"])
    install_momentum(both["sparse"], mk.HeavyBall(0.7))
    assert uninstall(both)
    assert [type(module) for module in both.modules()] == classes
