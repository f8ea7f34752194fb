"""Whole checkpoints of the five papers' models, by the names that the authors' code gives them.

`load` finds the layers that this package has modules for and loads them; what is plain PyTorch
(embeddings, attention of the language models, norms, heads) stays with the caller, by name. What a
shape does not tell is an option, whose default is what the authors' scripts have. The names of each
kind stand in `docs/published.md`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from molex_kernels import _check, _published
from molex_kernels.ops.layer_mixing.module import LayerExpertStack
from molex_kernels.ops.layer_mixing.published import gpt2_layers, roberta_layers
from molex_kernels.ops.merging.module import CAMExMLP
from molex_kernels.ops.momentum.module import MomentumMoE
from molex_kernels.ops.momentum.types import HeavyBall
from molex_kernels.ops.routing.module import ACRouter, CosineRouter, TopKRouter
from molex_kernels.ops.rpc_attention.module import RPCAttention, ScaledAttention
from molex_kernels.ops.soft_moe.module import SoftMoE

__all__ = ["Published", "kinds", "load"]


class Published(NamedTuple):
    """What `load` found.

    Attributes:
        layers: the modules by the prefix of their names in the checkpoint, in the model's order.
        unused: the names that no module took, in the checkpoint's order.
    """

    layers: dict[str, nn.Module]
    unused: list[str]


class _Layer(NamedTuple):
    """A layer of a checkpoint, while its module is made."""

    number: int
    prefix: str
    names: set[str]  # behind the prefix
    sizes: dict[str, int]
    options: dict[str, Any]

    def where(self) -> dict[str, Any]:
        """The options that every module takes."""
        return {name: self.options[name] for name in _COMMON}

    def some(self, *names: str) -> dict[str, Any]:
        """These options, and those that every module takes."""
        return {name: self.options[name] for name in names} | self.where()


class _Gate(NamedTuple):
    """A gate of the language models' code, with the names behind `smoe.gate.`.

    Attributes:
        names: all of them.
        make: makes the router.
        idle: names that its code never reads.
    """

    names: frozenset[str]
    make: Callable[[_Layer], nn.Module]
    idle: Callable[[_Layer], Collection[str]] = lambda layer: ()


class _Kind(NamedTuple):
    """A published model.

    Attributes:
        layer: what the names of a layer look like, its prefix in group 1.
        owned: the names behind the prefix whose place the module takes start with one of these.
        sizes: letters for the shape of a name behind the prefix, "|" between shapes; behind "?" the
            name may be missing, and letters that nothing else gives are 0.
        make: makes the module.
        options: what shapes do not tell, with defaults.
        gates: of expert layers.
        loading: arguments of the module's `load_published`.
        idle: owned names that the published code never reads.
    """

    layer: str
    owned: tuple[str, ...]
    sizes: Mapping[str, str]
    make: Callable[[_Layer], nn.Module]
    options: Mapping[str, Any]
    gates: tuple[_Gate, ...] = ()
    loading: Mapping[str, Any] = {}
    idle: Callable[[_Layer], Collection[str]] = lambda layer: ()


_COMMON: dict[str, Any] = {"impl": None, "device": None, "dtype": None}
# Heads of the published models by their width.
_HEADS = {192: 3, 348: 6, 768: 12, 1024: 16, 1280: 20}
_AC_OPTIONS = {
    **dict.fromkeys(("stat", "eps", "clip", "norm", "process_group")),
    "cosine": True,
    "mix": False,
    "recipe": "lm",
    "empty": "published",
}


def _per_layer(layer: _Layer, name: str) -> Any:
    """An option of this layer: its own of a list."""
    value = layer.options[name]
    return value[layer.number] if isinstance(value, list) else value


def _experts(layer: _Layer) -> MomentumMoE:
    sizes, options = layer.sizes, layer.options
    return MomentumMoE(
        *(sizes["D"], sizes["I"], sizes["E"], options["top_k"]),
        _per_layer(layer, "rule"),
        **layer.some("dropout", "sign"),
    )


def _clustered(layer: _Layer) -> MomentumMoE:
    # Without momentum, and the experts' output added.
    options = {**layer.options, "rule": HeavyBall(0.0), "sign": -1}
    return _experts(layer._replace(options=options))


def _soft(layer: _Layer) -> SoftMoE:
    sizes = layer.sizes
    return SoftMoE(
        *(sizes["D"], sizes["I"], sizes["E"], sizes["P"]),
        bias="experts.0.fc1.bias" in layer.names,
        normalize="scale" in layer.names,
        **layer.some(*(name for name in layer.options if name not in _COMMON)),
    )


def _merged(layer: _Layer) -> CAMExMLP:
    sizes = layer.sizes
    options = layer.some(*(name for name in layer.options if name not in _COMMON))
    if sizes["t"]:  # the task's gate, which has no segments
        options |= {"task_dim": sizes["t"], "task_reduced": sizes["g"], "segment": None}
    return CAMExMLP(
        *(sizes["D"], sizes["I"], sizes["E"]),
        rank=sizes["r"],
        bias="c_fc.bias" in layer.names,
        **options,
    )


def _heads(layer: _Layer) -> int:
    given, width = layer.options["num_heads"], layer.sizes["C"]
    if given is None and "H" in layer.sizes:
        return layer.sizes["H"]
    if given is None and width not in _HEADS:
        raise ValueError(
            f"num_heads: expected a number, which no shape tells (known are the widths "
            f"{list(_HEADS)}), got None and a width of {width}"
        )
    return _HEADS[width] if given is None else given


def _robust(layer: _Layer) -> RPCAttention:
    layers = layer.options["layers"]
    return RPCAttention(
        layer.sizes["C"],
        _heads(layer),
        robust=layers is None or layer.number in layers,
        qkv_bias="qkv.bias" in layer.names,
        **layer.some("num_iters", "lam", "attn_drop", "proj_drop"),
    )


def _scaled(layer: _Layer) -> ScaledAttention:
    num_tokens = layer.sizes.get("N")
    return ScaledAttention(
        layer.sizes["C"],
        _heads(layer),
        num_tokens,
        kind="scalar" if num_tokens is None else "matrix",
        qkv_bias="qkv.bias" in layer.names,
        **layer.some("proj_drop"),
    )


class _Mixed(NamedTuple):
    """What the names of a MoLEx model say."""

    num_layers: int
    individual: bool  # a gate to a layer
    forward: bool  # of the layers that come after it
    limit: int  # layers that are mixed

    @classmethod
    def of(cls, layer: _Layer, layers: str) -> _Mixed:
        """Looks at the names of a model, which calls its layers so."""
        matches = (re.match(rf"{layers}\.(\d+)\.", name) for name in layer.names)
        count = len({match[1] for match in matches if match})
        gated = {name.partition("gate.")[0] for name in layer.names if "gate." in name}
        individual = f"{layers}.0." in gated
        # RoBERTa has no such variant: there a gate that lacks is an error.
        forward = individual and layers == "h" and f"h.{count - 1}." not in gated
        limit = layer.options["layers_to_use"]
        if limit is not None:
            _check.integer("layers_to_use", limit, 0)
        limit = count if forward or limit is None else min(limit, count)
        return cls(count, individual, forward, limit)


def _gpt2(layer: _Layer) -> LayerExpertStack:
    return _stack(layer, "h", gpt2_layers, layer.sizes["a"] // 2)


def _roberta(layer: _Layer) -> LayerExpertStack:
    dropout = layer.options["dropout"]
    _check.probability("dropout", dropout)
    make = functools.partial(roberta_layers, dropout=dropout)
    return _stack(layer, "layer", make, layer.sizes["a"])


def _stack(
    layer: _Layer, layers: str, make: Callable[..., nn.Module], rank: int
) -> LayerExpertStack:
    sizes, options, mixed = layer.sizes, layer.options, _Mixed.of(layer, layers)
    where = {"device": options["device"], "dtype": options["dtype"]}
    kept = ("vote", "mixing", "lora_alpha", "lora_dropout", "freeze", "impl")
    return LayerExpertStack.from_transformers(
        make(mixed.num_layers, sizes["C"], sizes["I"], _heads(layer), where),
        layers_to_use=mixed.limit,
        individual_gates=mixed.individual,
        cosine_dim=sizes["p"] or sizes["P"] or None,
        learn_mixing=any(name.endswith("weight_main") for name in layer.names),
        individual_mixing=f"{layers}.0.weight_main" in layer.names,
        forward_only=mixed.forward,
        lora_rank=rank,
        published=True,
        **{name: options[name] for name in kept},
    )


def _unread(layer: _Layer, layers: str) -> list[str]:
    """The causal mask, and gates of layers that are not mixed or have no choice."""
    mixed = _Mixed.of(layer, layers)
    limit = mixed.num_layers - 2 if mixed.forward else mixed.limit
    gates = [(n, re.match(rf"{layers}\.(\d+)\.gate\.", n)) for n in layer.names]
    beyond = [name for name, match in gates if match and int(match[1]) >= limit]
    return beyond + [name for name in layer.names if re.fullmatch(r"h\.\d+\.attn\.bias", name)]


def _router(layer: _Layer, kind: Callable[..., nn.Module], *names: str, **more: Any) -> nn.Module:
    sizes = layer.sizes
    return kind(sizes["D"], sizes["E"], layer.options["top_k"], **layer.some(*names), **more)


_LINEAR_NAMES = frozenset({"gate.weight", "gate.bias"})
_ROWS = frozenset({"expert_embeddings"})
_LINEAR = _Gate(_LINEAR_NAMES, lambda layer: _router(layer, TopKRouter, bias=True))
_STABLE = _Gate(_ROWS, lambda layer: _router(layer, CosineRouter, reduced=None))
_XMOE = _Gate(
    _LINEAR_NAMES | _ROWS | {"inp_reduction.weight"},
    lambda layer: _router(layer, CosineRouter, reduced=layer.sizes["r"]),
    lambda layer: _LINEAR_NAMES,
)
_CLUSTERS = _Gate(
    _LINEAR_NAMES | _ROWS,
    lambda layer: _router(layer, ACRouter, *_AC_OPTIONS, bias=not layer.options["cosine"]),
    lambda layer: _LINEAR_NAMES if layer.options["cosine"] else _ROWS,
)

_EXPERTS = {
    "layer": r"(.*?\blayers\.\d+\.)smoe\.",
    "owned": ("smoe.", "norm2."),
    "sizes": {"smoe.experts.htoh4.weight": "EID", "?smoe.gate.inp_reduction.weight": "rD"},
}
_ATTENTION = {"layer": r"(.*?\bblocks\.\d+\.attn\.)", "owned": ("",)}
_CAMEX = {
    "mask": "ties",
    "expert_dropout": 0.0,
    "top_k": None,
    "segment": None,
    "first": "own",
    "alpha": 1.0,
    "loss_coef": 1e-2,
    "activation": "relu",
}

_KINDS: dict[str, _Kind] = {
    "momentum-lm": _Kind(
        **_EXPERTS,  # type: ignore[arg-type]
        make=_experts,
        options={"top_k": 2, "rule": HeavyBall(0.7), "sign": 1, "dropout": 0.0},
        gates=(_XMOE, _STABLE, _LINEAR),
    ),
    "acmoe-lm": _Kind(
        **_EXPERTS,  # type: ignore[arg-type]
        make=_clustered,
        options={"top_k": 2, "dropout": 0.0, **_AC_OPTIONS},
        gates=(_XMOE, _CLUSTERS, _STABLE, _LINEAR),
    ),
    "acmoe-softmoe": _Kind(
        layer=r"(.*?\bblocks\.\d+\.mlp\.)(?:phi$|experts\.)",
        owned=("",),
        sizes={"phi": "DEP", "experts.0.fc1.weight": "ID"},
        make=_soft,
        options={
            "top_k": 8,
            "mix": False,
            **dict.fromkeys(("stat", "eps", "clip", "norm")),
            "empty": "published",
            "slot_inputs": "routed",
            "activation": "gelu",
        },
    ),
    "camex-t5": _Kind(
        layer=r"(.*?\bDenseReluDense\.)",
        owned=("",),
        sizes={"wi.weight": "EID", "?wi.curve1_out": "rEoo", "?wi.task_proj.weight": "gt"},
        make=_merged,
        options=_CAMEX,
    ),
    "camex-gpt2": _Kind(
        layer=r"(.*?\bh\.\d+\.mlp\.)",
        owned=("",),
        sizes={"c_fc.weight": "EID", "?c_fc.curve1_out": "rEoo", "?c_fc.task_proj.weight": "gt"},
        make=_merged,
        options={**_CAMEX, "segment": 256, "loss_coef": 1e-5, "activation": "gelu_tanh"},
        loading={"names": ("c_fc", "c_proj")},
    ),
    "molex-gpt2": _Kind(
        layer=r"(.*?\btransformer\.)h\.\d+\.",
        owned=("h.", "gate.", "weight_main", "weight_other"),
        sizes={
            "h.0.mlp.c_fc.weight": "CI",
            "?h.0.attn.c_attn.lora_A": "aC",
            "?gate.sim_matrix": "pL",
            "?h.0.gate.sim_matrix": "PL",
        },
        make=_gpt2,
        options={
            "num_heads": None,
            "layers_to_use": 12,
            "vote": "mode",
            "mixing": (0.95, 0.05),
            "lora_alpha": 32.0,
            "lora_dropout": 0.0,
            "freeze": True,
        },
        idle=functools.partial(_unread, layers="h"),
    ),
    "molex-roberta": _Kind(
        layer=r"(.*?\bencoder\.)layer\.\d+\.",
        owned=("layer.", "gate.", "weight_main", "weight_other"),
        sizes={
            "layer.0.intermediate.dense.weight": "IC",
            "?layer.0.attention.self.query.lora_A": "aC",
            "?gate.sim_matrix": "pL",
            "?layer.0.gate.sim_matrix": "PL",
        },
        make=_roberta,
        options={
            "num_heads": None,
            "layers_to_use": 13,
            "vote": "mode",
            "mixing": (0.95, 0.05),
            "lora_alpha": 16.0,
            "lora_dropout": 0.0,
            "dropout": 0.1,
            "freeze": True,
        },
        idle=functools.partial(_unread, layers="layer"),
    ),
    "rpc-vit": _Kind(
        **_ATTENTION,  # type: ignore[arg-type]
        sizes={"proj.weight": "CC"},
        make=_robust,
        options={
            "num_heads": None,
            "num_iters": 4,
            "lam": 4.0,
            "layers": (0,),
            "attn_drop": 0.0,
            "proj_drop": 0.0,
        },
    ),
    "scaled-vit": _Kind(
        **_ATTENTION,  # type: ignore[arg-type]
        sizes={"proj.weight": "CC", "s": "s|HNN"},
        make=_scaled,
        options={"num_heads": None, "proj_drop": 0.0},
    ),
}


def kinds() -> dict[str, dict[str, Any]]:
    """The kinds of checkpoints that `load` takes.

    Returns:
        The options of each with their defaults, by its name.
    """
    return {name: {**kind.options, **_COMMON} for name, kind in _KINDS.items()}


def load(
    kind: str, state_dict: Mapping[str, Tensor], *, strict: bool = True, **options: Any
) -> Published:
    """Makes the modules of a published model's layers, and loads them from its checkpoint.

    | kind | a module per | module |
    |---|---|---|
    | momentum-lm | expert layer of MomentumSMoE's language models | `MomentumMoE` |
    | acmoe-lm | expert layer of ACMoE's language models | `MomentumMoE` without momentum |
    | acmoe-softmoe | MLP of ACMoE's vision models that is a soft mixture | `SoftMoE` |
    | camex-t5, camex-gpt2 | MLP of CAMEx' models | `CAMExMLP` |
    | molex-gpt2, molex-roberta | model: MoLEx' GPT-2 or RoBERTa, its layers | `LayerExpertStack` |
    | rpc-vit | attention of RPC-Attention's vision models | `RPCAttention` |
    | scaled-vit | attention of its scaled attention's models | `ScaledAttention` |

    An expert layer is called behind the layer's attention and first norm, as `MomentumMoE` is. Its
    router is what the checkpoint has: `TopKRouter`, `CosineRouter` (XMoE, StableMoE) or `ACRouter`,
    which an ACMoE model hands the routing of the expert layer before:
    `layer(h, routing=layer.router(h, previous))`. Baselines without momentum are "acmoe-lm" too.

    Args:
        kind: see the table.
        state_dict: of the whole model, whatever its names start with (`module.`); not the file's
            outer dict, in which it stands under "model" or "model_state_dict".
        strict: a name in a layer that no module takes is an error. Names that the published code
            itself never reads are not: they are in `unused`.
        options: what no shape tells, as `kinds` lists it, with the scripts' values as defaults; for
            "momentum-lm" `rule` may be a list of one per layer (AdamSMoE: Adam in the first), for
            "rpc-vit" `layers` are the robust ones, None all of them. `dtype` and `device` are the
            checkpoint's unless given.

    Returns:
        The modules, in training mode, by the prefix of their names, and the names not used.

    Raises:
        TypeError: an option that the kind does not have; a value that is no floating tensor.
        ValueError: an unknown kind, no layer of it, an option for layers that there are not, a
            missing name, another shape, or (`strict`) names that no module takes: the message has
            them.
    """
    _check.choice("kind", kind, tuple(_KINDS))
    _check.flags(strict=strict)
    model = _KINDS[kind]
    allowed = {**model.options, **_COMMON}
    for name in options:
        if name not in allowed:
            raise TypeError(f"{name}: expected an option of {kind!r}, one of {list(allowed)}")
    given = _published.Tracked(_published.entries(state_dict))
    found = _prefixes(model, given)
    if not found:
        raise ValueError(
            f"state_dict: expected names of {kind!r}, which look like {model.layer!r}, "
            f"got {_published.listed(list(given)) or 'none'}"
        )
    given_options = {**allowed, **options}
    _check_by_layer(given_options, len(found))
    layers: dict[str, nn.Module] = {}
    idle: set[str] = set()
    for number, prefix in enumerate(found):
        layer = _layer(model, given, number, prefix, given_options)
        module = model.make(layer)
        idle.update(prefix + name for name in model.idle(layer))
        if model.gates:
            gate = _gate(model, layer)
            module.router = gate.make(layer)
            idle.update(f"{prefix}smoe.gate.{name}" for name in gate.idle(layer))
        module.load_published(given, prefix=prefix, **model.loading)  # type: ignore[operator]
        layers[prefix] = module
    unused = [name for name in given if name not in given.read]
    owned = tuple(prefix + start for prefix in found for start in model.owned)
    lost = [name for name in unused if name.startswith(owned) and name not in idle]
    if strict and lost:
        raise ValueError(
            f"state_dict: expected names that a module of {kind!r} takes, got besides "
            f"{_published.listed(lost)}; strict=False leaves them out"
        )
    return Published(layers, unused)


def _check_by_layer(options: Mapping[str, Any], num_layers: int) -> None:
    """The options that say something by the numbers of layers, of which there are so many."""
    rule, layers = options.get("rule"), options.get("layers")
    if isinstance(rule, list) and len(rule) != num_layers:
        raise ValueError(
            f"rule: expected one for each layer, got {len(rule)} for {num_layers} layers"
        )
    if layers is None:
        return
    if isinstance(layers, str) or not isinstance(layers, Collection):
        raise TypeError(
            f"layers: expected the numbers of layers or None, got {type(layers).__name__}"
        )
    for number in layers:
        _check.integer("layers", number, 0, num_layers - 1)


def _prefixes(model: _Kind, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Those of the layers, by the numbers in them."""
    matches = (re.match(model.layer, name) for name in state_dict)
    found = {match[1] for match in matches if match}
    # An encoder's layers come before a decoder's, and 2 before 10.
    return sorted(
        found, key=lambda p: [(not s.isdigit(), int(s) if s.isdigit() else s) for s in p.split(".")]
    )


def _layer(
    model: _Kind,
    state_dict: Mapping[str, Tensor],
    number: int,
    prefix: str,
    options: dict[str, Any],
) -> _Layer:
    """What the names and shapes of a layer say."""
    names = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
    sizes: dict[str, int] = {}
    for entry, shapes in model.sizes.items():
        name = entry.removeprefix("?")
        if name not in names:
            if entry == name:
                raise ValueError(f"state_dict: expected a name {prefix + name!r}, got none")
            sizes |= {letter: sizes.get(letter, 0) for letter in shapes}
            continue
        value = state_dict[prefix + name]
        _check.trailing(prefix + name, value, "...", least=0)
        letters = next((shape for shape in shapes.split("|") if len(shape) == value.dim()), None)
        if letters is None:
            expected = " or ".join(f"[{', '.join(shape)}]" for shape in shapes.split("|"))
            got = list(value.shape)
            raise ValueError(f"{prefix + name}: expected shape {expected}, got {got}")
        sizes |= dict(zip(letters, value.shape, strict=True))
        # The module is where the checkpoint is, and of its dtype.
        like = {"device": value.device, "dtype": value.dtype}
        options = {**options, **{key: options[key] or one for key, one in like.items()}}
    return _Layer(number, prefix, names, sizes, options)


def _gate(model: _Kind, layer: _Layer) -> _Gate:
    """The gate whose names the layer has."""
    known = frozenset().union(*(gate.names for gate in model.gates))
    here = {name.removeprefix("smoe.gate.") for name in layer.names} & known
    for gate in model.gates:
        if here == gate.names:
            return gate
    expected = " or ".join(str(sorted(gate.names)) for gate in model.gates)
    raise ValueError(
        f"state_dict: expected the names of a gate behind '{layer.prefix}smoe.gate.', {expected}, "
        f"got {sorted(here)}"
    )
