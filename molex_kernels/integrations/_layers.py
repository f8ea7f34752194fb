"""Where the layers of another library's model are, and what an installation looks for in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from molex_kernels import _check


class Layers:
    """The one list of layers in a model of which some have what is asked for.

    Attributes:
        what: its name, in errors.
        parent: the module that has the list.
        layers: all of them.
        blocks: by index, what `find` found in a layer.
    """

    def __init__(self, model: Any, what: str, find: Callable[[nn.Module], Any]) -> None:
        """Looks through the model; `find` returns None for a layer without."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(model).__name__}")
        found: dict[str, tuple[nn.Module, nn.ModuleList, dict[int, Any]]] = {}
        for path, parent in model.named_modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.ModuleList):
                    each = {index: find(layer) for index, layer in enumerate(child)}
                    blocks = {index: block for index, block in each.items() if block is not None}
                    if blocks:
                        found[f"{path}.{name}".removeprefix(".")] = (parent, child, blocks)
        if len(found) != 1:
            which = f" ({', '.join(found)})" if found else ""
            raise ValueError(
                f"model: expected one stack of layers with {what}, got {type(model).__name__} "
                f"with {len(found)}{which}"
            )
        self.what = what
        self.parent, self.layers, self.blocks = next(iter(found.values()))

    def chosen(self, layers: Any) -> list[int]:
        """The indices of `layers`, which have to have it; None is all that have."""
        if layers is None:
            return sorted(self.blocks)
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"layers: expected indices of layers or None, got {layers!r}")
        chosen = list(layers)
        for index in chosen:
            _check.integer("layers", index, 0, len(self.layers) - 1, " (the last layer)")
            if index not in self.blocks:
                raise ValueError(
                    f"layers: expected layers with {self.what}, {sorted(self.blocks)}, got {index}"
                )
        return sorted(set(chosen))


def check_open(name: str, module: nn.Module) -> None:
    """Refuses a module whose class is not what its call runs."""
    if "forward" in module.__dict__:
        raise ValueError(
            f"model: expected {name} to run the forward of its class, got "
            f"{type(module).__name__} with one of its own (offloading sets one: install first)"
        )
