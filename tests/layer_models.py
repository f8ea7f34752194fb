"""Small transformers models, their layers one by one, and MoLEx on them as published."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import DEVICE

LAYERS, WIDTH = 3, 16
_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 20,
}
_GROUPED = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
_NAMES = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "vocab_size": 20}
_DISTILBERT = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 24, "vocab_size": 20}
_OPT = {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": WIDTH}
_IMAGES = {**_SIZES, "image_size": 8, "patch_size": 4}
_T5 = {"d_model": WIDTH, "d_kv": 6, "d_ff": 24, "num_heads": 2, "vocab_size": 20}
# So few buckets and so short a distance that 7 tokens reach every kind of bucket.
_T5 |= {"num_layers": LAYERS, "relative_attention_num_buckets": 8}
_T5 |= {"relative_attention_max_distance": 5}
_GATED = {**_T5, "feed_forward_proj": "gated-gelu"}
# By name: the model type and what its configuration has.
MODELS = {
    "gpt2": ("gpt2", _NAMES),
    "bert": ("bert", _SIZES),
    "roberta": ("roberta", _SIZES),
    "vit": ("vit", _IMAGES),
    "llama": ("llama", _GROUPED),
    "llama-biased": ("llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": None}),
    "mistral-window": ("mistral", {**_GROUPED, "sliding_window": 3}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _GROUPED),
    "gemma": ("gemma", {**_GROUPED, "num_key_value_heads": 1}),
    "opt": ("opt", _OPT),
    "opt-post": ("opt", {**_OPT, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", _SIZES),
    "gpt_neox-sequential": ("gpt_neox", {**_SIZES, "use_parallel_residual": False}),
    "distilbert": ("distilbert", _DISTILBERT),
    "granite": (
        "granite",
        {**_GROUPED, "residual_multiplier": 0.3, "attention_multiplier": 0.7},
    ),
    "stablelm": ("stablelm", {**_SIZES, "num_key_value_heads": 1, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {**_SIZES, "num_key_value_heads": 1, "sliding_window": 3}),
    "ijepa": ("ijepa", _IMAGES),
    "clip": ("clip_vision_model", _IMAGES),
    "siglip": ("siglip_vision_model", _IMAGES),
    "t5": ("t5", _T5),
    "mt5": ("mt5", _GATED),
    "umt5": ("umt5", _GATED),
    "mpnet": ("mpnet", _SIZES),
}
ENCODERS = ("t5", "mt5", "umt5")  # of encoders and decoders
FIRST = ("gpt2", "bert", "roberta", "vit")
OF_IMAGES = ("vit", "ijepa", "clip", "siglip")
OTHERS = tuple(kind for kind in MODELS if kind not in FIRST)


def make(kind, generator, head=None, dtype=torch.float64, **options):
    """A model with all its parameters moved, in evaluation."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    model_type, sizes = MODELS[kind]
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **options})
    if head is None:
        head = "AutoModelForTextEncoding" if kind in ENCODERS else "AutoModel"
    attention = "eager" if kind == "mpnet" else "sdpa"  # MPNet has no other
    model = getattr(transformers, head).from_config(config, attn_implementation=attention)
    model = model.to(DEVICE, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (0.2 * noise).to(DEVICE, dtype)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith(
                ("RMSNorm", "T5LayerNorm")
            ):  # theirs computes in fp32
                module.forward = functools.partial(_rms_norm, module)
    return model


def _rms_norm(norm, x):
    if hasattr(norm, "variance_epsilon"):
        eps, weight = norm.variance_epsilon, norm.weight
    else:
        eps, weight = norm.eps, 1.0 + norm.weight
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def layers_of(model):
    """The model's list of layers."""
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return next(layers for layers in lists if len(layers) == LAYERS)


def bias_tables(model):
    """The tables of biases by position, of all layers or of each."""
    found = (getattr(m, "relative_attention_bias", None) for m in model.modules())
    return [table for table in found if table is not None]


def runner(model):
    """Runs one of the model's layers on z [B, N, D]; `there` [B, N]: which tokens are keys."""
    rotary = next((m.rotary_emb for m in model.modules() if hasattr(m, "rotary_emb")), None)
    images = {MODELS[kind][0] for kind in OF_IMAGES}
    known = {"bert", "roberta", "distilbert", "mpnet", *ENCODERS, *images}
    causal = model.config.model_type not in known
    window = getattr(model.config, "sliding_window", None)

    def run(layer, z, there=None):
        length = z.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=z.device)
        if causal:
            seen = seen.tril()
        if window is not None:
            apart = torch.arange(length)[:, None] - torch.arange(length)
            seen = seen & (apart < window).to(z.device)
        seen = seen.expand(z.shape[0], 1, length, length)
        if there is not None:
            seen = seen & there[:, None, None]
        mask = torch.zeros(seen.shape, dtype=z.dtype, device=z.device)
        more = {}
        if rotary is not None:
            positions = torch.arange(length, device=z.device)[None]
            more["position_embeddings"] = rotary(z, positions)
        if model.config.model_type in {"t5", "mt5"}:
            attention = layers_of(model)[0].layer[0].SelfAttention
            more["position_bias"] = attention.compute_bias(length, length)
        if model.config.model_type == "mpnet":
            more["position_bias"] = model.encoder.compute_position_bias(z)
        out = layer(z, attention_mask=mask.masked_fill(~seen, -torch.inf), **more)
        return out[0] if isinstance(out, tuple) else out

    return run


def published(run, layers, gates, mixing, z, options, there=None):
    """Two whole blocks in sequence, the choice read by the host."""
    balance = 0.0
    chosen = []
    forward = options.get("forward_only", False)
    votes = there if not options.get("published") else None
    votes = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if votes is None else votes
    for t, layer in enumerate(layers):
        if t >= options.get("layers_to_use", LAYERS) or (forward and t == LAYERS - 1):
            z = run(layer, z, there)
            chosen.append(t)
            continue
        c = mixing(t)
        if forward and t == LAYERS - 2:
            j = t + 1
        else:
            logits = gates[t if len(gates) > 1 else 0](z)[votes]
            scores = torch.softmax(logits, -1)
            vote = options.get("vote", "mode")
            if vote == "mode":
                j = torch.mode(logits.argmax(-1)).values.item()
            elif vote == "mean_softmax":
                j = scores.mean(0).argmax().item()
            else:
                j = torch.sigmoid(logits).mean(0).argmax().item()
            chance = scores.mean(0)[j]
            balance = balance + logits.shape[1] * chance
            if options.get("straight_through"):
                c = (c[0], c[1] * (1 + chance - chance.detach()))
            if forward and not options.get("published"):
                j += t
        z = c[0] * run(layer, z, there) + c[1] * run(layers[j], z, there)
        chosen.append(j)
    return z, balance, chosen
