"""The blocks of several layers at once: each of their products is one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels import _dtypes
from molex_kernels.ops.layer_mixing.api import LoRA, layer_linear, layer_mix
from molex_kernels.ops.layer_mixing.parts import Facts
from molex_kernels.ops.layer_mixing.positions import position_bias, with_bias

_THIRDS = {"q": 0, "k": 1, "v": 2}  # of a fused projection
Layers = Tensor | tuple[Tensor, ...]  # one stacked tensor, or one of each layer


class Held(NamedTuple):
    """Parameters by name, as they are while the modules that hold them are called."""

    weights: Mapping[str, Layers]
    biases: Mapping[str, Layers]
    lora_a: Mapping[str, Layers]
    lora_b: Mapping[str, Layers]


class Given(NamedTuple):
    """What the blocks of all layers get beside the hidden states.

    Attributes:
        counted: bool [B, N], the tokens that vote; None for all.
        mask: for the attention, [B or 1, H or 1, N, N] or wider; a bias by positions that all
            layers share is in it.
        rotary: cos and sin [B or 1, N, r], r the features of a head that are rotated.
        buckets: int64 [N, N], the rows of each layer's own table of a bias by positions.
    """

    counted: Tensor | None
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    buckets: Tensor | None = None


class Blocks:
    """Computes the blocks u_l of the layers l that an index on the device names.

    Args:
        facts: what the layers have in common.
        held: their parameters.
        adapters: of each adapted product, scaling and dropout.
        given: masks and positions.
        is_training: whether dropout is on.
        impl: of every op.
    """

    def __init__(
        self,
        facts: Facts,
        held: Held,
        adapters: Mapping[str, tuple[float, float]],
        given: Given,
        is_training: bool,
        impl: str | None,
    ) -> None:
        self.facts = facts
        self.held = held
        self.adapters = adapters
        self.given = given
        self.is_training = is_training
        self.impl = impl

    def mixed(
        self, z: Tensor, normed: Tensor | None, index: Tensor, mixture: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """sum_g c_g u_{index_g}(z), and where the next block wants it the standardised form of it.

        `normed` is that of z, as the block before has returned it.
        """
        facts = self.facts
        x: Tensor = z
        standard: Tensor | None = None
        if facts.pre_norm:
            standard = self._standard(z) if normed is None else normed
            x = self._scaled("norm1", standard, index, z.dtype)
        attended = self._attention(x, index, shared=not facts.pre_norm)
        h = self._clamped(z + self._branch(self._linear("out", attended, index), facts.out_dropout))
        if not facts.pre_norm:
            inner = h = self._norm("norm1", h, index)
        elif facts.parallel and standard is not None:
            inner = self._scaled("norm2", standard, index, z.dtype)
        else:
            inner = self._norm("norm2", h, index)
        f = self._branch(self._mlp(inner, index), facts.down_dropout)
        residual: Tensor | None = h
        if not facts.pre_norm:
            f, residual = self._norm("norm2", h + f, index), None
        elif facts.layout.clamps and h.dtype == torch.float16:
            f, residual = self._clamped(h + f), None
        options: dict[str, Any] = {"residual": residual, "impl": self.impl, **mixture}
        if facts.pre_norm and not facts.norm.is_rms:
            return layer_mix(f, norm=(None, None, facts.norm.eps), **options)
        return layer_mix(f, **options), None

    def _mlp(self, x: Tensor, index: Tensor) -> Tensor:
        up = self._linear("up", x, index)
        if "gate" in self.facts.layout.linears:
            up = self.facts.activation(self._linear("gate", x, index)) * up
        else:
            up = self.facts.activation(up)
        if self.facts.up_dropout:
            up = F.dropout(up, self.facts.up_dropout, training=self.is_training)
        return self._linear("down", up, index)

    def _attention(self, x: Tensor, index: Tensor, shared: bool) -> Tensor:
        """All branches' attention in one call; [G, B, N, H d]."""
        facts, mask = self.facts, self.given.mask
        q, k, v = self._projections(x, index, shared)
        branches, batch = q.shape[:2]
        if "norm_q" in facts.norms:
            q = self._norm("norm_q", q, index)
        if "norm_k" in facts.norms:
            k = self._norm("norm_k", k, index)
        if self.given.rotary is not None:
            q, k = (_rotated(each, *self.given.rotary).to(v.dtype) for each in (q, k))
        q, k, v = (each.flatten(0, 1).transpose(1, 2) for each in (q, k, v))
        has_groups = facts.key_heads != facts.heads
        if self.given.buckets is not None:
            tables = _chosen(self.held.weights["position_bias"], index)
            bias = position_bias(tables.to(q.dtype), self.given.buckets)[:, None]
            mask = with_bias(mask, bias).expand(-1, batch, -1, -1, -1).flatten(0, 1)
        if mask is not None:
            if mask.shape[0] == batch and self.given.buckets is None:
                mask = mask.expand(branches, *mask.shape).flatten(0, 1)
            if has_groups:  # no fused kernel takes both a mask and groups
                repeats = facts.heads // facts.key_heads
                k, v = (each.repeat_interleave(repeats, 1) for each in (k, v))
                has_groups = False
        out = F.scaled_dot_product_attention(
            *(q, k, v, mask),
            dropout_p=facts.attention_dropout if self.is_training else 0.0,
            is_causal=facts.layout.causal and mask is None,
            scale=facts.scaling,
            enable_gqa=has_groups,
        )
        return out.transpose(1, 2).unflatten(0, (branches, batch)).flatten(-2)

    def _projections(self, x: Tensor, index: Tensor, shared: bool) -> tuple[Tensor, ...]:
        """q [G, B, N, H, d], and k and v with the heads that they have."""
        width = self.facts.head_width
        if not self.facts.layout.by_heads:
            return tuple(
                self._linear(name, x, index, shared).unflatten(-1, (-1, width)) for name in "qkv"
            )
        # Rows of one part stand apart there, and weights of all layers would have to be copied.
        fused = self._linear("qkv", x, index, shared).unflatten(-1, (-1, 3, width))
        parts = zip("qkv", fused.unbind(-2), strict=True)
        return tuple(
            y + self._adapted(name, x, index, shared).unflatten(-1, (-1, width))
            if name in self.held.lora_a
            else y
            for name, y in parts
        )

    def _linear(self, name: str, x: Tensor, index: Tensor, shared: bool = False) -> Tensor:
        weights, biases = self._weights(name)
        options: dict[str, Any] = {"biases": biases, "shared": shared, "impl": self.impl}
        key = name if name in self.held.lora_a or name not in _THIRDS else "qkv"
        if key not in self.held.lora_a:
            return layer_linear(x, weights, index, **options)
        scaling, p = self.adapters[key]
        if not (self.is_training and p):
            b = self._third(self.held.lora_b[key], name, key, -2)
            options["lora"] = LoRA(self.held.lora_a[key], b, scaling)
            return layer_linear(x, weights, index, **options)
        y = layer_linear(x, weights, index, **options)
        return y + self._adapted(name, x, index, shared)

    def _adapted(self, name: str, x: Tensor, index: Tensor, shared: bool) -> Tensor:
        """The adapter's part alone, its dropout drawn for each branch, as for two blocks."""
        key = name if name in self.held.lora_a else "qkv"
        scaling, p = self.adapters[key]
        a, b = self.held.lora_a[key], self._third(self.held.lora_b[key], name, key, -2)
        if self.is_training and p:
            x = F.dropout(x.expand(index.shape[0], *x.shape) if shared else x, p)
            shared = False
        options: dict[str, Any] = {"impl": self.impl}
        down = layer_linear(x, _each(lambda t: t.to(x.dtype), a), index, shared=shared, **options)
        up = layer_linear(down, _each(lambda t: t.to(down.dtype), b), index, **options)
        return scaling * up

    def _weights(self, name: str) -> tuple[Layers, Layers | None]:
        """[L, N, D] and biases [L, N], or tuples of L: of a fused projection the part's rows."""
        layout = self.facts.layout
        key = name if name in layout.linears else "qkv"
        weights, biases = self.held.weights[key], self.held.biases.get(key)
        if layout.transposed:
            weights = _each(lambda t: t.mT, weights)
        if biases is not None:
            biases = self._third(biases, name, key, -1)
        return self._third(weights, name, key, -2), biases

    def _third(self, layers: Layers, name: str, key: str, dim: int) -> Layers:
        """The rows of a fused projection that belong to this part; all where it is the whole."""
        if name == key:
            return layers

        def rows(tensor: Tensor) -> Tensor:
            third = tensor.shape[dim] // 3
            return tensor.narrow(dim, _THIRDS[name] * third, third)

        return _each(rows, layers)

    def _standard(self, x: Tensor) -> Tensor:
        """The norm of x without its weight and bias."""
        norm = self.facts.norm
        if not norm.is_rms:
            return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
        if norm.offset:
            # Rounded once, behind the weight: 1 + weight in 16 bits would lose the weight.
            x = x.to(_dtypes.accumulate_dtype(x.dtype))
        return F.rms_norm(x, x.shape[-1:], eps=norm.eps)

    def _scaled(self, name: str, standard: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Each branch's weight and bias of a norm, on [B, N, D] or [G, ..., D]."""
        norm, dims = self.facts.norm, max(standard.dim() - 2, 2)
        weight = _rows(self.held.weights[name], index, dims)
        if norm.is_rms:
            if norm.offset:
                return (standard * (norm.offset + weight.to(standard.dtype))).to(dtype)
            return standard.to(dtype) * weight
        y = standard * weight
        bias = self.held.biases.get(name)
        return y if bias is None else y + _rows(bias, index, dims)

    def _norm(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        return self._scaled(name, self._standard(x), index, x.dtype)

    def _clamped(self, x: Tensor) -> Tensor:
        """x [G, ...]; in fp16, and where a model does that, without infinities."""
        if not self.facts.layout.clamps or x.dtype != torch.float16:
            return x
        largest = torch.finfo(x.dtype).max
        is_inf = x.isinf().flatten(1).any(1).view(-1, *(1,) * (x.dim() - 1))
        limit = torch.where(is_inf, largest - 1000, largest).to(x.dtype)
        return x.clamp(-limit, limit)

    def _branch(self, x: Tensor, p: float) -> Tensor:
        """What is added to the residual: dropped out, and scaled where a model does that."""
        x = F.dropout(x, p, training=self.is_training) if p else x
        scale = self.facts.residual_scale
        return x if scale == 1.0 else x * scale


def _each(function: Callable[[Tensor], Tensor], layers: Layers) -> Layers:
    return function(layers) if isinstance(layers, Tensor) else tuple(map(function, layers))


def _chosen(layers: Layers, index: Tensor) -> Tensor:
    """[G, ...]: what the chosen layers have."""
    stack = layers if isinstance(layers, Tensor) else torch.stack(layers)
    return stack.index_select(0, index)


def _rows(layers: Layers, index: Tensor, dims: int) -> Tensor:
    """[G, 1, ..., D] with `dims` ones: the vectors of the chosen layers."""
    rows = _chosen(layers, index)
    return rows.view(-1, *(1,) * dims, rows.shape[-1])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [G, B, N, H, d] with its first r features rotated by position: x cos + half(x) sin."""
    r = cos.shape[-1]
    turned, rest = x[..., :r], x[..., r:]
    first, second = turned.chunk(2, -1)
    half = torch.cat((-second, first), -1)
    y = turned * cos[..., None, :] + half * sin[..., None, :]
    return y if rest.shape[-1] == 0 else torch.cat((y, rest.to(y.dtype)), -1)
