"""The router on a CPU: ATen's matrix product between native kernels.

Tokens go through in pieces, so that the weighted tokens w x stay in the cache and no [T, D] tensor
of them is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 512  # tokens: their weighted rows and a gate of common size share the second-level cache

molex = torch.ops.molex


def router_forward(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    expert_bias: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
    mix: Tensor | None,
    top_k: int,
    score: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """expert_index [T, K], expert_weight [T, K] and logits [T, E]."""
    wide = gate.float()
    logits = x.new_empty(x.shape[0], gate.shape[0], dtype=torch.float32)
    weigh = _Weigher(x, table, labels, mix)
    for piece in weigh.pieces:
        torch.mm(weigh(x, piece), wide.mT, out=logits[piece])
    if gate_bias is not None:
        logits += gate_bias.float()
    index, weight = molex.select_experts_cpu(logits, expert_bias, top_k, score)
    return index, weight, logits


def router_backward(
    x: Tensor,
    gate: Tensor,
    logits: Tensor,
    index: Tensor,
    weight: Tensor,
    grad_weight: Tensor | None,
    grad_logits: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
    mix: Tensor | None,
    score: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the gate and its bias; those not needed are empty."""
    needs_x, needs_gate, needs_bias = needs
    dz = molex.router_logits_bwd_cpu(logits, index, weight, grad_weight, grad_logits, score)
    wide = gate.float()
    dx = x.new_empty(x.shape if needs_x else (0,))
    dgate = wide.new_zeros(gate.shape if needs_gate else (0,))
    weigh = _Weigher(x, table, labels, mix)
    for piece in weigh.pieces:
        if needs_gate:
            dgate.addmm_(dz[piece].mT, weigh(x, piece))
        if needs_x:
            weigh.product(dz[piece], wide, dx, piece)
    dbias = dz.sum(0) if needs_bias else dz.new_empty(0)
    return dx, dgate.to(gate.dtype), dbias


class _Weigher:
    """Weighted tokens, piece by piece, in one buffer."""

    def __init__(
        self, x: Tensor, table: Tensor | None, labels: Tensor | None, mix: Tensor | None
    ) -> None:
        tokens = x.shape[0]
        self.table, self.labels, self.mix = table, labels, mix
        self.plain = table is None or labels is None
        # Without feature weights x is multiplied as it is: one piece.
        size = max(tokens, 1) if self.plain and x.dtype == torch.float32 else PIECE
        self.pieces = [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
        length = 0 if self.plain else min(size, tokens)
        self.buffer = x.new_empty(length, x.shape[1], dtype=torch.float32)

    def __call__(self, x: Tensor, piece: slice) -> Tensor:
        """w x of these tokens, in fp32; it stands until the next call."""
        if self.plain:
            return x[piece].float()
        out = self.buffer[: piece.stop - piece.start]
        self._into(x[piece], piece, out)
        return out

    def product(self, left: Tensor, right: Tensor, out: Tensor, piece: slice) -> None:
        """out = w (left right) for these tokens."""
        if self.plain:
            out[piece] = torch.mm(left, right)
        else:
            product = torch.mm(left, right, out=self.buffer[: piece.stop - piece.start])
            self._into(product, piece, out[piece])

    def _into(self, x: Tensor, piece: slice, out: Tensor) -> None:
        labels, mix = (None if t is None else t[piece] for t in (self.labels, self.mix))
        molex.weigh_tokens_cpu(x, self.table, labels, mix, out)
