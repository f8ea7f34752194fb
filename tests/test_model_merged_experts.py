"""CAMEx over the experts of transformers' models, against weights merged one by one in fp64."""

from __future__ import annotations

import copy
import pickle

import mixtures
import pytest
import torch
from safetensors.torch import load_file, save_file

from molex_kernels.integrations.transformers import (
    install_ac_router,
    install_merged_experts,
    install_momentum,
    uninstall,
)
from molex_kernels.ops.momentum.types import HeavyBall

B, N, SEGMENT = 2, 11, 4
# The ends of the segments of 11 tokens.
CUTS = [(0, 4), (4, 8), (8, 11)]


def _stir(model, generator):
    """Factors of the curvature that are no identities."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molex_curvature" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def _merged_weight(weight, gate, factors, base, mask, alpha):
    """One segment's weight [O, D] of experts [E, O, D]."""
    start = weight.mean(0) if base == "mean" else weight[0]
    total = (weight - start).sum(0)
    out = start.clone()
    for e, expert in enumerate(weight):
        tau = expert - start
        delta = tau
        if factors is not None:
            delta = sum(
                torch.kron(factors[0][r, e], factors[1][r, e])
                @ tau
                @ torch.kron(factors[2][r, e], factors[3][r, e]).T
                for r in range(factors[0].shape[0])
            )
        if mask == "ties":
            delta = delta * (tau.sign() == total.sign())
        out = out + alpha * gate[e] * delta
    return out


def _expected(block, x, segmented, options):
    """The experts' output [B, N, D], segment by segment."""
    gate_module = getattr(block, "gate", None) or block.router
    experts = block.experts
    logits = gate_module(x.reshape(-1, x.shape[2]))[0].view(*x.shape[:2], -1)
    curvature = experts.molex_curvature() if options["rank"] else (None, None)
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        before = None
        for start, end in segmented:
            mean = logits[b, start:end].mean(0)
            top = mean.topk(options.get("top_k", len(mean)))
            own = torch.zeros_like(mean)
            own[top.indices] = torch.softmax(top.values, 0)
            uniform = torch.full_like(own, 1 / len(own))
            first = own if options.get("first") == "own" or len(segmented) == 1 else uniform
            gate, before = (first if before is None else before), own
            rows = x[b, start:end]
            for weight, factors, is_up in (
                (experts.gate_up_proj, curvature[0], True),
                (experts.down_proj, curvature[1], False),
            ):
                transposed = experts.is_transposed
                each = weight.mT if transposed else weight
                merged = _merged_weight(
                    each, gate, factors, options["base"], options["mask"], options["alpha"]
                )
                rows = rows @ merged.T
                if experts.has_bias:
                    name = "gate_up_proj_bias" if is_up else "down_proj_bias"
                    bias = getattr(experts, name)[..., None]
                    rows = rows + _merged_weight(
                        bias, gate, None, options["base"], options["mask"], options["alpha"]
                    ).squeeze(1)
                if is_up:
                    rows = experts._apply_gate(rows)
            out[b, start:end] = rows
    return out


PLAIN = {"base": "mean", "rank": 2, "mask": None, "alpha": 0.7, "segment": SEGMENT}
CASES = [
    ("mixtral", PLAIN),
    ("mixtral", {**PLAIN, "base": "first", "mask": "ties", "first": "own", "rank": 1}),
    ("olmoe", {**PLAIN, "top_k": 3, "rank": 0, "segment": None}),
    ("qwen2_moe", {**PLAIN, "scale": "published"}),
    ("qwen3_moe-dense_third", PLAIN),
    ("gpt_oss", {**PLAIN, "base": "first", "mask": "ties"}),
]


@pytest.mark.parametrize(
    ("kind", "options"), CASES, ids=[f"{k}{i}" for i, (k, _) in enumerate(CASES)]
)
def test_experts_are_the_merged_ones(kind, options, generator):
    model = mixtures.mixture(kind, generator).double()
    tokens = mixtures.words(generator, B, N)
    logits = model(tokens).logits
    blocks = mixtures.blocks(model)
    assert install_merged_experts(model, **options) == list(blocks)
    _stir(model, generator)
    seen = {}
    for index, block in blocks.items():
        block.experts.register_forward_hook(
            lambda module, args, y, index=index: seen.update({index: (args[0], y)})
        )
    assert not torch.equal(model(tokens).logits, logits)
    cuts = [(0, N)] if options["segment"] is None else CUTS
    for index, block in blocks.items():
        x, y = (t.view(B, N, -1) for t in seen[index])
        torch.testing.assert_close(y, _expected(block, x, cuts, options), atol=1e-6, rtol=1e-6)
    assert uninstall(model)
    assert torch.equal(model(tokens).logits, logits)
    assert not [name for name in model.state_dict() if "molex" in name]


def test_switched_off_it_is_the_model(generator):
    model = mixtures.mixture("mixtral", generator)
    tokens = mixtures.words(generator, B, N)
    loss, expected = mixtures.gradients(model, tokens)
    install_merged_experts(model, enabled=False)
    again, got = mixtures.gradients(model, tokens)
    assert again == loss
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    install_merged_experts(model, layers=[1], segment=SEGMENT)
    assert mixtures.gradients(model, tokens)[0] != loss
    install_merged_experts(model, layers=[])
    assert mixtures.gradients(model, tokens)[0] == loss


def test_equal_experts_stay_what_they_are(generator):
    model = mixtures.mixture("mixtral", generator).double()
    with torch.no_grad():
        for block in mixtures.blocks(model).values():
            for weight in (block.experts.gate_up_proj, block.experts.down_proj):
                weight.copy_(weight[:1].expand_as(weight).clone())
    tokens = mixtures.words(generator, B, N)
    expected = model(tokens).logits
    for options in ({}, {"base": "first", "mask": "ties"}):
        install_merged_experts(model, segment=SEGMENT, **options)
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-6, rtol=1e-6)


def test_no_token_sees_a_later_one_and_padding_counts_for_nothing(generator):
    model = mixtures.mixture("mixtral", generator).double()
    install_merged_experts(model, segment=SEGMENT)
    tokens = mixtures.words(generator, B, N)
    logits = model(tokens).logits
    for length in (3, 6):  # inside of the first segment, and beyond it
        short = model(tokens[:, :length]).logits
        torch.testing.assert_close(short, logits[:, :length], atol=1e-5, rtol=0)
    mask = (torch.arange(N) < 6).long().expand(B, N)
    other = torch.where(mask.bool(), tokens, mixtures.words(generator, B, N))
    install_merged_experts(model, segment=None)
    seen = [model(t, attention_mask=mask).logits[:, :6] for t in (tokens, other)]
    torch.testing.assert_close(*seen, atol=1e-10, rtol=0)
    torch.testing.assert_close(seen[0], model(tokens[:, :6]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_layers_repeat_what_they_did(reentrant, generator):
    model = mixtures.mixture("mixtral", generator).train()
    install_merged_experts(model, segment=SEGMENT, expert_dropout=0.3)
    _stir(model, generator)
    batches = [mixtures.words(generator, B, N) for _ in range(2)]
    torch.manual_seed(0)
    losses, expected = mixtures.gradients(model, *batches)
    assert any("molex_curvature" in name for name in expected)
    assert all(expected[f"model.layers.{i}.mlp.gate.weight"].any() for i in (0, 1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    again, got = mixtures.gradients(model, *batches)
    assert again == losses
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_compiled_copied_pickled_saved_beside_the_others(generator):
    model = mixtures.mixture("mixtral", generator)
    plain = copy.deepcopy(model)
    tokens = mixtures.words(generator, B, N)
    install_merged_experts(model, segment=SEGMENT)
    install_ac_router(model)
    install_momentum(model, HeavyBall(0.7))
    _stir(model, generator)
    expected = model(tokens).logits
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens).logits, expected)
    install_momentum(plain, HeavyBall(0.7))
    install_ac_router(plain)
    install_merged_experts(plain, segment=SEGMENT)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens).logits, expected)
    install_merged_experts(plain, segment=SEGMENT)  # keeps the factors
    assert torch.equal(plain(tokens).logits, expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    uninstall(plain)
    model.set_experts_implementation("batched_mm")  # eager experts wait for the device
    torch.testing.assert_close(compiled(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_factors_come_back_from_a_folder(generator, tmp_path):
    model = mixtures.mixture("mixtral", generator)
    tokens = mixtures.words(generator, B, N)
    install_merged_experts(model, segment=SEGMENT)
    _stir(model, generator)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    factors = {n: t for n, t in model.state_dict().items() if "molex_curvature" in n}
    save_file(factors, tmp_path / "curvature.safetensors")
    loaded = type(model).from_pretrained(tmp_path)
    install_merged_experts(loaded, segment=SEGMENT)
    # Products of fp32 differ in their last bits with the alignment of the weights in memory.
    close = {"rtol": 1e-5, "atol": 1e-5}
    fresh = loaded(tokens).logits
    assert not torch.allclose(fresh, expected, **close)  # the class knows of no factors
    loaded.load_state_dict(load_file(tmp_path / "curvature.safetensors"), strict=False)
    torch.testing.assert_close(loaded(tokens).logits, expected, **close)


def test_adapters_of_peft_and_text(generator):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model = mixtures.mixture("mixtral", generator)
    tokens = mixtures.words(generator, B, 6)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=names))
    install_merged_experts(adapted, segment=SEGMENT)
    before = adapted(tokens).logits
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    changed = adapted(tokens).logits
    assert not torch.allclose(changed, before, atol=1e-3)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("lora_A" in name for name in trained)
    assert any("molex_curvature" in name for name in trained)
    with pytest.raises(NotImplementedError, match="cache: expected None with install_merged"):
        adapted.generate(input_ids=tokens, max_new_tokens=2, do_sample=False)
    expected = tokens
    for _ in range(3):
        expected = torch.cat([expected, adapted(expected).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": False}
    assert torch.equal(adapted.generate(input_ids=tokens, **options), expected)


def test_factors_train_that_peft_saves(generator):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model = mixtures.mixture("mixtral", generator)
    install_merged_experts(model, segment=SEGMENT)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["molex_curvature"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    tokens = mixtures.words(generator, B, N)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    wanted = {n: p for n, p in adapted.named_parameters() if p.requires_grad and "curvature" in n}
    assert len(wanted) == 2 * 8  # layers, factors of both projections
    assert all(p.grad is not None and p.grad.any() for p in wanted.values())


def test_models_and_options_that_it_does_not_take(generator):
    model = mixtures.mixture("mixtral", generator)
    classes = [type(module) for module in model.modules()]
    for options, error, message in (
        ({"base": "shared"}, ValueError, "base: expected"),
        ({"mask": "ties"}, ValueError, "mask: expected None with base='mean'"),
        ({"top_k": 5}, ValueError, "top_k: expected .* at most 4"),
        ({"segment": 0}, ValueError, "segment: expected"),
        ({"enabled": 1}, TypeError, "enabled: expected"),
        ({"layers": [2]}, ValueError, "layers: expected .* at most 1"),
        ({"impl": "cuda12"}, ValueError, "impl: expected"),
    ):
        with pytest.raises(error, match=message):
            install_merged_experts(model, **options)
    model.model.layers[1].mlp.experts = torch.nn.ModuleList()
    with pytest.raises(ValueError, match=r"the experts of layers\.1 in stacked weights"):
        install_merged_experts(model)
    assert not [name for name in model.state_dict() if "molex" in name]
    assert [c for c in classes if c.__name__ == "MixtralTopKRouter"] == [
        type(module) for module in model.modules() if type(module).__name__ == "MixtralTopKRouter"
    ]


def test_experts_over_ranks_are_refused(generator):
    parallel = pytest.importorskip("molex_kernels.parallel")
    model = mixtures.mixture("mixtral", generator)
    install_merged_experts(model)
    with pytest.raises(ValueError, match="expected experts that run one by one"):
        parallel.ExpertParallel()._apply(model.model.layers[0].mlp.experts, None)
