"""Robust attention in timm's vision transformers.

from molex_kernels.integrations.timm import install_rpc_attention
model = timm.create_model("vit_tiny_patch16_224", pretrained=True)
install_rpc_attention(model)                          # in the first layer
install_rpc_attention(model, layers=None, num_iters=2)   # in every layer
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from molex_kernels import _check
from molex_kernels.ops.rpc_attention.module import RPCAttention

# Parts of timm's attention that robust attention has no place for.
_EXTRAS = ("q_norm", "k_norm", "norm", "gate")


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
            norms or a gate of its own; nothing is changed then.
    """
    _check.choice("projection", projection, ("kv", "qkv"))
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise ValueError(
            f"model: expected one with blocks, as timm's vision transformers have, "
            f"got {type(model).__name__}"
        )
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
    extras = [e for e in _EXTRAS if not isinstance(getattr(old, e, None), nn.Identity | None)]
    if not plain or qkv.out_features != 3 * dim or proj.in_features != dim or extras:
        got = f"{type(old).__name__} with {', '.join(extras)}" if extras else type(old).__name__
        raise ValueError(
            f"model: expected {name} to be one linear layer qkv (C to 3 C) and one proj, got {got}"
        )
    where: Any = {"device": "meta", "dtype": qkv.weight.dtype}
    new: Any = RPCAttention(
        dim,
        old.num_heads,
        projection=projection,
        qkv_bias=qkv.bias is not None,
        attn_drop=getattr(getattr(old, "attn_drop", None), "p", 0.0),
        **options,
        **where,
    )
    new.qkv = qkv if projection == "qkv" else _without_queries(qkv)
    new.proj, new.proj_drop = proj, getattr(old, "proj_drop", new.proj_drop)
    return new.train(old.training)


def _without_queries(qkv: nn.Linear) -> nn.Linear:
    dim, bias = qkv.in_features, qkv.bias
    where: Any = {"device": qkv.weight.device, "dtype": qkv.weight.dtype}
    rows = nn.Linear(dim, 2 * dim, bias=bias is not None, **where)
    with torch.no_grad():
        rows.weight.copy_(qkv.weight[dim:])
        if bias is not None:
            rows.bias.copy_(bias[dim:])
    return rows.requires_grad_(qkv.weight.requires_grad)
