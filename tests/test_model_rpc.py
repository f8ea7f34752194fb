"""RPC attention in transformers' models, against the equations in plain PyTorch in their place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mixtures import gradients, words

import molex_kernels as mk
from molex_kernels.integrations import _attention
from molex_kernels.integrations._masks import key_mask_of
from molex_kernels.integrations.transformers import (
    install_layer_experts,
    install_rpc_attention,
    uninstall,
)

transformers = pytest.importorskip("transformers", minversion="5.0", exc_type=ImportError)

WORDS, TOKENS, PADDING = 31, 9, 3
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDED = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
MODELS = {
    "bert": {**WIDTHS, **WORDED, "intermediate_size": 24},
    "vit": {**WIDTHS, "intermediate_size": 24, "image_size": 16, "patch_size": 8},
    "gpt2": {**WORDED, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "llama": {**WIDTHS, **WORDED, "intermediate_size": 24, "num_key_value_heads": 2},
}
CAUSAL = ("gpt2", "llama", "mistral")
LAM, ITERS = 0.5, 3


def _model(kind, generator, implementation="sdpa", head=False, **options):
    sizes = {**MODELS.get(kind, WIDTHS), **options}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    auto = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        model = auto.from_config(config, attn_implementation=implementation).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.2 * noise)
    return model


def _inputs(kind, generator, padded=True):
    """What the model is called with, and which of the results count."""
    if kind == "vit":
        images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
        return {"pixel_values": images}, torch.ones(2, 5, dtype=torch.bool)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    if padded:  # decoders are padded on the left, to go on from the last token
        mask[1, slice(PADDING) if kind in CAUSAL else slice(-PADDING, None)] = 0
    tokens = words(generator, 2, TOKENS)
    return {"input_ids": tokens, "attention_mask": mask}, mask.bool()


def _run(model, inputs, counts):
    """The results of the tokens that there are, and the gradients of a sum of them."""
    model.zero_grad()
    result = model(**inputs).last_hidden_state[counts]
    (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    return result.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _agree(got, want):
    torch.testing.assert_close(got[0], want[0], atol=1e-11, rtol=1e-11)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        close = 1e-10 * gradient.abs().max().item() + 1e-13
        torch.testing.assert_close(got[1][name], gradient, atol=close, rtol=0, msg=name)


def _plain(with_queries, whole=False):
    """RPC attention as an attention function of transformers, written out."""

    def attention(module, query, key, value, mask, scaling=None, **_):
        batch, heads, tokens, width = query.shape
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        seen = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool)
        seen = mask if mask is not None else seen.tril() if module.is_causal else seen
        there = seen[:, :, -1, :]
        norm, count = (key.abs().sum(3) * there), there.double()
        if module.is_causal and not whole:
            norm, count = norm.cumsum(2), count.cumsum(2)
        else:
            norm, count = norm.sum(2, keepdim=True), count.sum(2, keepdim=True)
        bound = (LAM * count * heads * width / (4 * norm.clamp(min=1e-20)))[..., None]
        low = dual = torch.zeros_like(key)
        for _ in range(ITERS):
            moved = key - low + dual
            sparse = moved.sign() * (moved.abs() - bound).clamp(min=0)
            clean = key - sparse - dual
            scores = (query if with_queries else clean) @ clean.mT * scaling
            low = scores.masked_fill(~seen, -1e30).softmax(3) @ value
            low = low.where(there[..., None], 0)
            dual = dual + key - low - sparse
        return low.transpose(1, 2), None

    return attention


def _instead(monkeypatch, function):
    """Lets "sdpa" be another function, so that the models make the same masks."""
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", function)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("projection", ["qkv", "kv"])
def test_layers_compute_the_equations(kind, projection, generator, monkeypatch):
    model = _model(kind, generator)
    inputs, counts = _inputs(kind, generator)
    plain = _run(model, inputs, counts)
    options = {"num_iters": ITERS, "lam": LAM, "projection": projection}
    assert install_rpc_attention(model, layers=None, **options) == [0, 1]
    got = _run(model, inputs, counts)
    assert (got[0] - plain[0]).abs().max() > 1e-3
    assert uninstall(model)
    _instead(monkeypatch, _plain(projection == "qkv"))
    _agree(got, _run(model, inputs, counts))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_without_robustness_nothing_changes(kind, padded, generator):
    model = _model(kind, generator)
    if kind == "gpt2":
        model.set_attn_implementation("eager")
    inputs, counts = _inputs(kind, generator, padded)
    want = _run(model, inputs, counts)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert install_rpc_attention(model, layers=None, robust=False) == [0, 1]
    _agree(_run(model, inputs, counts), want)
    install_rpc_attention(model)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert "molex" not in model.config.to_json_string()
    assert uninstall(model)
    assert not uninstall(model)
    assert torch.equal(_run(model, inputs, counts)[0], want[0])
    assert not any("molex" in name for m in model.modules() for name in vars(m))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_chosen_layers_alone(kind, generator, monkeypatch):
    """The others keep what `set_attn_implementation` says."""
    model = _model(kind, generator, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 3})
    inputs, counts = _inputs(kind, generator)
    called, sdpa = [], transformers.AttentionInterface._global_mapping["sdpa"]
    _instead(monkeypatch, lambda module, *a, **k: called.append(module) or sdpa(module, *a, **k))
    plain = _run(model, inputs, counts)[0]
    modules = called.copy()
    assert install_rpc_attention(model, layers=[2, 1, 1]) == [1, 2]
    assert install_rpc_attention(model, layers=[1]) == [1]
    called.clear()
    robust = _run(model, inputs, counts)[0]
    assert called == [modules[0], modules[2]]
    assert not torch.allclose(robust, plain, atol=1e-3)
    model.set_attn_implementation("eager")
    called.clear()
    eager = _run(model, inputs, counts)[0]
    assert not called
    torch.testing.assert_close(eager, robust, atol=1e-11, rtol=1e-11)
    assert install_rpc_attention(model, layers=()) == []
    assert not torch.allclose(_run(model, inputs, counts)[0], robust, atol=1e-3)


def test_thresholds_of_the_whole_segment(generator, monkeypatch):
    model = _model("gpt2", generator)
    inputs, counts = _inputs("gpt2", generator)
    options = {"num_iters": ITERS, "lam": LAM, "layers": None}
    install_rpc_attention(model, **options)
    got, changed = (copy.deepcopy(inputs) for _ in range(2))
    changed["input_ids"][:, -1] += 1
    changed["input_ids"] %= WORDS

    def before_the_last(inputs):
        return model(**inputs).last_hidden_state[0, :-1]

    assert torch.equal(before_the_last(got), before_the_last(changed))
    install_rpc_attention(model, causal=True, **options)
    assert (before_the_last(got) - before_the_last(changed)).abs().max() > 1e-6
    got = _run(model, inputs, counts)
    uninstall(model)
    _instead(monkeypatch, _plain(True, whole=True))
    _agree(got, _run(model, inputs, counts))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_text_is_generated_without_a_cache(kind, generator):
    model = _model(kind, generator, head=True)
    install_rpc_attention(model, layers=None, lam=LAM)
    tokens = expected = words(generator, 2, 5)
    for _ in range(3):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, use_cache=False, **options), expected)
    with pytest.raises(NotImplementedError, match=r"cache: .*generate\(\.\.\., use_cache=False\)"):
        model.generate(tokens, **options)


def test_checkpointed_layers_drop_the_same(generator):
    model = _model("gpt2", generator, head=True, attn_pdrop=0.4, embd_pdrop=0.0, resid_pdrop=0.0)
    install_rpc_attention(model, layers=None, num_iters=2, lam=LAM)
    tokens = words(generator, 2, TOKENS)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    found = []
    for checkpointing, seed in ((False, 1), (True, 1), (False, 2)):
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found.append(gradients(model, tokens))
    (first, expected), (again, got), (other, _) = found
    assert again == first
    assert other != first
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-12, rtol=1e-12, msg=name)


def test_compiled_copied_pickled(generator):
    model = _model("bert", generator).float()
    inputs, counts = _inputs("bert", generator)
    install_rpc_attention(model, num_iters=2, lam=LAM)
    expected = model(**inputs).last_hidden_state[counts]
    dumped = pickle.dumps(model)
    transformers.AttentionInterface._global_mapping.pop(_attention.NAME)  # as another process
    loaded = pickle.loads(dumped)
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other(**inputs).last_hidden_state[counts], expected)
        assert uninstall(other)
        assert not torch.allclose(other(**inputs).last_hidden_state[counts], expected, atol=1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**inputs).last_hidden_state[counts]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


THERE = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
TRIANGLE = torch.ones(4, 4, dtype=torch.bool).tril()
FULL = THERE[:, None, None].expand(3, 1, 4, 4)
WINDOW = TRIANGLE & ~TRIANGLE.tril(-2)


def _additive(seen, dtype=torch.float32, far=None):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(
        ~seen, torch.finfo(dtype).min if far is None else far
    )


@pytest.mark.parametrize(
    ("mask", "is_causal"),
    [
        (THERE, False),
        (THERE.long(), True),
        (FULL, False),
        (FULL[:, :, :1], False),
        (FULL & TRIANGLE, True),
        ((FULL & TRIANGLE) | ~(FULL & TRIANGLE).any(3, keepdim=True), True),
        (FULL.expand(3, 2, 4, 4) & TRIANGLE, True),
        (_additive(FULL), False),
        (_additive(FULL & TRIANGLE, torch.bfloat16), True),
        (_additive(FULL & TRIANGLE, far=-float("inf")), True),
    ],
)
def test_masks_of_tokens(mask, is_causal):
    device = torch.device("cpu")
    assert torch.equal(key_mask_of(mask, 3, 4, is_causal, device), THERE)
    shape = key_mask_of(mask.to("meta"), 3, 4, is_causal, torch.device("meta")).shape
    assert shape == (3, 4)  # where reading a value would fail


@pytest.mark.parametrize(
    ("mask", "is_causal", "message"),
    [
        (FULL, True, "or a causal mask of the tokens"),
        (FULL[:, :, :1], True, "or a causal mask of the tokens"),
        (FULL & TRIANGLE, False, "or a mask of the tokens"),
        (FULL & WINDOW, True, "says more"),
        (FULL & THERE[:, None, :, None], False, "says more"),  # padding attends to nothing
        (_additive(FULL) + torch.arange(4.0), False, "says more"),
        (_additive(FULL, far=-1.0), False, "says more"),
        (torch.stack([FULL[:, 0], FULL[:, 0] & TRIANGLE], 1), False, "the same for all heads"),
        (THERE[:2], False, r"expected \[B, N\] or \[B, H, N, N\] with B=3 and N=4, got \[2, 4\]"),
        (FULL[..., :3], False, r"got \[3, 1, 4, 3\]"),
    ],
)
def test_masks_that_say_more(mask, is_causal, message, monkeypatch):
    with pytest.raises(ValueError, match=f"attention_mask: .*{message}"):
        key_mask_of(mask, 3, 4, is_causal, torch.device("cpu"))
    if "got" not in message:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(RuntimeError, match="attention_mask: expected"):
            key_mask_of(mask, 3, 4, is_causal, torch.device("cpu"))


def test_calls_that_it_does_not_take(generator):
    model = _model("gpt2", generator)
    install_rpc_attention(model)
    inputs, _ = _inputs("gpt2", generator)
    for added, error, message in (
        ({"output_attentions": True}, NotImplementedError, "output_attentions: expected False"),
        ({"head_mask": torch.ones(2)}, NotImplementedError, "head_mask: expected None"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, ValueError, "attention_mask: expected a padd"),
    ):
        with pytest.raises(error, match=message):
            model(**{**inputs, **added})
    with pytest.raises(
        NotImplementedError, match=r"attention_mask: expected a tensor .* got object"
    ):
        key_mask_of(object(), 2, 9, True, torch.device("cpu"))
    with pytest.raises(ValueError, match="position_ids: expected one sequence"):
        _attention._check_packed(torch.tensor([[0, 1, 2, 0, 1]]), 1)
    bert = _model("bert", generator, "eager", output_attentions=True)
    install_rpc_attention(bert)
    with pytest.raises(NotImplementedError, match="output_attentions: expected False"):
        bert(**_inputs("bert", generator)[0])
    sizes = {**MODELS["llama"], "head_dim": 4}
    mistral = _model("mistral", generator, **sizes, sliding_window=TOKENS)
    install_rpc_attention(mistral)
    mistral(inputs["input_ids"])
    with pytest.raises(
        NotImplementedError, match=r"sliding_window: expected .* 10 tokens .* got 9"
    ):
        mistral(words(generator, 2, TOKENS + 1))


REFUSED = {
    "two stacks": ("bart", {"d_model": 16}, r"with 2 \(encoder\.layers, decoder\.layers\)"),
    "cross": ("gpt2", {"add_cross_attention": True}, "got attn, crossattention"),
    "bias": ("layoutlmv3", {"visual_embed": False}, "LayoutLMv3SelfAttention with position_bias"),
    "soft cap": ("gemma2", {}, "Gemma2Attention with attn_logit_softcapping"),
    "sinks": ("gpt_oss", {"num_local_experts": 2}, "GptOssAttention with s_aux, sinks"),
    "no attention": ("resnet", {}, "expected one stack of layers with attention, .* with 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_it_does_not_take(case, generator):
    kind, options, message = REFUSED[case]
    small = {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": WORDS}
    small = {"hidden_sizes": [8] * 4, "depths": [1] * 4} if kind == "resnet" else small
    model = _model(kind, generator, "eager", **{**small, **options})
    with pytest.raises(ValueError, match=message):
        install_rpc_attention(model)
    assert not any("molex" in name for m in model.modules() for name in vars(m))


def test_options_that_it_does_not_take(generator):
    model = _model("bert", generator)
    for options, error, message in (
        ({"lambda_": 4.0}, TypeError, "options: expected some of .*'lam'"),
        ({"projection": "q"}, ValueError, "projection: expected"),
        ({"causal": "yes"}, ValueError, "causal: expected"),
        ({"num_iters": 0}, ValueError, "num_iters: expected"),
        ({"impl": "cuda12"}, ValueError, "impl: expected"),
        ({"layers": 0}, TypeError, "layers: expected indices of layers or None, got 0"),
        ({"layers": [2]}, ValueError, r"layers: expected .* at most 1 \(the last layer\)"),
    ):
        with pytest.raises(error, match=message):
            install_rpc_attention(model, **options)
    install_rpc_attention(model)
    with pytest.raises(ValueError, match="model: expected layers without RPC attention"):
        mk.LayerExpertStack.from_transformers(model)
    uninstall(model)
    install_layer_experts(model)
    with pytest.raises(ValueError, match=r"layers that call their attention, got layers\.0 with"):
        install_rpc_attention(model)
    uninstall(model)
    with pytest.raises(TypeError, match="model: expected a module, got dict"):
        install_rpc_attention({})
    assert not any("molex" in name for m in model.modules() for name in vars(m))
    model.encoder.layer[0].attention.self.forward = lambda *a: a
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.self to run the forward of its"):
        install_rpc_attention(model)
