"""Takes the layers of a transformers model apart, by the names of their parts.

Nothing of transformers or peft is imported: a layer is known by its attributes and its class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from molex_kernels.ops.layer_mixing.layout import LAYOUTS, UNFIT, Layout, PositionBias

# What a layer or its attention may do beside the known, by the attribute that says so.
_MORE = {
    "crossattention": "cross attention",
    "is_cross_attention": "cross attention",
    "is_decoder": "is_decoder",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "molex_rpc": "RPC attention, which was installed in them",
    "attn_logit_softcapping": "a soft cap on its scores (attn_logit_softcapping)",
}


class Norm(NamedTuple):
    """How a layer's norms compute: standard(x) (offset + weight) + bias.

    Attributes:
        eps: what is added to the variance, or to the mean square.
        is_rms: whether x is divided by its root mean square, its mean staying in.
        offset: of the weight.
    """

    eps: float
    is_rms: bool
    offset: float


@dataclass(frozen=True)
class Facts:
    """What all layers of a stack have in common.

    Its names are the layout's; `buckets` is of a bias by positions, their number and the largest
    distance, None where there is no such bias.
    """

    layout: Layout
    norms: dict[str, str]
    norm: Norm
    pre_norm: bool
    parallel: bool
    heads: int
    key_heads: int
    head_width: int
    scaling: float
    window: int | None
    out_dropout: float
    down_dropout: float
    up_dropout: float
    attention_dropout: float
    residual_scale: float
    buckets: tuple[int, int] | None
    activation: Callable[[Tensor], Tensor] = field(compare=False)


class Found(NamedTuple):
    """A model's layers.

    Attributes:
        layout: their kind.
        layers: all of them, at least one.
        rotary: the module that makes cos and sin of positions; None where nothing is rotated.
        tables: of the bias by positions, one for all layers, or each layer's; none without it.
    """

    layout: Layout
    layers: nn.ModuleList
    rotary: nn.Module | None
    tables: tuple[nn.Embedding, ...]


def layers_of(model: nn.Module) -> Found:
    """The one list of layers in the model that has a known layout."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    parents: dict[nn.Module, nn.Module | None] = {model: None}
    for parent in model.modules():
        parents.update((child, parent) for child in parent.children())
    for module, owner in parents.items():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        for path, expected in UNFIT.items():
            if all(_has(layer, path) for layer in module):
                raise ValueError(f"model: expected {expected}, got {type(module[0]).__name__}")
        fitting = [
            layout
            for layout in LAYOUTS
            if all(_has(layer, path) for layer in module for path in layout.paths())
        ]
        if not fitting:
            continue
        known = (layout for layout in fitting if _runs(module[0]) in layout.classes)
        layout = next(known, fitting[0])
        rotary = getattr(owner, "rotary_emb", None)
        if layout.rotary and not isinstance(rotary, nn.Module):
            raise ValueError(
                "model: expected one whose layers stand beside the module rotary_emb, "
                f"got {type(model).__name__}"
            )
        tables = (
            () if layout.position_bias is None else _tables(layout.position_bias, module, owner)
        )
        return Found(layout, module, rotary if layout.rotary else None, tables)
    raise ValueError(
        "model: expected layers as in transformers' GPT-2, BERT, RoBERTa, DistilBERT, MPNet, T5, "
        "ViT, CLIP, SigLIP, OPT, GPT-NeoX, StarCoder2, StableLM, Granite, Llama, Mistral, Qwen2, "
        f"Qwen3 or Gemma, got {type(model).__name__}"
    )


def facts_of(model: Found) -> Facts:
    """What the layers have in common; ValueError where they differ or do more than is known."""
    layers = list(model.layers)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError("model: expected layers with parameters of their own, got shared ones")
    tables = [id(table.weight) for table in model.tables]
    found = [_facts(model.layout, layer, tables) for layer in layers]
    for number, facts in enumerate(found):
        if facts.window != found[0].window:
            raise ValueError(
                "model: expected layers that all have the same sliding window, or none, got "
                f"{found[0].window} in layer 0 and {facts.window} in layer {number}"
            )
        same = type(facts.activation) is type(found[0].activation)
        if facts != found[0] or not same:
            raise ValueError(f"model: expected layers that are alike, layer {number} differs")
    facts = found[0]
    for table in model.tables:
        assert facts.buckets is not None
        if table.num_embeddings < facts.buckets[0] or table.embedding_dim != facts.heads:
            raise ValueError(
                f"model: expected a table of the positions' bias with {facts.buckets[0]} buckets "
                f"and {facts.heads} heads, got {list(table.weight.shape)}"
            )
    return facts


def linears_of(layout: Layout, layers: Sequence[nn.Module]) -> list[tuple[str, Any]]:
    """The linear layers of all layers, each with its path."""
    paths = layout.linears.values()
    return [(path, part(layer, path)) for layer in layers for path in paths]


def linear_parts(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, under PEFT's adapters too."""
    base = getattr(linear, "base_layer", linear)
    return base.weight, base.bias


def adapter_parts(linear: Any) -> tuple[Tensor, Tensor, float, float] | None:
    """PEFT's (A [r, D], B [N, r], scaling, dropout) of a linear layer's one active adapter.

    None where there is no adapter, or while adapters are switched off (PEFT's disable_adapter).
    """
    if not hasattr(linear, "lora_A"):
        if hasattr(linear, "base_layer"):
            raise ValueError(f"model: expected no adapters but LoRA's, got {type(linear).__name__}")
        return None
    if linear.disable_adapters and not linear.merged:
        return None
    active = list(linear.active_adapters)
    if len(active) != 1 or active[0] not in linear.lora_A:
        raise ValueError(f"model: expected one active LoRA adapter to a layer, got {active}")
    name = active[0]
    has_variant = name in getattr(linear, "lora_variant", {})
    if getattr(linear, "use_dora", {}).get(name) or has_variant or linear.merged:
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


def check_alike(parameters: Sequence[Tensor | None], name: str) -> None:
    """ValueError where a layer's parameter is not of the shape, dtype and device of the first's."""
    first = parameters[0]
    for layer, one in enumerate(parameters):
        if (one is None) != (first is None):
            raise ValueError(f"model: expected {name} in every layer or in none, not so in {layer}")
        if one is None or first is None:
            continue
        if one.shape != first.shape or one.dtype != first.dtype or one.device != first.device:
            raise ValueError(
                f"model: expected {name} of layer {layer} like layer 0's, {list(first.shape)} "
                f"{first.dtype}, got {list(one.shape)} {one.dtype}"
            )


def stacked(parameters: Sequence[Tensor], name: str) -> Tensor:
    """One tensor [L, ...] that holds all of them; they become views of it, without a copy kept."""
    check_alike(parameters, name)
    first = parameters[0]
    stack = first.new_empty(len(parameters), *first.shape)
    with torch.no_grad():
        for row, one in zip(stack, parameters, strict=True):
            row.copy_(one)
            one.data = row
    return stack


def _tables(
    bias: PositionBias, layers: nn.ModuleList, owner: nn.Module | None
) -> tuple[nn.Embedding, ...]:
    holders = {"first": (layers[0],), "each": tuple(layers), "model": (owner,)}[bias.holder]
    tables = []
    for holder in holders:
        table = (
            part(holder, bias.table) if holder is not None and _has(holder, bias.table) else None
        )
        if not isinstance(table, nn.Embedding):
            raise ValueError(
                f"model: expected an embedding {bias.table} for the positions' bias, got "
                f"{type(table).__name__}"
            )
        tables.append(table)
    return tuple(tables)


def _runs(layer: nn.Module) -> str:
    """The class whose forward the layer runs."""
    return type(layer).forward.__qualname__.split(".")[0]


def _facts(layout: Layout, layer: nn.Module, tables: Sequence[int]) -> Facts:
    attention = part(layer, layout.head_width.rpartition(".")[0])
    for name, what in _MORE.items():
        if getattr(layer, name, None) or getattr(attention, name, None):
            raise ValueError(f"model: expected layers without {what}, got {type(layer).__name__}")
    norms = {name: path for name, path in layout.norms().items() if _has(layer, path)}
    _account(layout, norms, layer, tables)
    runs = _runs(layer)
    if runs not in layout.classes:
        raise ValueError(
            f"model: expected layers of {', '.join(layout.classes)}, got {runs}, which has the "
            "same parts and is not known to do the same with them"
        )
    kinds = {_norm(path, part(layer, path)) for path in norms.values()}
    if len(kinds) > 1:
        raise ValueError(f"model: expected norms that are alike in a layer, got {sorted(kinds)}")
    width = int(part(layer, layout.head_width))
    rows = {}
    for name in ("q", "k"):
        weight, _ = linear_parts(
            part(layer, layout.linears.get(name, layout.linears.get("qkv", "")))
        )
        rows[name] = weight.shape[1 if layout.transposed else 0]
        rows[name] //= 1 if name in layout.linears else 3
    config = getattr(attention, "config", None)
    if (model_type := getattr(config, "model_type", None)) in layout.refused:
        raise ValueError(
            f"model: expected {runs} of a model that says in its layers which tokens they attend "
            f"to, got {model_type}, whose layers are causal by their masks alone"
        )
    return Facts(
        layout,
        norms,
        kinds.pop(),
        pre_norm=_flag(layer, layout.pre_norm),
        parallel=_flag(layer, layout.parallel),
        heads=rows["q"] // width,
        key_heads=rows["k"] // width,
        head_width=width,
        scaling=getattr(attention, "scaling", layout.default_scaling or width**-0.5),
        # Qwen says it in each attention, Mistral once.
        window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)),
        out_dropout=_dropout(layer, layout.out_dropout),
        down_dropout=_dropout(layer, layout.down_dropout),
        up_dropout=_dropout(layer, layout.up_dropout),
        attention_dropout=_dropout(layer, layout.attention_dropout),
        residual_scale=float(part(layer, layout.residual_scale)) if layout.residual_scale else 1.0,
        buckets=_buckets(layer, layout.position_bias),
        activation=part(layer, layout.activation),
    )


def _account(
    layout: Layout, norms: dict[str, str], layer: nn.Module, tables: Sequence[int]
) -> None:
    """Every parameter of the layer is one that the block computes with."""
    known = set(tables)
    known |= {id(p) for path in norms.values() for p in part(layer, path).parameters(recurse=False)}
    for path in layout.linears.values():
        linear = part(layer, path)
        weight, bias = linear_parts(linear)
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"model: expected {path} with a floating weight of two dimensions, got "
                f"{list(weight.shape)} {weight.dtype}"
            )
        known |= {id(weight), id(bias)}
        adapter_parts(linear)  # refuses what it does not know
        if hasattr(linear, "lora_A"):  # whose own are the active adapter and idle ones
            known |= {id(p) for p in linear.parameters()} - {
                id(p) for p in linear.base_layer.parameters()
            }
    unknown = [name for name, p in layer.named_parameters() if id(p) not in known]
    if unknown:
        raise ValueError(
            f"model: expected layers as {layout.name}'s, got {type(layer).__name__} with more "
            f"parameters than are known: {', '.join(unknown)}"
        )


@torch.no_grad()
def _norm(path: str, norm: Any) -> Norm:
    """Which norm it is: others than LayerNorm are tried, on a weight that is not the model's."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        raise ValueError(f"model: expected {path} with a weight, got {type(norm).__name__}")
    if isinstance(norm, nn.LayerNorm):
        return Norm(norm.eps, is_rms=False, offset=0.0)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    why = f"got {type(norm).__name__}"
    if isinstance(eps, float) and [name for name, _ in norm.named_parameters()] == ["weight"]:
        device = "cpu" if weight.is_meta else weight.device
        drawn = torch.linspace(-1.0, 2.0, weight.shape[0], device=device)
        x = torch.stack((drawn.cos() + 0.5, (3 * drawn).sin()))
        try:
            got = functional_call(norm, {"weight": drawn}, (x,))
        except Exception as error:
            why = f"{why}, which fails: {error}"
        else:
            for offset in (0.0, 1.0):
                want = F.rms_norm(x, (len(drawn),), eps=eps) * (offset + drawn)
                if got.shape == want.shape and torch.allclose(got, want, atol=1e-5):
                    return Norm(eps, is_rms=True, offset=offset)
    raise ValueError(f"model: expected {path} to be a LayerNorm or an RMSNorm, {why}")


def _flag(layer: nn.Module, value: bool | str) -> bool:
    return bool(part(layer, value)) if isinstance(value, str) else value


def _buckets(layer: nn.Module, bias: PositionBias | None) -> tuple[int, int] | None:
    if bias is None:
        return None
    said = (bias.num_buckets, bias.max_distance)
    number, distance = (part(layer, each) if isinstance(each, str) else each for each in said)
    return int(number), int(distance)


def _dropout(layer: nn.Module, path: str) -> float:
    found = part(layer, path) if path else 0.0
    return float(getattr(found, "p", found))


def _has(layer: nn.Module, path: str) -> bool:
    try:
        return part(layer, path) is not None
    except AttributeError:
        return False
