"""Robust and scaled attention as modules, in the place of a vision transformer's attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from molex_kernels import _backends, _check, _modules, _published
from molex_kernels.ops.rpc_attention.api import (
    CAUSAL,
    THRESHOLDS,
    check_bound,
    rpc_attention,
    scaled_attention,
)

S_KINDS = ("scalar", "matrix")
# Names in checkpoints; no attention here has all of them, and none has the norms.
PUBLISHED = (
    *("qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "s"),
    *("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"),
)


class _Attention(_modules.Module):
    """`qkv` and `proj` around heads, under the names that timm and the published code have."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        parts: int,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
        impl: str | None,
        where: dict[str, Any],
    ) -> None:
        super().__init__()
        _check.integer("num_heads", num_heads, 1)
        _check.integer("dim", dim, 1)
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads={num_heads}, got {dim}")
        _check.probability("attn_drop", attn_drop)
        _check.probability("proj_drop", proj_drop)
        _check.flags(qkv_bias=qkv_bias)
        _backends.check_impl(impl)
        self.dim = dim
        self.num_heads = num_heads
        self.parts = parts
        self.attn_drop = attn_drop
        self.impl = impl
        self.qkv = nn.Linear(dim, parts * dim, bias=qkv_bias, **where)
        self.proj = nn.Linear(dim, dim, **where)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Draws both linear layers anew."""
        self.qkv.reset_parameters()
        self.proj.reset_parameters()

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, N, C] -> [B, H, N, d] for each of q (where there is one), k and v."""
        dim = self.dim
        _check.floating("x", x, "B, N, C", (None, None, dim))
        if _modules.is_plain(self.qkv, nn.Linear):
            _modules.check_dtype(x, self.qkv.weight)
        batch, tokens = x.shape[:2]
        parts = self.qkv(x).view(batch, tokens, self.parts, self.num_heads, dim // self.num_heads)
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def _out(self, heads: Tensor) -> Tensor:
        return self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))

    def load_published(self, state_dict: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Copies `qkv.*`, `proj.*` and `s` from one layer's names, alone or under a prefix.

        Args:
            state_dict: of the checkpoint, or of a whole model.
            prefix: what the names of this layer start with; "" takes them from anywhere.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a missing name, a name under two prefixes (the message says which), another
                shape, no name with this prefix, or weights that this module has no place for.
        """
        _published.load(self, state_dict, {name: name for name in PUBLISHED}, prefix=prefix)


def _no_mask(attn_mask: Any, instead: str) -> None:
    if attn_mask is not None:
        raise ValueError(f"attn_mask: expected None ({instead}), got {type(attn_mask).__name__}")


class RPCAttention(_Attention):
    """Robust attention (`rpc_attention`) between two linear layers: [B, N, C] -> [B, N, C].

    A drop-in for the attention of a timm vision transformer, whose blocks call it as they stand;
    `integrations.timm.install_rpc_attention` puts it into a model with the model's own weights.

    Args:
        dim: C.
        num_heads: H, a divisor of C. Where d = C / H is above 128, the reference runs.
        num_iters: 1 or more; the published models have 4, 5 or 6 in their first layer alone, or 2
            in every layer.
        lam: the threshold's factor; 4 in the published runs. 0 takes everything for sparse.
        robust: False is plain symmetric attention, as in the other layers of the published models:
            one iteration with S empty.
        projection: "kv" has k and v alone, as published: `qkv` has 2 C rows, k's first. "qkv" has q
            as well and gives it to `rpc_attention`.
        qkv_bias: whether `qkv` has a bias.
        attn_drop: probability that an element of the softmax is dropped, in training.
        proj_drop: probability that an element of the output is dropped, in training.
        threshold: as in `rpc_attention`.
        mu_width: as in `rpc_attention`.
        mu_divisor: as in `rpc_attention`.
        causal: as in `rpc_attention`.
        impl: passed to `rpc_attention` at each call.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_iters: int = 4,
        lam: float = 4.0,
        robust: bool = True,
        projection: str = "kv",
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        threshold: str = "lam_times_mu",
        mu_width: int | None = None,
        mu_divisor: float = 4.0,
        causal: bool | str = False,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.choice("projection", projection, ("kv", "qkv"))
        _check.choice("threshold", threshold, THRESHOLDS)
        _check.choice("causal", causal, CAUSAL)
        _check.integer("num_iters", num_iters, 1)
        check_bound(lam, mu_width, mu_divisor)
        _check.flags(robust=robust)
        where: Any = {"device": device, "dtype": dtype}
        drops = (attn_drop, proj_drop)
        super().__init__(dim, num_heads, len(projection), qkv_bias, *drops, impl, where)
        self.num_iters = num_iters
        self.lam = lam
        self.robust = robust
        self.threshold = threshold
        self.mu_width = mu_width
        self.mu_divisor = mu_divisor
        self.causal = causal

    @_modules.fx_leaf
    def forward(
        self,
        x: Tensor,
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends within each sequence.

        Args:
            x: [B, N, C].
            attn_mask: what timm's blocks hand on; a mask of scores is refused.
            is_causal: what timm's blocks hand on; True makes this call causal.
            key_mask: [B, N] bool or None, as in `rpc_attention`.

        Returns:
            [B, N, C].

        Raises:
            ValueError: there is an `attn_mask`.
        """
        _no_mask(attn_mask, "key_mask [B, N] tells which tokens there are")
        *q, k, v = self._heads(x)
        low = rpc_attention(
            k,
            v,
            q=q[0] if q else None,
            **self._split_options(),
            causal=self.causal or is_causal,
            key_mask=key_mask,
            dropout_p=self.attn_drop if self.training else 0.0,
            impl=self.impl,
        )
        return self._out(low)  # type: ignore[arg-type]

    def _split_options(self) -> dict[str, Any]:
        """The arguments of `rpc_attention` that say how k is split."""
        if not self.robust:
            return {"num_iters": 1, "threshold": torch.inf}
        return {
            "num_iters": self.num_iters,
            "lam": self.lam,
            "threshold": self.threshold,
            "mu_width": self.mu_width,
            "mu_divisor": self.mu_divisor,
        }

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_iters={self.num_iters}, lam={self.lam}, "
            f"robust={self.robust}, threshold={self.threshold!r}, causal={self.causal!r}"
        )


class ScaledAttention(_Attention):
    """Scaled attention (`scaled_attention`) between two linear layers: [B, N, C] -> [B, N, C].

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        num_tokens: N, for kind="matrix": each input has to have this many tokens.
        kind: "scalar", one learned number, or "matrix", a learned [H, N, N]; both start at 0, which
            is ordinary attention.
        qkv_bias: as in `RPCAttention`.
        proj_drop: as in `RPCAttention`.
        impl: as in `RPCAttention`.
        device: as in `RPCAttention`.
        dtype: as in `RPCAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int | None = None,
        *,
        kind: str = "scalar",
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.choice("kind", kind, S_KINDS)
        if kind == "matrix":
            _check.integer("num_tokens", num_tokens, 1)
        where: Any = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, 3, qkv_bias, 0.0, proj_drop, impl, where)
        sizes: Any = (1,) if kind == "scalar" else (num_heads, num_tokens, num_tokens)
        self.s = nn.Parameter(torch.zeros(sizes, **where))

    def reset_parameters(self) -> None:
        """Draws both linear layers anew and sets s to 0."""
        super().reset_parameters()
        nn.init.zeros_(self.s)

    @_modules.fx_leaf
    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Attends within each sequence.

        Args:
            x: [B, N, C].
            attn_mask: what timm's blocks hand on; a mask of scores is refused.
            is_causal: what timm's blocks hand on; True is refused.

        Returns:
            [B, N, C].

        Raises:
            ValueError: there is an `attn_mask`, or `is_causal` is True.
        """
        _no_mask(attn_mask, "scaled attention has no mask")
        if is_causal:
            raise ValueError("is_causal: expected False, scaled attention has no mask; got True")
        q, k, v = self._heads(x)
        return self._out(scaled_attention(q, k, v, self.s, impl=self.impl))
