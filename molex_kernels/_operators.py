"""Custom operators: the only caller of `torch.library`.

Every implementation of a pass is an operator of its own, `molex::<name>`, opaque to `torch.compile`
and to CUDA graphs. The operators know nothing of autograd: a ctx-style `autograd.Function` outside
them does, and is skipped where nothing needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("molex", "DEF")

# The operators that are left to the compiled extension, named after their device: `<pass>_cpu`.
COMPILED: list[str] = []


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    run: Callable[..., Any] | None = None,
) -> Any:
    """Defines `molex::<name>` and returns the operator, ready to call.

    `schema` is the part after the name, "(Tensor x, int top_k) -> Tensor". `run` computes it on any
    device; without it the compiled extension registers the operator for its own device. `fake`
    allocates the outputs (`new_empty`), exactly as the implementation does.
    """
    _LIBRARY.define(name + schema)
    if run is None:
        COMPILED.append(name)
    else:
        _LIBRARY.impl(name, _on_device_of_first_tensor(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"molex::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.molex, name).default


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _on_device_of_first_tensor(run: Callable[..., Any]) -> Callable[..., Any]:
    # Triton launches on the current device, which need not be the one that holds the tensors.
    def guarded(*args: Any) -> Any:
        device = args[0].device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return guarded
