"""Small mixture-of-experts models of transformers, which tests of the integrations share."""

from __future__ import annotations

import pytest
import torch

EXPERTS, TOP_K, WORDS = 4, 2, 31
SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts"), EXPERTS),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 24),
    "shared_expert_intermediate_size": 24,
    "num_experts_per_tok": TOP_K,
    "hidden_size": 16,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": WORDS,
}
# What a configuration has beyond its model type.
MODELS = {
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {}),
    "olmoe-normalised": ("olmoe", {"norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {"num_key_value_heads": 2}),
    "qwen3_moe-dense_third": ("qwen3_moe", {"mlp_only_layers": [1], "num_hidden_layers": 3}),
    "gpt_oss": ("gpt_oss", {}),
    "granitemoe": ("granitemoe", {}),
}


def mixture(kind, generator, **options):
    """A model with weights that make its gates and heads choose."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    pytest.importorskip("transformers.integrations.moe", exc_type=ImportError)
    model_type, own = MODELS[kind]
    sizes = {**SIZES, "num_hidden_layers": 2, **own, **options}
    config = transformers.AutoConfig.for_model(
        model_type, **sizes, bos_token_id=0, eos_token_id=None, pad_token_id=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())  # transformers draws from the global one
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def blocks(model):
    """By layer: the module with experts."""
    return {
        index: module
        for index, layer in enumerate(model.model.layers)
        for module in layer.modules()
        if hasattr(module, "experts")
    }


def words(generator, *shape):
    return torch.randint(WORDS, shape, generator=generator)


def gradients(model, *batches):
    """Of the sum of the batches' losses: all forward passes before all backward passes."""
    model.zero_grad()
    losses = [model(input_ids=batch, labels=batch).loss for batch in batches]
    for loss in losses:
        loss.backward()
    return [loss.detach() for loss in losses], {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
