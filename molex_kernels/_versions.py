"""Whether tensors are what they were: for what is computed of parameters and kept.

PyTorch counts the changes of a tensor in place (`Tensor._version`). Its fused optimizers change
parameters without counting, so that the steps of optimizers are watched as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_live: weakref.WeakSet[Versions] = weakref.WeakSet()


class _Steps:
    """The steps of optimizers inside a graph, where it is not known what they change."""

    is_watched = False
    has_stepped = False
    generation = 0


class Versions:
    """Tensors by name as they are now; `check` raises where one of them is not that any more.

    Not seen is what goes past PyTorch: a change by way of `.data`, or when a CUDA graph is
    replayed. `with_gradients` are the names of those that a graph was recorded for, if one was.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_inference():
                raise ValueError(
                    f"{name}: expected a tensor whose changes are counted, got one made in "
                    "torch.inference_mode()"
                )
        self._keep(tensors, set())
        is_recorded = torch.is_grad_enabled()
        self.with_gradients = {n for n, t in tensors.items() if is_recorded and t.requires_grad}

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which are of their own tensors and count anew."""
        is_old = self._generation != _generation()
        changed = {n for n, (t, _, _) in self._kept.items() if is_old or self._has_changed(n, t)}
        return {"tensors": {n: t for n, (t, _, _) in self._kept.items()}, "changed": changed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._keep(state["tensors"], state["changed"])
        self.with_gradients = set()  # a graph is not copied

    def _keep(self, tensors: Mapping[str, Tensor], changed: set[str]) -> None:
        # The alias keeps the memory, so that no other tensor has its address.
        self._kept = {name: (t, t.detach(), t._version) for name, t in tensors.items()}
        self._changed = changed
        self._generation = _generation()
        _watch(self)

    def check(self, tensors: Mapping[str, Tensor], of: str) -> None:
        """That these are the same tensors, unchanged. `of` names what was computed of them."""
        for name in self._kept:
            if name not in tensors:
                raise ValueError(f"{name}: expected that of which {of} were made, got None")
        for name, tensor in tensors.items():
            if name not in self._kept:
                raise ValueError(f"{name}: expected None, for {of} were made without")
            if self._is_other(name, tensor):
                raise ValueError(
                    f"{name}: expected the tensor of which {of} were made, got another. "
                    f"Make {of} anew"
                )
            if self._has_changed(name, tensor):
                raise ValueError(
                    f"{name}: expected the values of which {of} were made, but it has changed "
                    f"since. Make {of} anew"
                )
        if self._generation != _generation():
            raise ValueError(
                f"{of}: expected those of the parameters as they are, but a compiled optimizer "
                "has stepped since. Make them anew"
            )

    def _is_other(self, name: str, tensor: Tensor) -> bool:
        kept, alias, _ = self._kept[name]
        return tensor is not kept or _address(tensor) != _address(alias)

    def _has_changed(self, name: str, tensor: Tensor) -> bool:
        version = self._kept[name][2]
        return name in self._changed or tensor._version != version or self._is_other(name, tensor)

    def step(self, stepped: set[int]) -> None:
        """Marks the tensors whose memory an optimizer has written."""
        for name, (tensor, _, _) in self._kept.items():
            if _memory(tensor) in stepped:
                self._changed.add(name)


def _watch(versions: Versions) -> None:
    if not _Steps.is_watched:
        _Steps.is_watched = True
        register_optimizer_step_post_hook(_after_step)
    _live.add(versions)


def _after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        _Steps.has_stepped = True  # and nothing is read, which the graph would be guarded by
    elif _live:
        stepped = {_memory(p) for group in optimizer.param_groups for p in group["params"]}
        for versions in list(_live):
            versions.step(stepped)


def _generation() -> int:
    if _Steps.has_stepped:
        _Steps.has_stepped = False
        _Steps.generation += 1
    return _Steps.generation


def _address(tensor: Tensor) -> int:
    """0 where there is no memory: of fake tensors and those of functorch."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _memory(tensor: Tensor) -> int:
    """What a tensor shares with its views."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except RuntimeError:
        return id(tensor)
