"""Which method goes into which family of transformers' models, tried on tiny ones.

    python tests/model_table.py          # writes docs/models.md
    python tests/model_table.py mixtral  # prints the row of a family

A model has two layers, no weights but random ones, and is computed in fp64. "exact": with the
method switched off, outputs and all gradients are the model's own to 1e-6 of the largest, with it
on they are finite, and `uninstall` gives the model back. "works": the same, of a method that has no
off switch. "refused": an error says why. "-": there are no experts.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import molex_kernels as mk
from molex_kernels.integrations import transformers as ours

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TOLERANCE = 1e-6  # some attentions have their softmax in fp32
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 16,
    "patch_size": 4,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_key_value_heads": 4,
}
_T5 = {"d_kv": 8, "d_ff": 64}
# What a family needs beside these, by transformers' name of it.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {},
    "flex_olmo": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3_moe": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gpt_oss": {},
    "granitemoe": {},
    "phimoe": {},
    "minimax": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "glm4_moe": {"first_k_dense_replace": 0},
    "hunyuan_v1_moe": {},
    "jetmoe": {},
    "llama4_text": {},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "cohere": {},
    "granite": {},
    "olmo2": {},
    "stablelm": {},
    "starcoder2": {},
    "smollm3": {},
    "helium": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "bloom": {},
    "bert": {},
    "roberta": {},
    "camembert": {},
    "xlm-roberta": {},
    "electra": {"embedding_size": 32},
    "distilbert": {"hidden_dim": 64},
    "albert": {"embedding_size": 16},
    "modernbert": {},
    "deberta": {},
    "deberta-v2": {},
    "mpnet": {},
    "esm": {"position_embedding_type": "rotary"},
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "vit": {},
    "deit": {},
    "ijepa": {},
    "dinov2": {},
    "beit": {},
    "clip_vision_model": {},
    "siglip_vision_model": {},
}


_PAGE = """# Model families

What goes into transformers {version}, by `make test-models`, which builds a tiny model of each
family with random weights and tries every function of [Integrations](integrations.md) on all of
its layers, in fp64. **exact**: with the method switched off, outputs and gradients are the model's
own; with it on, they are finite; `uninstall` gives the model back. **works**: the same, of a method
without an off switch. **refused**: an error says why, below. **-**: there are no experts.

{count}

{head}
{lines}

## Why refused

{reasons}
"""


class Result(NamedTuple):
    """What a method does in a family, and why not where it does not."""

    word: str
    reason: str = ""


def make(family: str) -> Any:
    """The family's tiny model, the same each time."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family]})
    model: Any = AutoModel.from_config(config).double().eval()
    if _with_experts(model):  # PyTorch's grouped products, the default, take no fp64
        with contextlib.suppress(ValueError):
            model.set_experts_implementation("eager")
    with torch.no_grad():  # biases and the like start at 0, where what multiplies them hides
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def inputs(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
        return {"pixel_values": images}
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    given: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    if hasattr(model.config, "use_cache"):
        given["use_cache"] = False
    return given


def computed(model: Any) -> dict[str, Tensor]:
    """The last hidden state, and the gradient of every parameter that has one."""
    model.zero_grad()
    out = model(**inputs(model)).last_hidden_state
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    (out * weight).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"": out.detach(), **gradients}


def _check(found: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    lacking = sorted(n for n in want.keys() - found.keys() if want[n].any())
    assert not lacking, f"{what}: no gradient of {lacking[0]}"
    for name, expected in want.items():
        if name in found:
            error = (found[name] - expected).abs().max() / max(expected.abs().max(), 1e-3)
            assert error <= TOLERANCE, f"{what}: {name or 'the output'} is off by {error:.1e}"


def _tried(
    family: str, off: Callable[[nn.Module], Any] | None, on: Callable[[nn.Module], Any]
) -> Result:
    model = make(family)
    plain = computed(model)
    for install in filter(None, (off, on)):
        try:
            install(model)
            found = computed(model)
        except (ValueError, TypeError, NotImplementedError) as error:
            return Result("refused", re.sub(r"\s+", " ", str(error)))
        if install is off:
            _check(found, plain, "off")
        assert all(t.isfinite().all() for t in found.values()), "on: not finite"
        ours.uninstall(model)
    if on is not _experts:
        _check(computed(model), plain, "uninstalled")
    return Result("exact" if off else "works")


def _experts(model: Any) -> None:
    ours.install_experts()
    model.set_experts_implementation("molex")


def experts(family: str) -> Result:
    if not _with_experts(make(family)):
        return Result("-")
    return _tried(family, _experts, _experts)


def acmoe(family: str) -> Result:
    if not _with_experts(make(family)):
        return Result("-")
    return _tried(family, None, ours.install_ac_router)


def momentum(family: str) -> Result:
    if not _with_experts(make(family)):
        return Result("-")
    return _tried(
        family,
        lambda model: ours.install_momentum(model, mk.HeavyBall(mu=0.0)),
        lambda model: ours.install_momentum(model, mk.HeavyBall(mu=0.7)),
    )


def camex(family: str) -> Result:
    if not _with_experts(make(family)):
        return Result("-")
    return _tried(
        family,
        lambda model: ours.install_merged_experts(model, enabled=False),
        lambda model: ours.install_merged_experts(model, segment=3),
    )


def robust(family: str) -> Result:
    return _tried(
        family,
        lambda model: ours.install_rpc_attention(model, layers=None, robust=False),
        lambda model: ours.install_rpc_attention(model, layers=None),
    )


def layers(family: str) -> Result:
    return _tried(
        family,
        lambda model: ours.install_layer_experts(model, layers_to_use=0, freeze=False),
        lambda model: ours.install_layer_experts(model, freeze=False),
    )


METHODS: dict[str, Callable[[str], Result]] = {
    "experts as one op": experts,
    "ACMoE": acmoe,
    "MomentumSMoE": momentum,
    "CAMEx": camex,
    "RPC-Attention": robust,
    "MoLEx": layers,
}


def _with_experts(model: nn.Module) -> bool:
    return any("experts" in name.split(".") for name, _ in model.named_modules())


def row(family: str) -> list[Result]:
    """A family's results, in the order of METHODS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [method(family) for method in METHODS.values()]


def line(family: str, found: list[Result]) -> str:
    """A family's row of the table."""
    return f"| {family} | " + " | ".join(result.word for result in found) + " |"


def page(rows: dict[str, list[Result]]) -> str:
    import transformers

    words = [result.word for found in rows.values() for result in found]
    counts = ", ".join(f"{words.count(w)} {w}" for w in ("exact", "works", "refused"))
    reasons: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for family, found in rows.items():
        for method, result in zip(METHODS, found, strict=True):
            if result.reason:
                expected, _, got = result.reason.partition(", got ")
                reasons.setdefault((method, expected), []).append((family, got))
    return _PAGE.format(
        version=transformers.__version__,
        count=f"{len(rows)} families: {counts}.",
        head="| family | " + " | ".join(METHODS) + " |\n" + "|---" * (len(METHODS) + 1) + "|",
        lines="\n".join(line(family, found) for family, found in rows.items()),
        reasons="\n".join(_reason(*key, families) for key, families in reasons.items()),
    )


def _reason(method: str, expected: str, families: list[tuple[str, str]]) -> str:
    """One expectation, and which families have what in its place."""
    if len(families) == 1:
        family, got = families[0]
        return f"- {method}, {family}: {expected}" + (f", got {got}" if got else "")
    return f"- {method}, {', '.join(family for family, _ in families)}: {expected}"


def main() -> None:
    logging.disable(logging.WARNING)
    if names := sys.argv[1:]:
        for name in names:
            found = row(name)
            print(line(name, found), *(r.reason for r in found if r.reason), sep="\n  ")
        return
    rows = {}
    for family in FAMILIES:
        rows[family] = row(family)
        print(line(family, rows[family]), file=sys.stderr, flush=True)
    PAGE.write_text(page(rows))


def third(commit: str) -> list[str]:
    """The families whose turn it is at a commit."""
    turn = int(commit[:8] or "0", 16) % 3
    return [family for place, family in enumerate(FAMILIES) if place % 3 == turn]


if __name__ == "__main__":
    main()
