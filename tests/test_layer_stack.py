"""LayerExpertStack against the published algorithm run on transformers' own layers, one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import DEVICE
from layer_models import (
    FIRST,
    LAYERS,
    MODELS,
    OTHERS,
    WIDTH,
    bias_tables,
    layers_of,
    make,
    published,
    runner,
)

import molex_kernels as mk
from molex_kernels.ops.layer_mixing import positions

transformers = pytest.importorskip("transformers", exc_type=ImportError)

OPTIONS = [
    {},
    {"vote": "mean_softmax", "layers_to_use": 2},
    {"vote": "mean_sigmoid", "individual_gates": True, "mixing": (0.5, 0.5)},
    {"learn_mixing": True},
    {"learn_mixing": True, "individual_mixing": True, "individual_gates": True},
    {"learn_mixing": True, "published": True},
    {"cosine_dim": 5},
    {"cosine_dim": 5, "published": True, "individual_gates": True},
    {"forward_only": True, "individual_gates": True},
    {"forward_only": True, "individual_gates": True, "published": True},
    {"straight_through": True},
]


def _close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", MODELS)
def test_a_single_branch_is_the_model_itself(kind, generator):
    model = make(kind, generator)
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    want, run = z, runner(model)
    for layer in layers_of(model):
        want = run(layer, want)
    stack = mk.LayerExpertStack.from_transformers(model, layers_to_use=0)
    got = stack(z)
    _close(got.hidden, want)
    assert got.chosen.tolist() == list(range(LAYERS))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)) or "default")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("kind", FIRST)
def test_agrees_with_two_blocks_in_sequence(kind, options, masked, generator):
    if masked and kind == "vit":
        pytest.skip("images have no padding")
    _agrees(kind, options, masked, generator)


@pytest.mark.parametrize(
    ("options", "masked"),
    [({}, False), ({"learn_mixing": True, "straight_through": True}, True)],
    ids=["default-whole", "learned-masked"],
)
@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_agrees_with_two_blocks_in_sequence(kind, options, masked, generator):
    _agrees(kind, options, masked, generator)


def _agrees(kind, options, masked, generator):
    model = make(kind, generator)
    plain = copy.deepcopy(model)
    stack = mk.LayerExpertStack.from_transformers(model, freeze=False, **options)
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    there = None
    if masked:
        there = torch.ones(z.shape[:2], dtype=torch.bool, device=DEVICE)
        there[0, 4:] = False
    gates = copy.deepcopy(stack.gates)
    raw = options.get("published") and kind == "gpt2"
    start = stack.mixing.detach().clone().requires_grad_(options.get("learn_mixing", False))

    def mixing(t):
        row = start[t if start.shape[0] > 1 else 0]
        return torch.softmax(row, 0) if start.requires_grad and not raw else row

    want, balance, chosen = published(
        runner(plain), layers_of(plain), gates, mixing, theirs, options, there
    )
    got = stack(ours, there)
    _close(got.hidden, want)
    _close(got.balance_loss, balance)
    assert got.chosen.tolist() == chosen

    upstream = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    ((got.hidden * upstream).sum() + got.balance_loss).backward()
    ((want * upstream).sum() + balance).backward()
    _close(ours.grad, theirs.grad)
    for one, other in zip(stack.gates.parameters(), gates.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            _close(one.grad, other.grad)
    if start.requires_grad:
        _close(stack.mixing.grad, start.grad)
    named = {**stack.facts.layout.linears, **stack.facts.norms}
    tables = bias_tables(plain)
    assert {*named, *(["position_bias"] if tables else [])} == set(stack.weights)
    for row, table in enumerate(tables):
        _close(stack.weights["position_bias"].grad[row], table.weight.grad)
    for name, path in named.items():
        for t, layer in enumerate(layers_of(plain)):
            part = layer.get_submodule(path)
            bias = getattr(part, "bias", None)
            assert (bias is not None) == (name in stack.biases)
            for stacked, own in ((stack.weights, part.weight), (stack.biases, bias)):
                if own is not None:
                    want_grad = torch.zeros_like(own) if own.grad is None else own.grad
                    _close(stacked[name].grad[t], want_grad)


def test_the_model_shares_the_stack_and_a_cache_is_refused(generator):
    model = make("bert", generator)
    stack = mk.LayerExpertStack.from_transformers(model)
    query = layers_of(model)[1].attention.self.query
    assert query.weight.data_ptr() == stack.weights["q"][1].data_ptr()
    with pytest.raises(NotImplementedError, match="cache: expected None"):
        stack(torch.zeros(1, 2, WIDTH, dtype=torch.float64, device=DEVICE), cache=object())


def _widened(model):
    for layer in layers_of(model):
        layer.mlp.register_parameter("temperature", torch.nn.Parameter(torch.ones(1)))
    return model


def _shared(model):
    model.layers = torch.nn.ModuleList([model.layers[0]] * 3)
    return model


def _clip_text():
    sizes = {**MODELS["clip"][1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model("clip_text_model", **sizes)
    return transformers.AutoModel.from_config(config)


def _other(model_type, **options):
    """A model of another kind, some with the parts of Llama's layers."""
    sizes = {**MODELS["llama"][1], "pad_token_id": 0, **options}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    return transformers.AutoModel.from_config(config)


def _replaced(model):
    """Its bias by positions comes from something else than a table."""
    first = layers_of(model)[0].layer[0].SelfAttention
    first.relative_attention_bias = torch.nn.Linear(2, 8)
    return model


def _narrow(model):
    first = layers_of(model)[0].layer[0].SelfAttention
    first.relative_attention_bias = torch.nn.Embedding(8, 3)
    return model


@pytest.mark.parametrize(
    ("of", "text"),
    [
        (lambda g: _other("deberta"), "where disentangled attention adds products of q and k"),
        (lambda g: _other("deberta-v2"), "adds products .* got DebertaV2Layer"),
        (lambda g: _replaced(make("t5", g)), "bias for the positions' bias, got Linear"),
        (lambda g: _narrow(make("t5", g)), r"8 buckets and 2 heads, got \[8, 3\]"),
        (lambda g: _other("smollm3"), "got SmolLM3DecoderLayer, which has the same parts"),
        (
            lambda g: _other("stablelm", use_parallel_residual=True, hidden_size=24),
            "expected layers as in transformers' GPT-2",
        ),
        (lambda g: _clip_text(), "got clip_text_model, whose layers are causal by their masks"),
        (lambda g: _other("helium"), "got HeliumDecoderLayer, which has the same parts"),
        (lambda g: _other("gemma2"), "a soft cap on its scores"),
        (lambda g: _other("gemma3_text"), "more parameters than are known: pre_feedforward_lay"),
        (lambda g: _widened(make("llama", g)), "more parameters than are known: mlp.temperature"),
        (lambda g: _shared(make("llama", g)), "parameters of their own, got shared ones"),
        (lambda g: make("gpt2", g, add_cross_attention=True), "layers without cross attention"),
        (
            lambda g: make(
                "qwen2", g, use_sliding_window=True, sliding_window=3, max_window_layers=1
            ),
            "the same sliding window, or none, got None in layer 0 and 3 in layer 1",
        ),
        (lambda g: torch.nn.Linear(2, 2), "expected layers as in transformers' GPT-2"),
        (lambda g: layers_of(make("llama", g)), "beside the module rotary_emb"),
    ],
    ids=lambda value: value.split(",")[0][:30] if isinstance(value, str) else "",
)
def test_layers_that_do_more_are_refused(of, text, generator):
    with pytest.raises((TypeError, ValueError), match=text):
        mk.LayerExpertStack.from_transformers(of(generator))


def test_adapters_that_are_not_loras_are_refused(generator):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    model = peft.get_peft_model(make("llama", generator), config)
    with pytest.raises(ValueError, match="expected no adapters but LoRA's"):
        mk.LayerExpertStack.from_transformers(model)


def test_new_adapters_are_refused_before_weights_move(generator):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(make("llama", generator), config)
    weight = layers_of(model)[0].mlp.up_proj.weight
    before = weight.data_ptr()
    with pytest.raises(ValueError, match="lora_rank: expected 0 where the model has adapters"):
        mk.LayerExpertStack.from_transformers(model, lora_rank=2)
    assert weight.data_ptr() == before


def test_positions_may_be_given(generator):
    model = make("llama", generator)
    stack = mk.LayerExpertStack.from_transformers(model, layers_to_use=0)
    z = torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    steps = torch.tensor([[0, 1, 4, 5, 9], [2, 3, 4, 6, 7]], device=DEVICE)
    want = z
    for layer in layers_of(model):
        want = layer(want, position_embeddings=model.rotary_emb(z, steps))
    _close(stack(z, position_ids=steps).hidden, want)
    with pytest.raises(ValueError, match=r"position_ids: expected shape \[B, N\] or \[1, N\]"):
        stack(z, position_ids=steps[[0, 1, 1]])
    other = mk.LayerExpertStack.from_transformers(make("opt", generator))
    with pytest.raises(ValueError, match="position_ids: expected None in opt layers"):
        other(z, position_ids=steps)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "distilbert", "t5"])
def test_dropout_is_drawn_where_the_model_has_it(kind, generator):
    names = {"llama": ["attention_dropout"], "distilbert": ["dropout", "attention_dropout"]}
    names["t5"] = ["dropout_rate"]
    options = dict.fromkeys(names.get(kind, ["hidden_dropout", "attention_dropout"]), 0.5)
    stack = mk.LayerExpertStack.from_transformers(make(kind, generator, **options))
    facts = stack.facts
    after = 0.5 if kind in ("gpt_neox", "t5") else 0.0
    assert (facts.out_dropout, facts.attention_dropout) == (after, 0.5)
    assert facts.down_dropout == (0.0 if kind == "llama" else 0.5)
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    assert torch.equal(stack(z).hidden, stack(z).hidden)
    stack.train()
    assert not torch.equal(stack(z).hidden, stack(z).hidden)
    for name in ("out_dropout", "down_dropout", "attention_dropout"):
        object.__setattr__(facts, name, 0.0)
    assert torch.equal(stack(z).hidden, stack(z).hidden) == (kind != "t5")  # inside of its MLP


def test_buckets_are_those_of_the_models():
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
    from transformers.models.t5.modeling_t5 import T5Attention

    steps = torch.arange(300, device=DEVICE)
    relative = steps[None] - steps[:, None]
    for sizes in ((32, 128), (8, 20), (64, 256)):
        got = positions.relative_buckets(300, *sizes, steps.device)
        assert torch.equal(got, T5Attention._relative_position_bucket(relative, True, *sizes))
        assert torch.equal(got, MPNetEncoder.relative_position_bucket(relative, *sizes))


@pytest.mark.parametrize("path", ["layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"])
def test_infinities_of_fp16_are_clamped_as_in_the_model(path, generator):
    model = make("t5", generator).half()
    z = torch.randn(2, 7, WIDTH, generator=generator).to(DEVICE, torch.float16)
    with torch.no_grad():
        layers_of(model)[0].get_submodule(path).weight.mul_(60000)
    want, run = z, runner(model)
    for layer in layers_of(model):
        want = run(layer, want)
    got = mk.LayerExpertStack.from_transformers(model, layers_to_use=0)(z).hidden
    assert (want.abs() == torch.tensor(64504.0).half()).any()
    assert (got - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3", "gpt_neox", "mt5"])
def test_in_bf16_and_under_autocast_as_the_model(kind, generator):
    """No further from fp32 than a few roundings of the model's own layers in bf16."""
    model = make(kind, generator, dtype=torch.float32)
    z = torch.randn(2, 7, WIDTH, generator=generator).to(DEVICE)
    stack = mk.LayerExpertStack.from_transformers(copy.deepcopy(model), layers_to_use=0)
    want = stack(z).hidden
    run, halves = runner(model), copy.deepcopy(model).bfloat16()
    theirs = z.bfloat16()
    for layer in layers_of(halves):
        theirs = run(layer, theirs)
    allowed = 2 * (theirs.float() - want).abs().max() + 0.02 * want.abs().max()
    ours = mk.LayerExpertStack.from_transformers(halves, layers_to_use=0)(z.bfloat16()).hidden
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - want).abs().max() <= allowed
    with torch.autocast(z.device.type, torch.bfloat16):
        mixed = stack(z).hidden
    assert (mixed.float() - want).abs().max() <= allowed


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_compiles_without_a_graph_break(kind, generator):
    stack = mk.LayerExpertStack.from_transformers(make(kind, generator, dtype=torch.float32))
    z = torch.randn(2, 7, WIDTH, generator=generator).to(DEVICE)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z).hidden, stack(z).hidden)


def test_a_cosine_gate_is_the_cosine_with_learned_directions(generator):
    stack = mk.LayerExpertStack.from_transformers(make("bert", generator), cosine_dim=5)
    (gate,) = stack.gates
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    p = z @ gate.projection.weight.T + gate.projection.bias
    cosines = torch.cosine_similarity(p[..., None], gate.directions, dim=2)
    _close(gate(z), 2 * cosines)
    published = mk.LayerExpertStack.from_transformers(
        make("bert", generator), cosine_dim=5, published=True
    )
    published.gates.load_state_dict(stack.gates.state_dict())
    over = p / p.norm(dim=1, keepdim=True)
    directions = gate.directions / gate.directions.norm(dim=0)
    _close(published.gates[0](z), 2 * over @ directions)


_TARGETS = {
    "gpt2": ["c_attn"],
    "bert": ["query", "value"],
    "llama": ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "mt5": ["q", "v", "wi_0", "wo"],
}


@pytest.mark.parametrize("kind", _TARGETS)
def test_adapters_of_peft_are_taken_over(kind, generator):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    targets = _TARGETS[kind]
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=targets, fan_in_fan_out=kind == "gpt2"
    )
    model = peft.get_peft_model(make(kind, generator), config).to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * drawn)
    plain = copy.deepcopy(model)
    stack = mk.LayerExpertStack.from_transformers(model)
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    mixing = stack.mixing.detach()[0]
    gates = copy.deepcopy(stack.gates)
    want, _, chosen = published(runner(plain), layers_of(plain), gates, lambda t: mixing, z, {})
    got = stack(z)
    _close(got.hidden, want)
    assert got.chosen.tolist() == chosen
    upstream = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    (got.hidden * upstream).sum().backward()
    (want * upstream).sum().backward()
    for name, a in stack.lora_a.items():
        path = stack.facts.layout.linears[name]
        for t, layer in enumerate(layers_of(plain)):
            part = layer.get_submodule(path)
            _close(a.grad[t], part.lora_A["default"].weight.grad)
            _close(stack.lora_b[name].grad[t], part.lora_B["default"].weight.grad)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_adapters_of_peft_in_single_precision(kind, dtype, dropout, generator):
    """PEFT's default on a model in 16 bits: the stack trains the adapters as they are."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    targets = ["c_attn"] if kind == "gpt2" else ["query", "value"]
    config = peft.LoraConfig(
        r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2", init_lora_weights=False
    )
    config.lora_dropout = dropout
    model = peft.get_peft_model(make(kind, generator).to(dtype), config).train(dropout > 0)
    layer = layers_of(model)[0]
    assert {p.dtype for n, p in layer.named_parameters() if "lora_" in n} == {torch.float32}
    stack = mk.LayerExpertStack.from_transformers(model)
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=dtype).to(DEVICE)
    out = stack(z).hidden
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for adapters in (stack.lora_a, stack.lora_b):
        for name, adapter in adapters.items():
            assert adapter.grad.dtype == torch.float32, name
            assert torch.isfinite(adapter.grad).all(), name
            assert adapter.grad.abs().sum() > 0, name
    if not dropout:  # there PEFT runs its adapters in fp32, the stack in the model's dtype
        again = copy.deepcopy(stack)
        for adapters in (again.lora_a, again.lora_b):
            for adapter in adapters.values():
                adapter.data = adapter.data.to(dtype)
        torch.testing.assert_close(again(z).hidden, out)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "gpt_neox"])
def test_new_adapters_add_their_product_to_the_weights(kind, generator):
    model = make(kind, generator)
    plain = copy.deepcopy(model)
    targets = ("q", "v", "up", "gate") if kind == "llama" else ("q", "v", "up")
    options = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": targets}
    stack = mk.LayerExpertStack.from_transformers(model, **options)
    assert not any(parameter.requires_grad for parameter in stack.weights.values())
    layout = stack.facts.layout
    with torch.no_grad():
        for name, b in stack.lora_b.items():
            b.copy_(torch.randn(b.shape, generator=generator, dtype=torch.float64))
            moved = 2.0 * b @ stack.lora_a[name]
            for t, layer in enumerate(layers_of(plain)):
                fused = name not in layout.linears
                weight = layer.get_submodule(layout.linears["qkv" if fused else name]).weight
                rows = weight.T if layout.transposed else weight
                if fused and kind == "gpt_neox":
                    rows = rows.view(2, 3, WIDTH // 2, WIDTH)[:, "qkv".index(name)]
                elif fused:
                    rows = rows[WIDTH * "qkv".index(name) :][:WIDTH]
                rows += moved[t].view(rows.shape)
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    mixing = stack.mixing.detach()[0]
    gates = copy.deepcopy(stack.gates)
    want, _, _ = published(runner(plain), layers_of(plain), gates, lambda t: mixing, z, {})
    _close(stack(z).hidden, want)


def test_dropout_on_adapters_is_drawn_for_each_branch(generator):
    options = {"lora_rank": 2, "lora_dropout": 0.5, "layers_to_use": 0}
    stack = mk.LayerExpertStack.from_transformers(make("bert", generator), **options)
    with torch.no_grad():
        for b in stack.lora_b.values():
            b.fill_(0.5)
    z = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64).to(DEVICE)
    assert torch.equal(stack(z).hidden, stack(z).hidden)
    stack.train()
    for name in ("out_dropout", "down_dropout", "attention_dropout"):
        object.__setattr__(stack.facts, name, 0.0)
    assert not torch.equal(stack(z).hidden, stack(z).hidden)
