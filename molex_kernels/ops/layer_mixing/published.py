"""MoLEx' GPT-2 and RoBERTa by the names of their code: layers without transformers, and loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from molex_kernels import _check, _published

# Of the gates, by the names in the code.
_LINEAR_GATE = {"weight": "weight", "bias": "bias"}
_COSINE_GATE = {
    "cosine_projector.weight": "projection.weight",
    "cosine_projector.bias": "projection.bias",
    "sim_matrix": "directions",
    "temperature": "temperature",
}
_ADAPTED = ("q", "v")  # of the fused projection, in the order of the adapters' rows
_LISTS = {"gpt2": "h", "bert": "layer"}  # what the code calls its layers, by the kind of layer


class _Conv1D(nn.Module):
    """The parameters of GPT-2's linear layer: a weight [D, N] and a bias."""

    def __init__(self, into: int, out: int, where: Mapping[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(into, out, **where))
        self.bias = nn.Parameter(torch.empty(out, **where))


class _Attention(nn.Module):
    """What tells the width of a head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim


class GPT2Block(nn.Module):
    """The parts of transformers' layer of this name, by which a stack knows them; nothing runs."""

    def forward(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError("forward: expected a call of the stack that has these layers")


class RobertaLayer(nn.Module):
    """Likewise."""

    def forward(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError("forward: expected a call of the stack that has these layers")


def gpt2_layers(
    num_layers: int, d_model: int, width: int, num_heads: int, where: Mapping[str, Any]
) -> nn.Module:
    """A module with GPT-2's layers as far as `LayerExpertStack.from_transformers` looks at them."""
    model = nn.Module()
    model.h = nn.ModuleList()
    for _ in range(num_layers):
        layer, attention, mlp = GPT2Block(), _Attention(d_model // num_heads), nn.Module()
        attention.c_attn = _Conv1D(d_model, 3 * d_model, where)
        attention.c_proj = _Conv1D(d_model, d_model, where)
        mlp.c_fc = _Conv1D(d_model, width, where)
        mlp.c_proj = _Conv1D(width, d_model, where)
        mlp.act = nn.GELU("tanh")
        attention.resid_dropout = attention.attn_dropout = mlp.dropout = nn.Dropout(0.0)
        layer.ln_1, layer.ln_2 = (nn.LayerNorm(d_model, **where) for _ in range(2))
        layer.attn, layer.mlp = attention, mlp
        model.h.append(layer)
    return model


def roberta_layers(
    num_layers: int,
    d_model: int,
    width: int,
    num_heads: int,
    where: Mapping[str, Any],
    dropout: float = 0.0,
) -> nn.Module:
    """Likewise of RoBERTa, whose probabilities of attention are dropped out as often."""

    def output(into: int) -> nn.Module:
        part = nn.Module()
        part.dense = nn.Linear(into, d_model, **where)
        part.LayerNorm = nn.LayerNorm(d_model, **where)
        part.dropout = nn.Dropout(dropout)
        return part

    model = nn.Module()
    model.layer = nn.ModuleList()
    for _ in range(num_layers):
        layer, attention, projections = RobertaLayer(), nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            projections.add_module(name, nn.Linear(d_model, d_model, **where))
        projections.attention_head_size = d_model // num_heads  # type: ignore[assignment]
        projections.dropout = nn.Dropout(dropout)
        attention.add_module("self", projections)
        attention.output = output(d_model)
        layer.attention, layer.intermediate, layer.output = attention, nn.Module(), output(width)
        layer.intermediate.dense = nn.Linear(d_model, width, **where)
        layer.intermediate.intermediate_act_fn = nn.GELU()
        model.layer.append(layer)
    return model


@torch.no_grad()
def load(stack: Any, held: Any, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Copies into a stack and its tensors `held`; checks everything before."""
    layout = stack.facts.layout
    if layout.name not in _LISTS:
        raise ValueError(
            "load_published: expected a stack of GPT-2's or RoBERTa's layers, which is what the "
            f"published names are of, got {layout.name}"
        )
    state_dict = _published.entries(state_dict, prefix)
    first = f"{_LISTS[layout.name]}.0.{layout.norm1}.weight"
    start = _published.start_of(state_dict, first, prefix)
    pairs = []
    for name, targets in _targets(stack, held):
        value = state_dict.get(start + name)
        if value is None:
            raise ValueError(f"state_dict: expected a name {start + name!r}, got none")
        _check.trailing(start + name, value, "...", least=0)
        shape = [sum(len(t) for t in targets), *targets[0].shape[1:]]
        if list(value.shape) != shape:
            raise ValueError(f"{start + name}: expected shape {shape}, got {list(value.shape)}")
        pairs.append((start + name, targets))
    read = {name for name, _ in pairs}
    marks = ("lora_A", "lora_B", "weight_main", "weight_other")
    beside = [k for k in state_dict if k.startswith(start) and k.endswith(marks) and k not in read]
    if beside:
        raise ValueError(
            f"state_dict: expected the weights of LayerExpertStack({stack.extra_repr()}), which "
            f"has no place for {_published.listed(beside)}"
        )
    for name, targets in pairs:
        parts = state_dict[name].split([len(t) for t in targets])
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)
    if isinstance(state_dict, _published.Tracked):
        state_dict.read.update(read)


def _targets(stack: Any, held: Any) -> Iterator[tuple[str, list[Tensor]]]:
    """Each published name, with what its rows are copied into, one after the other."""
    layout = stack.facts.layout
    paths = {**layout.linears, "norm1": layout.norm1, "norm2": layout.norm2}
    layers = _LISTS[layout.name]
    for t in range(stack.num_layers):
        for own, path in paths.items():
            yield f"{layers}.{t}.{path}.weight", [held.weights[own][t]]
            yield f"{layers}.{t}.{path}.bias", [held.biases[own][t]]
        if "qkv" not in layout.linears:
            for own in held.lora_a:
                path = f"{layers}.{t}.{layout.linears[own]}"
                yield f"{path}.lora_A", [held.lora_a[own][t]]
                yield f"{path}.lora_B", [held.lora_b[own][t]]
        elif held.lora_a:
            path = f"{layers}.{t}.{layout.linears['qkv']}"
            yield f"{path}.lora_A", [held.lora_a[own][t] for own in _ADAPTED]
            yield f"{path}.lora_B", [held.lora_b[own][t] for own in _ADAPTED]
    for t, gate in enumerate(stack.gates):
        where = f"{layers}.{t}.gate" if stack.individual_gates else "gate"
        names = _LINEAR_GATE if isinstance(gate, nn.Linear) else _COSINE_GATE
        for name, own in names.items():
            yield f"{where}.{name}", [gate.get_parameter(own)]
    if isinstance(stack.mixing, nn.Parameter):
        each = len(stack.mixing) > 1
        # The last layer of the forward variant is not mixed.
        for t in range(len(stack.mixing) - (each and stack.forward_only)):
            where = f"{layers}.{t}." if each else ""
            yield f"{where}weight_main", [stack.mixing[t, :1]]
            yield f"{where}weight_other", [stack.mixing[t, 1:]]
