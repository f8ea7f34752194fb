"""Takes the layers of a transformers model apart, by the names of their parts.

Nothing of transformers or peft is imported: a layer is known by its attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where a kind of layer keeps its parts, as attribute paths."""

    name: str
    linears: dict[str, str]
    norm1: str
    norm2: str
    activation: str
    hidden_dropouts: tuple[str, ...]
    attention_dropout: str
    heads: str
    pre_norm: bool
    causal: bool = False
    transposed: bool = False  # weights [D, N], as GPT-2's Conv1D has them


@dataclass(frozen=True)
class Facts:
    """What all layers of a stack have in common."""

    layout: Layout
    heads: int
    scaling: float
    eps: float
    activation: Callable[[Tensor], Tensor]
    hidden_dropout: float
    attention_dropout: float


_BERT_ATTENTION = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_OLD_VIT_ATTENTION = {
    **_BERT_ATTENTION,
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
}
LAYOUTS = (
    Layout(
        name="gpt2",
        linears={
            "qkv": "attn.c_attn",
            "out": "attn.c_proj",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        norm1="ln_1",
        norm2="ln_2",
        activation="mlp.act",
        hidden_dropouts=("attn.resid_dropout", "mlp.dropout"),
        attention_dropout="attn.attn_dropout",
        heads="attn.num_heads",
        pre_norm=True,
        causal=True,
        transposed=True,
    ),
    Layout(
        name="bert",
        linears=_BERT_ATTENTION,
        norm1="attention.output.LayerNorm",
        norm2="output.LayerNorm",
        activation="intermediate.intermediate_act_fn",
        hidden_dropouts=("attention.output.dropout", "output.dropout"),
        attention_dropout="attention.self.dropout",
        heads="attention.self.num_attention_heads",
        pre_norm=False,
    ),
    Layout(
        name="vit",
        linears={
            "q": "attention.q_proj",
            "k": "attention.k_proj",
            "v": "attention.v_proj",
            "out": "attention.o_proj",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
        norm1="layernorm_before",
        norm2="layernorm_after",
        activation="mlp.activation_fn",
        hidden_dropouts=("dropout",),
        attention_dropout="attention.attention_dropout",
        heads="attention.num_attention_heads",
        pre_norm=True,
    ),
    Layout(
        name="vit",
        linears=_OLD_VIT_ATTENTION,
        norm1="layernorm_before",
        norm2="layernorm_after",
        activation="intermediate.intermediate_act_fn",
        hidden_dropouts=("attention.output.dropout", "output.dropout"),
        attention_dropout="attention.attention.dropout_prob",
        heads="attention.attention.num_attention_heads",
        pre_norm=True,
    ),
)


def layers_of(model: nn.Module) -> tuple[Layout, list[nn.Module]]:
    """The one list of layers in the model that has a known layout, and that layout."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        for layout in LAYOUTS:
            if all(_has(layer, path) for layer in module for path in _paths(layout)):
                return layout, list(module)
    raise ValueError(
        "model: expected layers as in transformers' GPT-2, BERT, RoBERTa or ViT, "
        f"got {type(model).__name__}"
    )


def facts_of(layout: Layout, layers: Sequence[nn.Module]) -> Facts:
    """What the layers have in common; ValueError where they differ or do more than is known."""
    found = [_facts(layout, layer) for layer in layers]
    for number, facts in enumerate(found):
        if facts[:-1] != found[0][:-1]:
            raise ValueError(f"model: expected layers that are alike, layer {number} differs")
    heads, scaling, eps, hidden, attention, activation = found[0]
    return Facts(layout, heads, scaling, eps, activation, hidden, attention)


def linear_parts(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, under PEFT's adapters too."""
    base = getattr(linear, "base_layer", linear)
    return base.weight, base.bias


def adapter_parts(linear: Any) -> tuple[Tensor, Tensor, float, float] | None:
    """PEFT's (A [r, D], B [N, r], scaling, dropout) of a linear layer's one active adapter."""
    if not hasattr(linear, "lora_A"):
        return None
    active = list(linear.active_adapters)
    if len(active) != 1 or active[0] not in linear.lora_A:
        raise ValueError(f"model: expected one active LoRA adapter to a layer, got {active}")
    name = active[0]
    if getattr(linear, "use_dora", {}).get(name) or linear.merged:
        raise ValueError("model: expected LoRA adapters that are not merged and not DoRA")
    if linear.lora_B[name].bias is not None:
        raise ValueError("model: expected LoRA adapters without a bias")
    dropout = getattr(linear.lora_dropout[name], "p", 0.0)
    return linear.lora_A[name].weight, linear.lora_B[name].weight, linear.scaling[name], dropout


def part(layer: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    found: Any = layer
    for name in path.split("."):
        found = getattr(found, name)
    return found


def stacked(parameters: Sequence[Tensor], name: str) -> Tensor:
    """One tensor [L, ...] that holds all of them; they become views of it, without a copy kept."""
    first = parameters[0]
    for layer, one in enumerate(parameters):
        if one.shape != first.shape or one.dtype != first.dtype or one.device != first.device:
            raise ValueError(
                f"model: expected {name} of layer {layer} like layer 0's, {list(first.shape)} "
                f"{first.dtype}, got {list(one.shape)} {one.dtype}"
            )
    stack = first.new_empty(len(parameters), *first.shape)
    with torch.no_grad():
        for row, one in zip(stack, parameters, strict=True):
            row.copy_(one)
            one.data = row
    return stack


def _facts(layout: Layout, layer: nn.Module) -> tuple[Any, ...]:
    heads = part(layer, layout.heads)
    attention = part(layer, layout.heads.rpartition(".")[0])
    for name in ("crossattention", "is_decoder", "scale_attn_by_inverse_layer_idx", "molex_rpc"):
        if getattr(layer, name, False) or getattr(attention, name, False):
            raise ValueError(f"model: expected layers without {name}")
    weight, _ = linear_parts(part(layer, layout.linears["out"]))
    width = weight.shape[0] if layout.transposed else weight.shape[1]
    scaling = getattr(attention, "scaling", (width // heads) ** -0.5)
    dropouts = {float(part(layer, path).p) for path in layout.hidden_dropouts}
    if len(dropouts) > 1:
        raise ValueError(f"model: expected one hidden dropout, got {sorted(dropouts)}")
    attention_dropout = part(layer, layout.attention_dropout)
    eps = {part(layer, path).eps for path in (layout.norm1, layout.norm2)}
    if len(eps) > 1:
        raise ValueError(f"model: expected one eps for both norms, got {sorted(eps)}")
    return (
        heads,
        scaling,
        eps.pop(),
        dropouts.pop(),
        float(getattr(attention_dropout, "p", attention_dropout)),
        part(layer, layout.activation),
    )


def _paths(layout: Layout) -> tuple[str, ...]:
    return (
        *layout.linears.values(),
        *(layout.norm1, layout.norm2, layout.activation, layout.attention_dropout, layout.heads),
        *layout.hidden_dropouts,
    )


def _has(layer: nn.Module, path: str) -> bool:
    try:
        part(layer, path)
    except AttributeError:
        return False
    return True
