"""Another library's attention masks, as the mask of keys that this package's attention takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FAR = -1e4  # what a softmax in any dtype takes for minus infinity


def key_mask_of(
    mask: Any, batch: int, tokens: int, is_causal: bool, device: torch.device
) -> Tensor | None:
    """Which tokens there are, by a mask that says no more than that and causality.

    Args:
        mask: None; [B, N], non-zero for a token; or [B, H, N, N], any of B, H and the first N
            perhaps 1: bool, True for what is seen, or additive, 0 for it and -1e4 or less for what
            is not. Causal ones are a triangle over the tokens. The last row tells which tokens
            there are; other rows of padding hold anything.
        batch: B.
        tokens: N.
        is_causal: whether a mask [B, H, N, N] has to be a triangle.
        device: of the result.

    Returns:
        [B, N] bool, or None for all.

    Raises:
        ValueError: a tensor of another shape, or values that say something else (where they are on
            a CPU; elsewhere an assertion on the device fails).
        NotImplementedError: no tensor, such as flex attention's.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"attention_mask: expected a tensor or None with install_rpc_attention, got "
            f"{type(mask).__name__} (flex attention's: set_attn_implementation to another)"
        )
    mask = mask.to(device)
    if mask.shape == (batch, tokens):
        return mask.bool()
    rows_fit = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[2] in (1, tokens)
    if not rows_fit or mask.shape[3] != tokens:
        raise ValueError(
            f"attention_mask: expected [B, N] or [B, H, N, N] with B={batch} and N={tokens}, "
            f"got {list(mask.shape)}"
        )
    if mask.stride(2) == 0:
        mask = mask[:, :, :1]  # all rows are one
    if mask.stride(1) == 0:
        mask = mask[:, :1]  # and all heads
    seen = mask if mask.dtype == torch.bool else mask == 0
    keys = seen[:, 0, -1]
    want = keys[:, None, None]
    if is_causal and tokens > 1:
        want = want & torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    if mask.dtype != torch.bool or want.shape != seen.shape or seen.shape[2] > 1:
        agrees = seen == want
        if mask.dtype != torch.bool:
            agrees &= seen | (mask <= _FAR)
        if agrees.shape[2] == tokens:
            # The results of padding are not used. A last row without any token tells nothing of it.
            padding = ~keys & keys.any(1, keepdim=True)
            agrees |= padding[:, None, :, None]
        kind = "causal mask" if is_causal else "mask"
        require(
            agrees.all(),
            f"attention_mask: expected a padding mask or a {kind} of the tokens, the same for all "
            "heads, with install_rpc_attention, got one that says more: a bias, a window, blocks",
        )
    return keys.expand(batch, tokens)


def require(condition: Tensor, message: str) -> None:
    """Fails where the condition is False: at once on a CPU, elsewhere without waiting for it."""
    if condition.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)
