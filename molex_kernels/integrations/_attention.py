"""RPC attention in transformers' models, behind their attention interface."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from molex_kernels import _check
from molex_kernels.integrations._layer_experts import is_mixed
from molex_kernels.integrations._layers import Layers, check_open
from molex_kernels.integrations._masks import key_mask_of, require
from molex_kernels.ops.rpc_attention.api import CAUSAL, rpc_attention
from molex_kernels.ops.rpc_attention.module import RPCAttention

NAME = "molex_rpc"
_OPTIONS = ("num_iters", "lam", "robust", "threshold", "mu_width", "mu_divisor", "causal", "impl")
# What attention may be handed beside q, k, v, the mask, the scale and dropout, whatever it is.
_OF_NO_MATTER = (
    "position_ids",
    "cache_position",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
    "return_dict",
    "use_cache",
    "deterministic",
)
# What some attention hands to its implementation and robust attention has no place for.
_FOREIGN = ("position_bias", "s_aux", "sinks", "indices", "block_indices")


class _Installed:
    """What an attention module has while it is robust.

    Attributes:
        config: what the module had; its own copy names another implementation.
        split: arguments of `rpc_attention`.
        with_queries: whether q goes in.
        causal: the option, None for what the module says.
    """

    def __init__(self, module: Any, split: dict[str, Any], projection: str, causal: Any) -> None:
        self.config = module.config
        self.split = split
        self.with_queries = projection == "qkv"
        self.causal = causal

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()  # the process that unpickles a model may have installed nothing


def install_rpc_attention(
    model: nn.Module,
    *,
    layers: Iterable[int] | None = (0,),
    projection: str = "qkv",
    **options: Any,
) -> list[int]:
    """Makes the self-attention of a transformers model robust, in the chosen layers.

    RPC attention (arXiv 2406.13762, `rpc_attention`) in the place of softmax(q k^T scale) v, behind
    transformers' attention interface: BERT, RoBERTa, ViT, DeiT, DINOv2, CLIP's towers, GPT-2,
    Llama, Mistral, Qwen and every encoder or decoder whose attention goes through it. Projections,
    rotary embeddings, the scale and the dropout stay the model's, and so do parameters, names and
    checkpoints. With robust=False the model computes what it did, to rounding.

    The other layers keep the implementation that the model has, and `set_attn_implementation`
    changes theirs alone; it decides in which form the chosen layers get their mask. "eager",
    "sdpa" and flash attention's are taken, flex attention's is refused.

    **Masks** have to be a padding mask, over a triangle where attention is causal: [B, N], or a
    boolean or additive one [B, 1, N, N], from whose last row the tokens are taken. That the other
    rows agree is checked: on a CPU with a ValueError, on a GPU and in compiled code by an assertion
    on the device, which costs one pass over the mask and waits for nothing. Rows of padding are 0,
    as with flash attention, where the model's own implementation attends from them to the tokens.

    **Causal models** take T for each token from the tokens up to it (causal="prefix"), so that
    nothing of a later token gets in. A key-value cache is refused as soon as it holds tokens of
    earlier calls, for the keys attend to each other anew: `generate(..., use_cache=False)` runs.

    **Grouped queries** are expanded: with "qkv" each query head cleans keys of its own, for q is in
    the iterations. That takes memory for k, v and their gradients, and time, as attention with as
    many key heads as query heads does. With "kv" the key heads are cleaned once and the results
    repeated, dropped elements too.

    Training, `gradient_checkpointing_enable()`, `torch.compile`, deepcopy and pickling work as
    without it. Installed again, it replaces what was installed. `uninstall` takes it out.

    Args:
        model: a transformers model with one list of layers that have one self-attention each. Of a
            model with more, such as CLIP or BART, give the part: `model.vision_model`,
            `model.get_encoder()`.
        layers: which layers; None is all with attention. (0,) and all are the published choices.
        projection: "qkv" keeps the model's queries, which attend to the cleaned keys. "kv" is the
            published form, in which the keys attend to themselves; the model's query projections
            then stay where they are without use or gradient.
        options: `num_iters=4`, `lam=4.0`, `robust`, `threshold`, `mu_width` (None is the query
            heads times d), `mu_divisor`, `impl`, all as in `RPCAttention`; and `causal`, as in
            `rpc_attention`, None (the default) for "prefix" where the module's attention is causal
            and False where not. True lets T see the whole segment, as published.

    Returns:
        The indices of the layers that have robust attention.

    Raises:
        TypeError: an unknown option or one of a wrong type, an index that is no int, a model that
            is no module.
        ValueError: no such layers, an index that there is not, an option out of range, a layer with
            more than one attention, cross-attention, attention with a position bias, sinks, a soft
            cap, a selection of keys or a forward of its own, or layers that run as experts
            (`install_layer_experts`). Nothing is changed then.
        NotImplementedError: transformers is missing or before 5.0. At a call: tokens in a cache,
            keys of other lengths, values of another width, `output_attentions`, a sliding window
            below N, packed sequences or another argument that changes what attention computes.
    """
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise TypeError(f"options: expected some of {sorted(_OPTIONS)}, got {unknown}")
    _check.choice("projection", projection, ("kv", "qkv"))
    causal = options.pop("causal", None)
    _check.choice("causal", causal, (None, *CAUSAL))
    made: Any = RPCAttention(1, 1, device="meta", **options)
    split = {**made._split_options(), "impl": made.impl}
    stack = Layers(model, "attention", _attentions)
    chosen = stack.chosen(layers)
    modules = [_attention(stack, index) for index in chosen]
    configs = [_configured(f"layers.{i}", m) for i, m in zip(chosen, modules, strict=True)]
    if modules:
        _register()
    uninstall(model)
    for module, config in zip(modules, configs, strict=True):
        module.molex_rpc = _Installed(module, split, projection, causal)
        module.config = config
    if modules:
        # Some models take `output_attentions` for themselves, some hand it on to their attention.
        for module in {id(m): m for m in (model, stack.parent, *modules)}.values():
            if "molex_rpc_hook" not in module.__dict__:
                hook = module.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
                module.molex_rpc_hook = hook
    return chosen


def uninstall(model: nn.Module) -> bool:
    """Gives each attention module its configuration back; False where there is nothing."""
    found = False
    for module in model.modules():
        installed, hook = (module.__dict__.get(name) for name in ("molex_rpc", "molex_rpc_hook"))
        if isinstance(installed, _Installed):
            module.config = installed.config
            del module.molex_rpc
            found = True
        if hook is not None:
            hook.remove()
            del module.molex_rpc_hook
    return found


def _register() -> None:
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise NotImplementedError(
            f"install_rpc_attention: expected transformers 5.0 or later with its attention "
            f"interface: {error}"
        ) from error
    AttentionInterface.register(NAME, _forward)


def _attentions(layer: nn.Module) -> dict[str, nn.Module] | None:
    """By name, the modules of this layer that look an implementation up in the interface."""
    found = {n: m for n, m in layer.named_modules() if "ALL_ATTENTION_FUNCTIONS" in _words(m)}
    return found or None


def _words(module: nn.Module) -> set[Any]:
    """Names and constants in the code of its forward: what it looks up and hands on by name."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return set()
    words = {*code.co_names, *code.co_consts}
    return words.union(*(each for each in code.co_consts if isinstance(each, tuple)))


def _attention(stack: Layers, index: int) -> Any:
    """This layer's attention, if it is plain self-attention behind the interface."""
    found: dict[str, nn.Module] = stack.blocks[index]
    if len(found) > 1:
        raise ValueError(
            f"model: expected one attention in layers.{index}, got {', '.join(found)}: one attends "
            "to other tokens than the layer's own, or the layer has layers itself"
        )
    ((name, module),) = found.items()
    where = f"layers.{index}.{name}".removesuffix(".")
    if is_mixed(stack.layers[index]):
        raise ValueError(
            f"model: expected layers that call their attention, got layers.{index} with "
            "install_layer_experts, which computes it in their place"
        )
    check_open(where, module)
    words = _words(module)
    is_cross = "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False)
    beyond = ["keys of other tokens"] if is_cross else []
    beyond += [name for name in _FOREIGN if name in words]
    beyond += [n for n, v in vars(module).items() if "softcap" in n and v is not None]
    if "is_causal" not in words and not hasattr(module, "is_causal"):
        beyond.append("no is_causal")
    if beyond:
        raise ValueError(
            f"model: expected {where} to be plain self-attention that says whether it is causal, "
            f"got {type(module).__name__} with {', '.join(beyond)}"
        )
    return module


def _configured(where: str, module: Any) -> Any:
    """A copy of its configuration, which names this implementation."""
    installed = module.__dict__.get("molex_rpc")
    own: Any = copy.copy(getattr(installed or module, "config", None))
    if not hasattr(own, "_attn_implementation_internal"):
        raise ValueError(
            f"model: expected {where} to have a configuration of transformers, "
            f"got {type(own).__name__}"
        )
    # Past the property, whose setter goes on to the parts that both configurations share.
    own._attn_implementation_internal = NAME
    return own


def _refuse_weights(module: Any, args: Any, kwargs: Any) -> None:
    config = getattr(module.__dict__.get("molex_rpc", module), "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise NotImplementedError(
            "output_attentions: expected False with install_rpc_attention, which makes no N x N "
            "scores, got True"
        )


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in the place of an attention function.

    Args:
        module: the attention.
        query: [B, H, N, d].
        key: [B, H_kv, N, d], H a multiple of H_kv.
        value: like key.
        attention_mask: of the form of the model's implementation.
        scaling: of the scores.
        dropout: probability.
        is_causal: None for what the module says.
        sliding_window: in tokens.
        kwargs: what else there is.

    Returns:
        [B, N, H, d], and no scores.
    """
    installed = getattr(module, "molex_rpc", None)
    if not isinstance(installed, _Installed):
        raise NotImplementedError(
            f"attn_implementation: expected {NAME!r} to be set by install_rpc_attention, got it "
            f"for a {type(module).__name__} in which nothing is installed"
        )
    batch, heads, tokens, width = query.shape
    _check_call(query, key, value, sliding_window, kwargs)
    implementation = installed.config._attn_implementation or ""
    causal: Any = installed.causal
    if causal is None:
        # Eager attention masks what its mask says, and nothing without one.
        ignores = implementation == "eager" and attention_mask is None
        says = getattr(module, "is_causal", False) if is_causal is None else is_causal
        causal = "prefix" if says and not ignores else False
    if attention_mask is None and "flash" in implementation:
        _check_packed(kwargs.get("position_ids"), batch)
    key_mask = key_mask_of(attention_mask, batch, tokens, causal is not False, key.device)
    group = heads // key.shape[1]
    split = installed.split
    if split.get("mu_width", 0) is None:
        split = {**split, "mu_width": heads * width}
    if installed.with_queries and group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    low: Any = rpc_attention(
        key,
        value,
        q=query if installed.with_queries else None,
        **split,
        causal=causal,
        key_mask=key_mask,
        scale=scaling,
        dropout_p=dropout if module.training else 0.0,
    )
    if low.shape[1] < heads:
        low = low.repeat_interleave(group, 1)
    return low.transpose(1, 2).contiguous(), None


def _check_call(query: Tensor, key: Tensor, value: Tensor, window: Any, others: Any) -> None:
    batch, heads, tokens, width = query.shape
    if key.shape[2] != tokens or key.shape[0] != batch:
        raise NotImplementedError(
            f"cache: expected as many keys as queries with install_rpc_attention, whose keys "
            f"attend to each other, got {list(query.shape)} and {list(key.shape)}: tokens of "
            "earlier calls, or other ones. generate(..., use_cache=False) runs"
        )
    if key.shape != value.shape or key.shape[3] != width or heads % key.shape[1]:
        raise NotImplementedError(
            f"value: expected heads of the width of q and k, got {list(query.shape)}, "
            f"{list(key.shape)} and {list(value.shape)}"
        )
    if window is not None and tokens > window:
        raise NotImplementedError(
            f"sliding_window: expected None or at least the {tokens} tokens that there are, "
            f"got {window}"
        )
    for name, given in others.items():
        if given is not None and given is not False and name not in _OF_NO_MATTER:
            raise NotImplementedError(
                f"{name}: expected None with install_rpc_attention, got {type(given).__name__}"
            )


def _check_packed(position_ids: Any, batch: int) -> None:
    """Flash attention alone has packed sequences without a mask: positions begin anew."""
    if batch == 1 and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        require(
            (position_ids.diff(dim=1) > 0).all(),
            "position_ids: expected one sequence with install_rpc_attention, got packed ones",
        )
