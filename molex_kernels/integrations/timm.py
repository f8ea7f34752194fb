"""Robust attention in timm's vision transformers.

from molex_kernels.integrations.timm import install_rpc_attention
model = timm.create_model("vit_tiny_patch16_224", pretrained=True)
install_rpc_attention(model)                          # in the first layer
install_rpc_attention(model, layers=None, num_iters=2)   # in every layer
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from molex_kernels import _check, _modules
from molex_kernels.ops.rpc_attention.module import RPCAttention

__all__ = ["install_rpc_attention"]

# What robust attention has a place for: modules by name, and what a block hands to its attention.
_PARTS = ("qkv", "proj", "attn_drop", "proj_drop")
_ARGUMENTS = ("self", "x", "attn_mask", "is_causal")


def install_rpc_attention(
    model: nn.Module,
    *,
    layers: Iterable[int] | None = (0,),
    projection: str = "qkv",
    **options: Any,
) -> list[int]:
    """Puts `RPCAttention` in the place of the attention of a vision transformer's blocks.

    Args:
        model: has `blocks`, each with `attn` as timm's `Attention` (`qkv`, `proj`, `num_heads`).
        layers: which blocks; None is all of them. (0,) and all are the published choices.
        projection: "qkv" keeps the model's queries, which attend to the cleaned keys, and the
            very modules `qkv` and `proj`, so a pretrained model goes on from where it is. "kv" is
            the published form without queries: `qkv` becomes a linear layer of the rows of k and v.
        options: of `RPCAttention`, such as `num_iters=4`, `lam=4.0`, `robust`, `impl`.

    Returns:
        The indices of the blocks that were changed.

    Raises:
        TypeError: an index that is no int.
        ValueError: a model without such blocks, an index that there is not, or an attention with
            anything beyond `qkv`, `proj` and their dropouts: a parameter, a buffer, a norm, a gate,
            a position bias, hooks, another scale, or outputs of its own for random tokens. It says
            what there is; nothing is changed then.
    """
    _check.choice("projection", projection, ("kv", "qkv"))
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise ValueError(
            f"model: expected one with blocks, as timm's vision transformers have, "
            f"got {type(model).__name__}"
        )
    if layers is not None and not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected indices of blocks or None, got {layers!r}")
    chosen = list(range(len(blocks)) if layers is None else layers)
    for index in chosen:
        _check.integer("layers", index, 0, len(blocks) - 1, " (the last block)")
    made = {i: _robust(f"blocks.{i}.attn", blocks[i].attn, projection, options) for i in chosen}
    for index, attention in made.items():
        blocks[index].attn = attention
    return chosen


def _robust(name: str, old: Any, projection: str, options: dict[str, Any]) -> RPCAttention:
    qkv: Any = getattr(old, "qkv", None)
    proj: Any = getattr(old, "proj", None)
    dim = getattr(qkv, "in_features", 0)
    plain = isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)
    plain = plain and qkv.out_features == 3 * dim and proj.in_features == proj.out_features == dim
    again = isinstance(old, RPCAttention)  # another installation changes its options
    beyond = _beyond(old, dim) if isinstance(old, nn.Module) and not again else []
    if not plain or beyond:
        got = f"{type(old).__name__} with {', '.join(beyond)}" if beyond else type(old).__name__
        raise ValueError(
            f"model: expected {name} to be one linear layer qkv (C to 3 C), one proj (C to C) and "
            f"num_heads, got {got}"
        )
    where: Any = {
        "dim": dim,
        "num_heads": old.num_heads,
        "qkv_bias": qkv.bias is not None,
        "device": "meta",
        "dtype": qkv.weight.dtype,
    }
    drop = getattr(old, "attn_drop", 0.0)
    drop = drop if isinstance(drop, float) else getattr(drop, "p", 0.0)
    new: Any = RPCAttention(projection=projection, attn_drop=drop, **options, **where)
    if not again:
        _compare(name, old, RPCAttention(projection="qkv", robust=False, **where))
    new.qkv = qkv if projection == "qkv" else _without_queries(qkv)
    new.proj, new.proj_drop = proj, getattr(old, "proj_drop", new.proj_drop)
    return new.train(old.training)


@torch.no_grad()
def _compare(name: str, old: Any, new: Any) -> None:
    """Refuses an attention that looks like timm's and computes something else."""
    weight = old.qkv.weight
    if weight.is_meta:
        return
    new.qkv, new.proj = old.qkv, old.proj
    modes = {module: module.training for module in old.modules()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, weight.shape[1], generator=generator).to(weight)
    try:
        old.eval()
        new.eval()
        x = x / old.qkv(x).std().clamp(min=1e-3)  # scores for which a softmax is not flat
        want, got = old(x), new(x)
        limit = torch.finfo(x.dtype).eps ** 0.5 * want.abs().max()
        differs = want.shape != got.shape or not (want - got).abs().max() <= limit
        why = "outputs that are no softmax attention's" if differs else None
    except Exception as error:
        why = f"a forward that fails for tokens [B, N, C]: {error}"
    finally:
        for module, training in modes.items():
            module.training = training
    if why is not None:
        raise ValueError(f"model: expected {name} to be plain attention, got one with {why}")


def _beyond(old: nn.Module, dim: int) -> list[str]:
    """What this attention has or does that robust attention would leave out."""
    found = [f"the parameter {name}" for name, _ in old.named_parameters(recurse=False)]
    found += [f"the buffer {name}" for name, _ in old.named_buffers(recurse=False)]
    for name, child in old.named_children():
        is_drop = isinstance(child, nn.Dropout) and (name in _PARTS or not child.p)
        if not (is_drop or isinstance(child, nn.Identity) or name in _PARTS[:2]):
            found.append(f"{name} ({type(child).__name__})")
    arguments = inspect.signature(type(old).forward).parameters
    found += [f"the argument {name}" for name in arguments if name not in _ARGUMENTS]
    if not _modules.is_plain(old, type(old)):
        found.append("hooks or a forward of its own")
    heads: Any = getattr(old, "num_heads", None)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        found.append(f"num_heads={heads}")
    elif dim and not _is_usual(getattr(old, "scale", None), dim // heads):
        found.append("a scale of its own")
    return found


def _is_usual(scale: Any, width: int) -> bool:
    """Whether scores are divided by the root of a head's width."""
    return scale is None or (isinstance(scale, float) and math.isclose(scale, width**-0.5))


def _without_queries(qkv: nn.Linear) -> nn.Linear:
    dim, bias = qkv.in_features, qkv.bias
    where: Any = {"device": qkv.weight.device, "dtype": qkv.weight.dtype}
    rows = nn.Linear(dim, 2 * dim, bias=bias is not None, **where)
    with torch.no_grad():
        rows.weight.copy_(qkv.weight[dim:])
        if bias is not None:
            rows.bias.copy_(bias[dim:])
    return rows.requires_grad_(qkv.weight.requires_grad)
