"""Custom operators: the only caller of `torch.library`. An op is stated once, by two schemas.

A `Pass` is an op with its gradient. It defines `molex::<name>_fwd` and `molex::<name>_bwd` (or
`molex::<name>` where there is no gradient), opaque to `torch.compile` and to CUDA graphs;
everything else follows from the names in the schemas:

- an argument `keeps_...` of the forward pass is filled in here: True where a gradient is wanted;
- the backward pass takes `d<result>` for results that are handed out, then tensors saved under the
  names of arguments or results of the forward pass, then its options, then `bool[] needs`;
- it returns `d<argument>` for each differentiable argument, empty where it is not needed.

Every schema ends in `str impl=''`. '' is what the tensors' device has, of several the one that the
op chooses by shape: that is what calls pass whose caller named none, so that an exported graph
names neither an implementation nor a device. The compiled extension registers its kernels on the
keys CPU and CUDA; `_Operator.run` serves what has no kernel of its own: Triton's launchers on a
GPU, and the reference where nothing else can run.

The operators know nothing of autograd: an `autograd.Function` outside them does, which is skipped
where nothing needs a gradient.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from molex_kernels import _backends, _extension
from molex_kernels._differentiable import Differentiable

_LIBRARY = torch.library.Library("molex", "DEF")
_ARGUMENT = re.compile(r"(\w+(?:\[\])?\??)\s+(\w+)")

Values = tuple[Any, ...]

_EMPTY = torch.Size([0])

OPERATORS: list[_Operator] = []


class _Operator:
    """`molex::<name>` with one schema: where it runs, and its shapes for tracing.

    `function` names what computes it in the modules `triton` (launchers) and `cpu` (Python), of the
    arguments in a named tuple: the schema is where they are listed.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., Any],
        *,
        function: str,
        triton: str | None = None,
        cpu: str | None = None,
        native: Sequence[str] = (),
        reference: Callable[..., Any] | None = None,
        choose: Callable[[Any], str] | None = None,
    ) -> None:
        arguments, results = schema.split("->")
        self.name, self.fake, self.reference, self.choose = name, fake, reference, choose
        self.arguments = [n for _, n in _ARGUMENT.findall(arguments)]
        self.types = [t for t, _ in _ARGUMENT.findall(arguments)]
        self.results = [n for _, n in _ARGUMENT.findall(results)] or ["y"]
        self.named: Any = namedtuple(f"{name}_arguments", self.arguments)  # type: ignore[misc]
        self.function = function
        self.modules = {"triton": triton, "cpu": cpu}
        self.native: dict[str, Any] = {}  # kernels of the extension that stand behind `run`
        self.runners: dict[tuple[str, str], Callable[..., Any]] = {}  # by impl and device
        _extension.EXPECTED.extend(f"{device}:{name}" for device in native)
        _LIBRARY.define(f"{name}{arguments.rstrip()[:-1]}, str impl='') -> {results}")
        _LIBRARY.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"molex::{name}", self._fake, lib=_LIBRARY)
        self.overload = getattr(torch.ops.molex, name).default
        torch.library.register_vmap(f"molex::{name}", self._each, lib=_LIBRARY)
        OPERATORS.append(self)

    def run(self, *arguments: Any) -> Any:
        """Computes it on a device for which no kernel is registered, or with the one named."""
        count = len(self.arguments)
        impl = arguments[count] if len(arguments) > count else ""
        arguments = arguments[:count]
        device = _device(arguments)
        if self.choose and not impl and not _backends.DEFAULT:
            impl = self.choose(self.named(*arguments))
        place = (impl, device.type)
        if place not in self.runners:
            self.runners[place] = self._runner(*place)
        # Launches go to the current device, which need not be the one that holds the tensors.
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.runners[place](*arguments)
        return self.runners[place](*arguments)

    def _runner(self, impl: str, device: str) -> Callable[..., Any]:
        """What computes it, with the implementation named or the first that this device has."""
        preferred = [_backends.DEFAULT] if _backends.DEFAULT else []
        order = [impl] if impl else [*preferred, "cpu", "triton", "cuda", "reference"]
        for name in order:
            runs = name == device
            if name == "triton":  # which says itself what it cannot do, if it was named
                runs = bool(impl) or _backends.runs_triton(device)
            if name == "reference":
                return self._by_reference
            if runs and name in self.native:
                return self.native[name]
            if runs and (module := self.modules.get(name)):
                function = getattr(importlib.import_module(module), self.function)
                if name == "triton":
                    return _replayed(function, self.named)
                return lambda *arguments: function(self.named(*arguments))
            if runs and self._is_native(name):  # which has loaded and registered it
                return partial(self.overload, impl=impl)
        raise NotImplementedError(f"molex::{self.name}: there is no impl={impl!r} on {device}")

    def _is_native(self, name: str) -> bool:
        return f"{name}:{self.name}" in _extension.EXPECTED and _extension.why_not(name) is None

    def _by_reference(self, *arguments: Any) -> Any:
        keeps = [
            a for n, a in zip(self.arguments, arguments, strict=True) if n.startswith("keeps_")
        ]
        if self.reference is None or any(keeps):
            device = _device(arguments).type
            raise NotImplementedError(
                f"molex::{self.name}: a graph with gradients needs a kernel for {device}, and "
                f"there is none: {_extension.why_not(device) or 'none is written'}"
            )
        named = self.named(*arguments)
        # What is only kept for a gradient is empty, and an input may not be handed out.
        results = list(_tuple(self.fake(named)))
        for index, found in enumerate(_tuple(self.reference(named))):
            if found is not None:
                results[index].copy_(found)
        return results[0] if len(results) == 1 else tuple(results)

    def _fake(self, *arguments: Any) -> Any:
        return self.fake(self.named(*arguments[: len(self.arguments)]))

    def _each(self, info: Any, in_dims: Values, *arguments: Any) -> tuple[Any, Any]:
        """The operator for each of a batch in turn, for `torch.func.vmap`."""
        if info.batch_size == 0:
            raise ValueError(
                f"molex::{self.name}: expected a batch of at least 1 under vmap, got 0"
            )
        found = [
            self.overload(*(_pick(a, d, index) for a, d in zip(arguments, in_dims, strict=False)))
            for index in range(info.batch_size)
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])

    def stand_before(self, device: str) -> None:
        """Puts `run` before the extension's kernel on this device, where another one runs there."""
        key = device.upper()
        kernel = torch.library.get_kernel(f"molex::{self.name}", key)
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        self.native[device] = lambda *arguments: kernel.call_boxed(keys, *arguments, device)
        self.runners.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*previously registered kernel")
            _LIBRARY.impl(self.name, self.run, key)


def _replayed(function: Callable[..., Any], named: Any) -> Callable[..., Any]:
    """A launcher, whose calls are replayed where Triton starts kernels on a GPU."""
    from molex_kernels._triton.replay import Replayed

    return Replayed(function, named)


@_extension.when_loaded
def _stand_before_natives(operators: Sequence[str]) -> None:
    """Interpreted Triton shares the key CPU with the extension's kernels, compiled Triton CUDA."""
    for operator in OPERATORS:
        for device in ("cpu", "cuda"):
            shares = operator.modules["triton"] and _backends.runs_triton(device)
            if shares and f"{device}:{operator.name}" in operators:
                operator.stand_before(device)


def operator(name: str, schema: str, fake: Callable[..., Any], **places: Any) -> Any:
    """One operator by itself; the arguments are those of `_Operator`."""
    return _Operator(name, schema, fake, **places).overload


class Pass(Differentiable):
    """An op with its gradient: called as `op(impl, *arguments)`, without the `keeps_...` argument.

    Args:
        name: of the operators.
        forward: schema of the forward pass, "(Tensor x, int top_k) -> (Tensor y, Tensor kept)".
        backward: schema of the backward pass; None for an op without a gradient.
        fake: allocates the results of the forward pass (`new_empty`), exactly as they are, from
            its arguments, a named tuple.
        fake_backward: allocates those of the backward pass; None derives them: each is like its
            argument, or like `like[argument](arguments)` where the backward pass does not take it.
        like: see there.
        triton: the module with the launchers `<name>_forward` and `<name>_backward`.
        cpu: the module with functions of these names in Python, in place of the extension's.
        native: devices for which the extension has kernels.
        reference: the forward pass in plain PyTorch, of the same named tuple, for devices that
            have nothing else.
        choose: of the named tuple of either pass, the implementation that takes a call which names
            none, or "" for the first that the device has. It has to give both passes the same.
        public: how many of the results are handed out; None: those before the first without a
            gradient.
        op: what callers know it as, for error messages; None: by the name.
    """

    def __init__(
        self,
        name: str,
        forward: str,
        backward: str | None = None,
        *,
        fake: Callable[..., Any],
        fake_backward: Callable[..., Any] | None = None,
        like: Mapping[str, Callable[..., Tensor]] | None = None,
        triton: str | None = None,
        cpu: str | None = None,
        native: Sequence[str] = ("cpu",),
        reference: Callable[..., Any] | None = None,
        choose: Callable[[Any], str] | None = None,
        public: int | None = None,
        op: str | None = None,
    ) -> None:
        places: dict[str, Any] = {
            "triton": triton,
            "cpu": cpu,
            "native": native,
            "choose": choose,
        }
        first = _Operator(
            name if backward is None else f"{name}_fwd",
            forward,
            fake,
            function=f"{name}_forward",
            reference=reference,
            **places,
        )
        self.name, self.forward = name, first.overload
        self.names, self.results = first.arguments, first.results
        self.keeps = next((i for i, n in enumerate(self.names) if n.startswith("keeps_")), None)
        self.lists = [i for i, t in enumerate(first.types) if t == "Tensor[]"]
        self.single = len(self.results) == 1
        self.public = len(self.results) if public is None else public
        self.wants: list[int] = []
        self.op = op or name
        if backward is None:
            return
        second = _Operator(
            f"{name}_bwd",
            backward,
            fake_backward or self._fake_backward,
            function=f"{name}_backward",
            **places,
        )
        self.backward = second.overload
        self._wire(second, like or {}, public)
        super().__init__(op or name, self.fixed)

    def _wire(self, backward: _Operator, like: Mapping[str, Any], public: int | None) -> None:
        """Resolves the names of the backward schema; one that nothing has fails at import."""
        self.taken, self.given, self.like = backward.arguments, backward.results, like
        if backward.results == ["y"]:
            raise ValueError(f"{backward.name}: expected named gradients")
        upstream = [n[1:] for n in self.taken if n[0] == "d" and n[1:] in self.results]
        if public is None:
            self.public = sum(n in upstream for n in self.results)
        self.fixed = [i for i in range(self.public) if self.results[i] not in upstream]
        self.upstream = _getter([self.results.index(n) for n in upstream])
        # Which upstream gradients the backward pass may go without.
        self.optional = [t.endswith("?") for t in backward.types[: len(upstream)]]
        self.takes_needs = self.taken[-1] == "needs"
        names = [*self.names, *self.results]
        kept = list(zip(self.taken, backward.types, strict=True))[len(upstream) :]
        kept = kept[: len(kept) - self.takes_needs]
        saved = [names.index(n) for n, t in kept if "Tensor" in t]
        self.saved = _getter(saved)
        self.options = _getter([names.index(n) for n, t in kept if "Tensor" not in t])
        self.saved_lists = [place for place, index in enumerate(saved) if index in self.lists]
        self.wants = [self.names.index(n) for n in self.differentiable()]

    def differentiable(self) -> Sequence[str]:
        """The arguments that get a gradient, in the order in which `differentiate` gives them."""
        return [n[1:] for n in self.given]

    def __call__(self, impl: str | None, *arguments: Any) -> Any:
        """The results that are handed out; through autograd where a gradient is wanted."""
        self.refuse_tangents(arguments)
        wants = False
        if torch.is_grad_enabled():
            for index in self.wants:
                argument = arguments[index]
                if argument is None:
                    continue
                if index in self.lists:
                    wants = any(t.requires_grad for t in argument)
                else:
                    wants = argument.requires_grad
                if wants:
                    break
        if self.keeps is not None:  # behind every differentiable argument
            arguments = (*arguments[: self.keeps], wants, *arguments[self.keeps :])
        if wants:
            if not self.lists:
                return self.apply(impl or "", *arguments)
            counts = tuple(len(arguments[i]) for i in self.lists)
            return self.apply(impl or "", counts, *_ungrouped(arguments, self.lists))
        found = self.forward(*arguments, impl) if impl else self.forward(*arguments)
        if self.single:
            return found
        return found[0] if self.public == 1 else tuple(found[: self.public])

    def call(self, impl: str, *arguments: Any) -> tuple[Values, Sequence[Any], Values]:
        if self.lists:
            counts, flat = arguments[0], arguments[1:]
            arguments = _grouped(flat, self.lists, counts)
        found = self.forward(*arguments, impl) if impl else self.forward(*arguments)
        results = (found,) if self.single else tuple(found)
        values = arguments + results
        saved, options = self.saved(values), self.options(values)
        if self.public < len(results):
            results = results[: self.public]
        if not self.lists:
            return results, saved, (impl, options, None)
        sizes = [len(saved[i]) for i in self.saved_lists]
        given = [arguments[i] for i in self.lists]
        dims = [tensors[0].dim() if tensors else 0 for tensors in given]
        saved = _ungrouped(saved, self.saved_lists)
        return results, saved, (impl, options, (counts, sizes, dims))

    def gradients(
        self, upstream: Values, saved: Values, constants: Values, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        impl, options, layout = constants
        if layout is None:
            wants = [needs[1 + i] for i in self.wants]
        else:
            grouped = _grouped(needs[2:], self.lists, layout[0])
            saved = _grouped(saved, self.saved_lists, layout[1])
            wants = [any(grouped[i]) if i in self.lists else grouped[i] for i in self.wants]
        # Tracing makes gradients for empty results.
        given = [
            None if g is not None and optional and g.shape == _EMPTY else g
            for g, optional in zip(self.upstream(upstream), self.optional, strict=True)
        ]
        found = self.differentiate(given, saved, options, wants, impl)
        gradients: list[Any] = [None] * (1 + len(self.names))
        if found is not None:
            for index, gradient, need in zip(self.wants, found, wants, strict=True):
                if need:
                    gradients[1 + index] = gradient
        if layout is None:
            return gradients
        return [None, None, *self._flat(gradients[1:], layout[0], layout[2])]

    def differentiate(
        self,
        upstream: list[Tensor | None],
        saved: Values,
        options: Values,
        wants: list[bool],
        impl: str,
    ) -> Sequence[Tensor | None] | None:
        """Gradients of the differentiable arguments; None where nothing comes down."""
        if all(gradient is None for gradient in upstream):
            return None
        for index, gradient in enumerate(upstream):
            if gradient is None and not self.optional[index]:
                upstream[index] = torch.zeros_like(saved[0])
        last = (wants,) if self.takes_needs else ()
        named = (impl,) if impl else ()
        found = self.backward(*upstream, *saved, *options, *last, *named)
        return found if isinstance(found, tuple) else (found,)

    def _flat(self, gradients: list[Any], counts: Values, dims: list[int]) -> Values:
        """The gradient of a list is stacked: it is that of its one stacked tensor, or of many."""
        for index, count, dim in zip(self.lists, counts, dims, strict=True):
            gradient = gradients[index]
            if gradient is None:
                gradients[index] = (None,) * count
            else:
                gradients[index] = (gradient,) if gradient.dim() == dim else gradient.unbind(0)
        return _ungrouped(gradients, self.lists)

    def _fake_backward(self, given: Any) -> Any:
        needs = given.needs if self.takes_needs else [True] * len(self.given)
        first = next(g for g in given if isinstance(g, Tensor))
        found = []
        for gradient, need in zip(self.given, needs, strict=True):
            own = self.like.get(gradient[1:])
            tensor = own(given) if own else getattr(given, gradient[1:])
            size = (0,) if tensor is None or not need else tensor.shape
            found.append((first if tensor is None else tensor).new_empty(size))
        return found[0] if len(found) == 1 else tuple(found)


def _getter(places: Sequence[int]) -> Callable[[Values], Values]:
    """Takes the values at these places, as a tuple."""
    # Written out, it takes a third of a comprehension's time, and Dynamo traces no itemgetter.
    return eval(f"lambda values: ({''.join(f'values[{place}], ' for place in places)})")


def _tuple(found: Any) -> Values:
    return found if isinstance(found, tuple) else (found,)


def _grouped(flat: Sequence[Any], lists: Sequence[int], counts: Sequence[int]) -> Values:
    """The values with those that belong to the lists (by place) together again."""
    found: list[Any] = []
    start = 0
    for place, count in zip(lists, counts, strict=True):
        stop = start + place - len(found)
        found += flat[start:stop]
        start = stop + count
        found.append(flat[stop:start])
    return (*found, *flat[start:])


def _ungrouped(values: Sequence[Any], lists: Sequence[int]) -> Values:
    """The values, with those of the lists one by one."""
    flat: list[Any] = []
    start = 0
    for place in lists:
        flat += values[start:place]
        flat += values[place]
        start = place + 1
    return (*flat, *values[start:])


def _pick(argument: Any, dim: Any, index: int) -> Any:
    if isinstance(argument, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_pick(a, d, index) for a, d in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, index)


def _device(arguments: Sequence[Any]) -> torch.device:
    """That of the first tensor."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device
    raise TypeError("expected a tensor among the arguments")
