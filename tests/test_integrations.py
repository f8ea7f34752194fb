"""Other libraries' models on this package's ops, against the same models as they came."""

from __future__ import annotations

import copy
import dis
import importlib
import inspect

import pytest
import torch
from torch import nn

import molex_kernels as mk
from molex_kernels.integrations.timm import install_rpc_attention

WIDTH, HIDDEN, EXPERTS, TOP_K, TOKENS = 16, 24, 4, 2, 13

SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), HIDDEN),
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "moe_latent_size"), WIDTH),
}

# Experts in stacked weights: model type, class, what the configuration adds.
EXPERTS_CLASSES = {
    "silu": ("mixtral", "MixtralExperts", {}),
    "gelu": ("olmoe", "OlmoeExperts", {"hidden_act": "gelu"}),
    "gelu_tanh": ("olmoe", "OlmoeExperts", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": ("olmoe", "OlmoeExperts", {"hidden_act": "relu"}),
    "own_activation": ("olmoe", "OlmoeExperts", {"hidden_act": "relu2"}),
    "own_gate-interleaved-transposed-bias": ("gpt_oss", "GptOssExperts", {}),
    "own_gate": ("deepseek_v4", "DeepseekV4Experts", {"swiglu_limit": 0.2}),
    "plain-own_activation": ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "relu2"}),
    "plain-silu": ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "silu"}),
    "post_norm": ("muse_spark", "MuseSparkExperts", {}),
}


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("transformers.integrations.moe", exc_type=ImportError)
    from molex_kernels.integrations.transformers import install_experts

    assert install_experts() == "molex"
    return module


def _experts(transformers, kind, generator, dtype):
    model_type, name, options = EXPERTS_CLASSES[kind]
    if model_type not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config = transformers.AutoConfig.for_model(model_type, **options).get_text_config()
    for size, value in SIZES.items():
        if hasattr(config, size):
            setattr(config, size, value)
    code = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    experts = getattr(code, name)(config).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return experts


def _routing(generator, dtype):
    index = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    index = torch.where(index == EXPERTS - 1, 0, index)  # an expert without tokens, and twins
    return index, torch.rand(TOKENS, TOP_K, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", EXPERTS_CLASSES)
def test_experts_of_transformers(transformers, kind, generator):
    experts = _experts(transformers, kind, generator, torch.float64)
    index, weight = _routing(generator, torch.float64)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    upstream = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    found = {}
    for name in ("eager", "molex"):
        experts.config._experts_implementation = name
        leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
        out = experts(leaves[0], index, leaves[1])
        inputs = {"x": leaves[0], "weight": leaves[1], **dict(experts.named_parameters())}
        gradients = torch.autograd.grad(out, list(inputs.values()), upstream)
        found[name] = {"out": out, **dict(zip(inputs, gradients, strict=True))}
    close = 1e-5 if kind == "post_norm" else 1e-10  # that norm computes in fp32
    for name, value in found["molex"].items():
        torch.testing.assert_close(value, found["eager"][name], atol=close, rtol=close, msg=name)


def _outputs(experts, generator):
    """What the model's own code gives, and what the op gives."""
    index, weight = _routing(generator, torch.float64)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    for name in ("eager", "molex"):
        experts.config._experts_implementation = name
        yield experts(x, index, weight)


def test_experts_that_say_less_of_themselves(transformers, generator):
    """As before 5.24: what experts can have was added over the releases."""
    experts = _experts(transformers, "silu", generator, torch.float64)
    for name in ("has_gate", "is_concatenated", "has_post_expert_norm"):
        if hasattr(experts, name):
            delattr(experts, name)
    torch.testing.assert_close(*_outputs(experts, generator), atol=1e-10, rtol=1e-10)


def test_models_that_know_their_own_implementations_only(transformers, generator, monkeypatch):
    """As in the first releases of transformers 5."""
    from molex_kernels.integrations.transformers import install_experts

    def theirs(model, requested):
        if requested not in (None, "eager", "grouped_mm", "batched_mm"):
            raise ValueError(f"{requested} is not supported")
        return requested or "eager"

    method = "get_correct_experts_implementation"
    monkeypatch.setattr(transformers.PreTrainedModel, method, theirs)
    for _ in range(2):
        assert install_experts() == "molex"
    model = _model(transformers, generator)
    model.set_experts_implementation("molex")
    assert model.config._experts_implementation == "molex"
    with pytest.raises(ValueError, match="others is not supported"):
        model.set_experts_implementation("others")


def test_models_without_experts_say_so(transformers, generator):
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="interface, got GPT2LMHeadModel, which has none"):
        model.set_experts_implementation("molex")
    model.set_experts_implementation("eager")
    mixture = _model(transformers, generator)
    mixture.set_experts_implementation("molex")
    around = transformers.GPT2LMHeadModel(config)
    around.part = mixture  # a model of models: one of them has experts
    around.set_experts_implementation("molex")


def test_nothing_is_imported_while_a_model_is_traced(transformers):
    """Dynamo refuses some imports: those of lazy modules, in torch 2.11."""
    from molex_kernels.integrations import transformers as integration

    traced = [
        function
        for name, function in inspect.getmembers(integration, inspect.isfunction)
        if function.__module__ == integration.__name__
        and name not in ("install_experts", "_let_the_name_through", "_refuse_without_experts")
    ]
    assert integration.experts_forward in traced
    for function in traced:
        opcodes = {instruction.opname for instruction in dis.get_instructions(function)}
        assert "IMPORT_NAME" not in opcodes, function.__name__


def _model(transformers, generator):
    config = transformers.MixtralConfig(
        **{**SIZES, "num_experts_per_tok": TOP_K, "num_hidden_layers": 2, "vocab_size": 31},
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def _loss_and_gradients(model, tokens):
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def test_a_model_of_transformers_trains_alike(transformers, generator):
    model = _model(transformers, generator)
    tokens = torch.randint(31, (2, 11), generator=generator)
    model.set_experts_implementation("eager")
    loss, gradients = _loss_and_gradients(model, tokens)
    model.set_experts_implementation("molex")
    ours, our_gradients = _loss_and_gradients(model, tokens)
    torch.testing.assert_close(ours, loss)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(our_gradients[name], gradient, atol=close, rtol=0, msg=name)


def test_experts_run_the_op_and_compile_whole(transformers, generator, monkeypatch):
    from molex_kernels.integrations import transformers as integration

    experts = _experts(transformers, "silu", generator, torch.float32)
    experts.config._experts_implementation = "molex"
    calls = []
    monkeypatch.setattr(
        integration, "moe_mlp", lambda *a, **k: calls.append(k) or mk.moe_mlp(*a, **k)
    )
    index, weight = _routing(generator, torch.float32)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    expected = experts(x, index, weight)
    assert [call["activation"] for call in calls] == ["swiglu"]
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True)(x, index, weight)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("own_gate-interleaved-transposed-bias", mk.ClampedSwiGLU(1.702, 7.0)),
        ("gelu_tanh", "geglu_tanh"),
        ("plain-own_activation", "relu_squared"),
    ],
    ids=str,
)
def test_experts_run_as_one_op(transformers, kind, activation, generator, monkeypatch):
    from molex_kernels.integrations import transformers as integration

    experts = _experts(transformers, kind, generator, torch.float32)
    experts.config._experts_implementation = "molex"
    calls = []
    monkeypatch.setattr(
        integration, "moe_mlp", lambda *a, **k: calls.append(k) or mk.moe_mlp(*a, **k)
    )
    index, weight = _routing(generator, torch.float32)
    x = 4 * torch.randn(TOKENS, WIDTH, generator=generator)
    expected = experts(x, index, weight)
    assert [call["activation"] for call in calls] == [activation]
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(experts(x, index, weight), expected, atol=1e-3, rtol=1e-4)
    experts.config._experts_implementation = "molex"
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True)(x, index, weight)
    torch.testing.assert_close(compiled, expected)


def test_hooks_of_an_activation_run(transformers, generator):
    experts = _experts(transformers, "silu", generator, torch.float64)
    calls = []
    experts.act_fn.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(*_outputs(experts, generator), atol=1e-10, rtol=1e-10)
    assert calls[-1:] == [1]
    calls.clear()
    index, weight = _routing(generator, torch.float64)
    experts(torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64), index, weight)
    assert calls == [1]


def test_adapters_of_peft_on_the_experts(transformers, generator):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model = _model(transformers, generator)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=names))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(31, (2, 11), generator=generator)
    base = model.get_base_model()
    base.set_experts_implementation("eager")
    loss, gradients = _loss_and_gradients(model, tokens)
    base.set_experts_implementation("molex")
    ours, our_gradients = _loss_and_gradients(model, tokens)
    torch.testing.assert_close(ours, loss)
    assert any("experts" in name for name in gradients)
    for name, gradient in gradients.items():
        close = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(our_gradients[name], gradient, atol=close, rtol=0, msg=name)


def test_ids_of_other_ranks_contribute_nothing(transformers, generator):
    for kind in ("silu", "own_gate-interleaved-transposed-bias"):
        experts = _experts(transformers, kind, generator, torch.float64)
        experts.config._experts_implementation = "molex"
        index, weight = _routing(generator, torch.float64)
        x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
        away = torch.rand(index.shape, generator=generator) < 0.5
        expected = experts(x, index, weight.masked_fill(away, 0))
        got = experts(x, index.masked_fill(away, EXPERTS), weight)
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


class _Attention(nn.Module):
    """timm's attention: q, k and v of one linear layer, scores scaled, then `proj`."""

    def __init__(self, dim, num_heads, **extras):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.norm = extras.get("q_norm", nn.Identity()), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.2)

    def forward(self, x, attn_mask=None, is_causal=False):
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*parts, attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class _Rotated(_Attention):
    def forward(self, x, rope=None):
        return super().forward(x)


class _Summed(_Attention):
    def forward(self, x):
        return super().forward(x) + x


class _Windows(_Attention):
    def forward(self, x):
        if x.shape[1] != 49:
            raise ValueError("only for 49 tokens")
        return super().forward(x)


def _with(kind=_Attention, buffers=(), **attributes):
    """A model whose first attention has something more."""
    model = _ViT()
    model.blocks[0].attn = attention = kind(24, 3)
    for name, value in attributes.items():
        setattr(attention, name, value)
    for name in buffers:
        attention.register_buffer(name, buffers[name])
    return model


class _ViT(nn.Module):
    """Blocks that call their attention as timm's do."""

    def __init__(self, dim=24, num_heads=3, depth=3, **extras):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(depth))
        for block in self.blocks:
            block.attn = _Attention(dim, num_heads, **extras)

    def forward(self, x, is_causal=False):
        for block in self.blocks:
            x = x + block.attn(x, attn_mask=None, is_causal=is_causal)
        return x


@pytest.mark.parametrize("is_causal", [False, True])
def test_timm_blocks_run_robust_attention_on_their_own_weights(is_causal, generator):
    model = _ViT().double().eval()
    x = torch.randn(2, 7, 24, generator=generator, dtype=torch.float64)
    plain, before = model(x, is_causal), dict(model.named_parameters())
    # One iteration with S empty attends with q to k itself: nothing may change.
    assert install_rpc_attention(model, layers=None, robust=False) == [0, 1, 2]
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[n] for n, p in model.named_parameters())
    torch.testing.assert_close(model(x, is_causal), plain)
    assert not model.blocks[0].attn.training
    assert model.blocks[0].attn.attn_drop == 0.1
    assert model.blocks[0].attn.proj_drop.p == 0.2


def test_an_installed_attention_takes_other_options(generator):
    model, x = _ViT().double().eval(), torch.randn(2, 7, 24, generator=generator).double()
    plain = model(x)
    install_rpc_attention(model, layers=[1], num_iters=2, lam=0.5)
    assert not torch.allclose(model(x), plain)
    install_rpc_attention(model, layers=[1], robust=False)
    torch.testing.assert_close(model(x), plain)
    assert model.blocks[1].attn.attn_drop == 0.1


def test_timm_blocks_run_the_published_form(generator):
    model, x = _ViT().double().eval(), torch.randn(2, 7, 24, generator=generator).double()
    old = copy.deepcopy(model.blocks[1].attn)
    assert install_rpc_attention(model, layers=[1], projection="kv", num_iters=2, lam=0.5) == [1]
    assert isinstance(model.blocks[0].attn, _Attention)
    k, v = old.qkv(x)[..., 24:].unflatten(-1, (2, 3, 8)).permute(2, 0, 3, 1, 4)
    expected = mk.rpc_attention(k, v, num_iters=2, lam=0.5).transpose(1, 2).flatten(2)
    new = model.blocks[1].attn
    torch.testing.assert_close(new(x), old.proj(expected))
    new(x).sum().backward()
    assert new.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "model: expected one with blocks"),
        (_ViT, {"layers": [3]}, "layers: expected at least 0 and at most 2"),
        (_ViT, {"projection": "q"}, "projection: expected one of"),
        (
            lambda: _ViT(q_norm=nn.LayerNorm(8)),
            {},
            r"blocks\.0\.attn .* got _Attention with q_norm",
        ),
        (lambda: _with(p=nn.Parameter(torch.ones(3))), {}, "_Attention with the parameter p"),
        (lambda: _with(buffers={"b": torch.ones(3)}), {}, "_Attention with the buffer b"),
        (lambda: _with(extra=nn.Linear(2, 2)), {}, r"_Attention with extra \(Linear\)"),
        (lambda: _with(drop=nn.Dropout(0.5)), {}, r"_Attention with drop \(Dropout\)"),
        (lambda: _with(attn_drop=nn.ReLU()), {}, r"_Attention with attn_drop \(ReLU\)"),
        (lambda: _with(scale=1.0), {}, "_Attention with a scale of its own"),
        (lambda: _with(num_heads=None), {}, "_Attention with num_heads=None"),
        (lambda: _with(forward=lambda x: x), {}, "_Attention with hooks or a forward"),
        (lambda: _with(kind=_Rotated), {}, "_Rotated with the argument rope"),
        (lambda: _with(kind=_Summed), {}, "got one with outputs that are no softmax"),
        (lambda: _with(kind=_Windows), {}, r"got one with a forward that fails .* 49 tokens"),
        (_ViT, {"num_iters": 0}, "num_iters: expected at least 1"),
    ],
)
def test_bad_models_are_refused_and_left_as_they_are(make, options, message):
    model = make()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        install_rpc_attention(model, **options)
    assert list(model.modules()) == before


def test_masks_of_scores_are_refused():
    x = torch.randn(1, 4, 24)
    for attention in (mk.RPCAttention(24, 3), mk.ScaledAttention(24, 3)):
        with pytest.raises(ValueError, match="attn_mask: expected None"):
            attention(x, attn_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal: expected False"):
        mk.ScaledAttention(24, 3)(x, is_causal=True)
