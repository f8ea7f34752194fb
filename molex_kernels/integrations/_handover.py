"""What the layers of another library's decoder hand on to each other, in each forward pass.

ACMoE needs the routing of the MoE layer before, momentum its state. A decoder hands on the hidden
states alone, so the rest goes beside them, in an argument that the layers get from a hook and take
out again. The hook stands outside of what gradient checkpointing repeats and the argument inside,
so that a repeated layer gets what it got the first time, whatever has run since.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from molex_kernels.integrations._layers import Layers

_NAME = "molex_given"  # of the argument
_CACHES = ("cache", "past_key_values")  # the same, in releases of transformers


class Given:
    """What one layer gets in one forward pass, and what it makes for the layers after it.

    Attributes:
        before: by kind, what the layers before have made.
        made: by kind, what this layer has made.
        mask: bool [B, N], True for tokens that count, or None.
        tokens: (B, N) of the hidden states that the layer gets.
        has_grad: whether gradients were wanted where the decoder called the layer.
    """

    def __init__(
        self, before: dict[str, Any], mask: Tensor | None, tokens: tuple[int, ...]
    ) -> None:
        self.before = before
        self.made: dict[str, Any] = {}
        self.mask = mask
        self.tokens = tokens
        self.has_grad = torch.is_grad_enabled()


class Place:
    """A layer's place in the decoder, where the layer's parts find what it was given."""

    def __init__(self) -> None:
        self.given: Given | None = None


class Handover:
    """Of one decoder: hands on from layer to layer while the decoder's forward pass runs."""

    def __init__(self, decoder: nn.Module, layers: nn.ModuleList) -> None:
        parameters = inspect.signature(decoder.forward).parameters
        self.arguments = [name for name in parameters if name != "self"]
        self.no_cache: dict[str, str] = {}  # by kind, why
        self.is_running = False
        self.mask: Tensor | None = None
        self.last: Given | None = None
        self.hooks = [
            decoder.register_forward_pre_hook(self.begin, with_kwargs=True),
            decoder.register_forward_hook(self.end),
        ]
        for layer in layers:
            self.hooks.append(layer.register_forward_pre_hook(self.enter, with_kwargs=True))

    def begin(self, decoder: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the decoder: nothing has been made."""
        named = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        for kind, why in self.no_cache.items():
            if any(named.get(name) is not None for name in _CACHES):
                raise NotImplementedError(
                    f"cache: expected None with {kind}, got one: {why}. "
                    "generate(..., use_cache=False) runs"
                )
        mask = named.get("attention_mask")
        is_of_tokens = isinstance(mask, Tensor) and mask.dim() == 2
        self.mask = mask.bool() if is_of_tokens else None  # type: ignore[union-attr]
        self.last, self.is_running = None, True

    def end(self, decoder: nn.Module, args: Any, output: Any) -> None:
        """After the decoder: nothing is kept."""
        self.mask, self.last, self.is_running = None, None, False

    def enter(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before a layer: it gets what those before have made."""
        if not self.is_running:
            raise RuntimeError(
                f"{type(layer).__name__}: expected to run inside the forward pass of its decoder, "
                "from where it gets what the layers before have made, got a call from elsewhere. "
                "Use the model's gradient_checkpointing_enable() and no checkpoint around layers"
            )
        before = {} if self.last is None else {**self.last.before, **self.last.made}
        hidden = args[0] if args else kwargs.get("hidden_states")
        tokens = tuple(hidden.shape[:2]) if isinstance(hidden, Tensor) else ()
        self.last = Given(before, self.mask, tokens)
        return args, {**kwargs, _NAME: self.last}


class Part(nn.Module):
    """Base of what is mixed into the class of another library's module, beside its own code."""

    molex_place: Place

    def leave(self) -> None:
        """Takes out of the module what was added to it."""
        del self.molex_place

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, base = type(self).__bases__
        return _blank, (base, mixin), self.__dict__.copy()


class Layer(Part):
    """A decoder's layer, which takes what it is given out of its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        place = self.molex_place
        outer, place.given = place.given, kwargs.pop(_NAME, None)
        try:
            return super().forward(*args, **kwargs)
        finally:
            place.given = outer


@functools.cache
def _mixed(base: Any, mixin: Any) -> Any:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (mixin, base), names)


def _blank(base: Any, mixin: Any) -> Any:
    cls = _mixed(base, mixin)
    return cls.__new__(cls)


def mix_in(module: nn.Module, mixin: type[Part], place: Place) -> None:
    """Gives the module a class of the same name with `mixin` in front: parameters stay."""
    if not isinstance(module, mixin):
        classes: Any = (type(module), mixin)
        module.__class__ = _mixed(*classes)
    module.molex_place = place  # type: ignore[assignment]


class Stack(Layers):
    """The decoder of a model with mixtures of experts.

    `parent` is the decoder, and `blocks` the modules whose child `experts` are the experts.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, "experts", _block)

    def handover(self) -> Handover:
        """The decoder's, made when something is installed for the first time."""
        found = getattr(self.parent, "molex_handover", None)
        if isinstance(found, Handover):
            return found
        made = Handover(self.parent, self.layers)
        self.parent.molex_handover = made  # type: ignore[assignment]
        for layer in self.layers:
            mix_in(layer, Layer, Place())
        return made

    def place(self, index: int) -> Place:
        """Where the parts of this layer find what it was given."""
        place: Any = self.layers[index].molex_place
        return place

    def uninstall(self) -> bool:
        """Puts back every class and takes away every hook; False where there is nothing."""
        return take_out(self.parent, self.layers)


def take_out(parent: nn.Module, layers: nn.ModuleList) -> bool:
    """Puts back every class and takes away every hook; False where there is nothing."""
    handover = getattr(parent, "molex_handover", None)
    if not isinstance(handover, Handover):
        return False
    parts = [module for module in layers.modules() if isinstance(module, Part)]
    for part in parts:
        if Part not in type(part).__bases__[0].__bases__:
            raise ValueError(
                f"model: expected {type(part).__name__} as it was installed, got one that has "
                "been wrapped since (by FSDP or a parametrization)"
            )
    for part in parts:
        part.leave()
        part.__class__ = type(part).__bases__[1]
    for hook in handover.hooks:
        hook.remove()
    del parent.molex_handover
    return True


def _block(layer: nn.Module) -> nn.Module | None:
    with_experts = (
        m for m in layer.modules() if isinstance(getattr(m, "experts", None), nn.Module)
    )
    return next(with_experts, None)
