"""State dicts with the names and shapes that the authors' constructors make, tiny."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

D, WIDE, E = 8, 6, 4  # width, experts' width, experts
HEADS, TOKENS = 2, 5
RANK = 2
LAYERS = 3
SLOTS = 2
TASK = 33  # width of a description

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def _norm(name: str, width: int = D) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


GATES: dict[str, Shapes] = {
    "linear": _linear("gate", E, D),
    "xmoe": {
        **_linear("gate", E, D),
        "expert_embeddings": (E, 8),
        **_linear("inp_reduction", 8, D, bias=False),
    },
    "stable": {"expert_embeddings": (E, D)},
    "clusters": {**_linear("gate", E, D), "expert_embeddings": (E, D)},
}


def _block(prefix: str, gate: str | None) -> Shapes:
    """A layer of MomentumSMoE's `TransformerSeq`: attention, and experts or a dense layer."""
    attention = ("proj_query", "proj_out", "proj_val", "proj_key")
    shapes: Shapes = {}
    for name in attention:
        shapes |= _linear(f"{prefix}attn.{name}", D, D, bias=False)
    if gate is None:
        shapes |= _linear(f"{prefix}ff.fc1", WIDE, D) | _linear(f"{prefix}ff.fc2", D, WIDE)
    else:
        shapes |= {f"{prefix}smoe.gate.{name}": size for name, size in GATES[gate].items()}
        shapes |= {
            f"{prefix}smoe.experts.htoh4.weight": (E, WIDE, D),
            f"{prefix}smoe.experts.htoh4.bias": (E, WIDE),
            f"{prefix}smoe.experts.h4toh.weight": (E, D, WIDE),
            f"{prefix}smoe.experts.h4toh.bias": (E, D),
            **_norm(f"{prefix}smoe.layer_norm"),
        }
    for number in (1, 2, 3):
        shapes |= _norm(f"{prefix}norm{number}")
    return shapes


def language_model(gates: Iterable[str | None], start: str = "module.") -> Shapes:
    """The language models of MomentumSMoE and ACMoE, under DistributedDataParallel."""
    shapes = {f"{start}in_emb.weight": (11, D), f"{start}key_pe": (1, D // HEADS, 7)}
    shapes |= _linear(f"{start}out_emb", 11, D)
    for number, gate in enumerate(gates):
        shapes |= _block(f"{start}layers.{number}.", gate)
    return shapes


def _factors(size: int) -> tuple[int, int]:
    first = max(f for f in range(1, int(size**0.5) + 1) if size % f == 0)
    return first, size // first


def _merged(
    prefix: str, out: int, into: int, rank: int, bias: bool = False, task: bool = False
) -> Shapes:
    """A `CAMEx` or `Conv1D_CAMEx` layer; with a task's gate, the second."""
    gate = TASK // 16 if task else into
    shapes: Shapes = {
        f"{prefix}mean": (1,),
        f"{prefix}std": (1,),
        f"{prefix}w_gate": (gate, E),
        f"{prefix}w_noise": (gate, E),
        f"{prefix}res_weight": (out, into),
        f"{prefix}weight": (E, out, into),
    }
    if task:
        shapes |= _linear(f"{prefix}task_proj", gate, TASK)
    if bias:
        shapes |= {f"{prefix}bias": (E, out), f"{prefix}res_bias": (1, out)}
    if rank:
        for side, size in (("in", into), ("out", out)):
            for number, factor in enumerate(_factors(size), 1):
                shapes[f"{prefix}curve{number}_{side}"] = (rank, E, factor, factor)
    return shapes


def t5(rank: int = RANK) -> Shapes:
    """CAMEx' T5: an encoder's and a decoder's layers."""
    shapes: Shapes = {"shared.weight": (11, D)}
    for side, place in (("encoder", 1), ("decoder", 2)):
        for number in range(2):
            at = f"{side}.block.{number}.layer"
            for name in "qkvo":
                shapes |= _linear(f"{at}.0.SelfAttention.{name}", D, D, bias=False)
            shapes |= {f"{at}.0.layer_norm.weight": (D,), f"{at}.{place}.layer_norm.weight": (D,)}
            for name, out, into in (("wi", WIDE, D), ("wo", D, WIDE)):
                shapes |= _merged(f"{at}.{place}.DenseReluDense.{name}.", out, into, rank)
        shapes[f"{side}.final_layer_norm.weight"] = (D,)
    return shapes | {"lm_head.weight": (11, D)}


def gpt2(rank: int = RANK, bias: bool = False, task: bool = False) -> Shapes:
    """CAMEx' GPT-2."""
    shapes: Shapes = {"transformer.wte.weight": (11, D), "transformer.wpe.weight": (16, D)}
    for number in range(2):
        at = f"transformer.h.{number}."
        shapes |= _norm(f"{at}ln_1") | _norm(f"{at}ln_2")
        shapes |= {f"{at}attn.c_attn.weight": (D, 3 * D), f"{at}attn.c_attn.bias": (3 * D,)}
        shapes |= {f"{at}attn.c_proj.weight": (D, D), f"{at}attn.c_proj.bias": (D,)}
        shapes |= _merged(f"{at}mlp.c_fc.", WIDE, D, rank, bias, task)
        shapes |= _merged(f"{at}mlp.c_proj.", D, WIDE, rank, bias, task)
    return shapes | _norm("transformer.ln_f") | {"lm_head.weight": (11, D)}


def vision(parts: int, s: tuple[int, ...] | None = None) -> Shapes:
    """RPC-Attention's vision transformers; `s` of its scaled attention."""
    shapes: Shapes = {"cls_token": (1, 1, D), "pos_embed": (1, TOKENS, D)}
    shapes |= {"patch_embed.proj.weight": (D, 3, 2, 2), "patch_embed.proj.bias": (D,)}
    for number in range(LAYERS):
        at = f"blocks.{number}."
        shapes |= _norm(f"{at}norm1") | _norm(f"{at}norm2")
        if s is not None:
            shapes[f"{at}attn.s"] = s
        shapes |= _linear(f"{at}attn.qkv", parts * D, D) | _linear(f"{at}attn.proj", D, D)
        shapes |= _linear(f"{at}mlp.fc1", 2 * D, D) | _linear(f"{at}mlp.fc2", D, 2 * D)
    return shapes | _norm("norm") | _linear("head", 3, D)


def soft_moe(bias: bool = True) -> Shapes:
    """ACMoE's vision transformer with soft mixtures, a plain MLP in its first block."""
    start = "module."
    shapes: Shapes = {f"{start}cls_token": (1, 1, D), **_linear(f"{start}head", 3, D)}
    for number in range(LAYERS):
        at = f"{start}blocks.{number}."
        shapes |= _norm(f"{at}norm1") | _norm(f"{at}norm2")
        shapes |= _linear(f"{at}attn.qkv", 3 * D, D) | _linear(f"{at}attn.proj", D, D)
        places = [f"{at}mlp.experts.{expert}." for expert in range(E)] if number else [f"{at}mlp."]
        for place in places:
            shapes |= _linear(f"{place}fc1", WIDE, D, bias) | _linear(f"{place}fc2", D, WIDE, bias)
        if number:
            shapes |= {f"{at}mlp.phi": (D, E, SLOTS), f"{at}mlp.scale": (1,)}
    return shapes


def mixed(
    gate: str = "gate.",
    weights: str | None = None,
    rank: int = 2,
    cosine: int = 0,
    forward: bool = False,
) -> Shapes:
    """MoLEx' GPT-2: what stands before the gates' names, and before the mixing weights'."""
    shapes: Shapes = {}
    for number in range(LAYERS):
        at = f"h.{number}."
        shapes |= {f"{at}attn.bias": (1, 1, TOKENS, TOKENS)}
        shapes |= _norm(f"{at}ln_1") | _norm(f"{at}ln_2")
        linears = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D)}
        linears |= {"mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
        for name, size in linears.items():
            shapes |= {f"{at}{name}.weight": size, f"{at}{name}.bias": size[1:]}
        if rank:
            shapes |= {f"{at}attn.c_attn.lora_A": (2 * rank, D)}
            shapes |= {f"{at}attn.c_attn.lora_B": (2 * D, rank)}
    for number in range(LAYERS):
        outputs = LAYERS - number if forward else LAYERS
        if forward and outputs == 1:
            continue
        at = gate.replace("N", str(number))
        if cosine:
            shapes |= _linear(f"{at}cosine_projector", cosine, D)
            shapes |= {f"{at}sim_matrix": (cosine, outputs), f"{at}temperature": (1,)}
        else:
            shapes |= _linear(at.rstrip("."), outputs, D)
        if weights is not None:
            at = weights.replace("N", str(number))
            shapes |= {f"{at}weight_main": (1,), f"{at}weight_other": (1,)}
    shapes = {f"module.transformer.{name}": size for name, size in shapes.items()}
    shapes |= {"module.transformer.wte.weight": (11, D), "module.transformer.wpe.weight": (16, D)}
    return shapes | _norm("module.transformer.ln_f") | {"module.lm_head.decoder.weight": (11, D)}


def encoder(
    gate: str = "gate.", weights: str | None = None, rank: int = 2, cosine: int = 0
) -> Shapes:
    """MoLEx' RoBERTa: what stands before the gates' names, and before the mixing weights'."""
    shapes: Shapes = {}
    for number in range(LAYERS):
        at = f"layer.{number}."
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{at}attention.self.{name}", D, D)
            if rank and name != "key":
                shapes |= {f"{at}attention.self.{name}.lora_A": (rank, D)}
                shapes |= {f"{at}attention.self.{name}.lora_B": (D, rank)}
        shapes |= _linear(f"{at}attention.output.dense", D, D)
        shapes |= _norm(f"{at}attention.output.LayerNorm")
        shapes |= _linear(f"{at}intermediate.dense", 4 * D, D)
        shapes |= _linear(f"{at}output.dense", D, 4 * D) | _norm(f"{at}output.LayerNorm")
        at = gate.replace("N", str(number))
        if cosine:
            shapes |= _linear(f"{at}cosine_projector", cosine, D)
            shapes |= {f"{at}sim_matrix": (cosine, LAYERS), f"{at}temperature": (1,)}
        else:
            shapes |= _linear(at.rstrip("."), LAYERS, D)
        if weights is not None:
            at = weights.replace("N", str(number))
            shapes |= {f"{at}weight_main": (1,), f"{at}weight_other": (1,)}
    shapes = {f"roberta.encoder.{name}": size for name, size in shapes.items()}
    shapes |= {"roberta.embeddings.word_embeddings.weight": (11, D)}
    shapes |= _norm("roberta.embeddings.LayerNorm")
    return shapes | _linear("classifier.dense", D, D) | _linear("classifier.out_proj", 2, D)


MODELS: dict[str, tuple[str, Callable[[], Shapes], dict[str, object]]] = {
    "momentum-lm": ("momentum-lm", lambda: language_model(["linear"] * LAYERS), {}),
    "momentum-lm-glam": (
        "momentum-lm",
        lambda: language_model(["linear", None, "linear", None], ""),
        {},
    ),
    "momentum-lm-xmoe": ("momentum-lm", lambda: language_model(["xmoe", "stable"]), {}),
    "acmoe-lm": ("acmoe-lm", lambda: language_model(["linear", "stable", "clusters"]), {}),
    "acmoe-lm-linear": (
        "acmoe-lm",
        lambda: language_model(["linear", "clusters"]),
        {"cosine": False},
    ),
    "acmoe-softmoe": ("acmoe-softmoe", soft_moe, {}),
    "camex-t5": ("camex-t5", t5, {}),
    "camex-t5-flat": ("camex-t5", lambda: t5(0), {}),
    "camex-gpt2": ("camex-gpt2", gpt2, {}),
    "camex-gpt2-bias": ("camex-gpt2", lambda: gpt2(0, True), {}),
    "camex-gpt2-task": ("camex-gpt2", lambda: gpt2(task=True), {}),
    "molex-gpt2": ("molex-gpt2", mixed, {"num_heads": HEADS}),
    "molex-gpt2-each": (
        "molex-gpt2",
        lambda: mixed("h.N.gate.", "h.N.", cosine=3),
        {"num_heads": HEADS, "layers_to_use": 2},
    ),
    "molex-gpt2-raw": ("molex-gpt2", lambda: mixed(weights="", rank=0), {"num_heads": HEADS}),
    "molex-gpt2-forward": (
        "molex-gpt2",
        lambda: mixed("h.N.gate.", "h.N.", forward=True),
        {"num_heads": HEADS},
    ),
    "molex-roberta": ("molex-roberta", encoder, {"num_heads": HEADS, "dropout": 0.0}),
    "molex-roberta-learned": (
        "molex-roberta",
        lambda: encoder(weights="", rank=0),
        {"num_heads": HEADS, "dropout": 0.0},
    ),
    "molex-roberta-each": (
        "molex-roberta",
        lambda: encoder("layer.N.gate.", "layer.N.", cosine=3),
        {"num_heads": HEADS, "dropout": 0.0, "layers_to_use": 2},
    ),
    "rpc-vit": ("rpc-vit", lambda: vision(2), {"num_heads": HEADS}),
    "scaled-vit": ("scaled-vit", lambda: vision(3, (1,)), {"num_heads": HEADS}),
    "scaled-vit-matrix": ("scaled-vit", lambda: vision(3, (HEADS, TOKENS, TOKENS)), {}),
}


def make(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Drawn at unit scale and less; `mean` and `std` are what the authors' code has."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        constant = {"mean": 0.0, "std": 1.0}.get(name.rpartition(".")[2])
        if constant is None:
            state[name] = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            state[name] = torch.full(shape, constant)
    return {name: value.to(dtype) for name, value in state.items()}
