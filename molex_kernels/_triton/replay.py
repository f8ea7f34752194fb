"""A call of an operator whose like was made before: its allocations and launches, and no more.

What leads to them, sizes and configurations and checks, takes longer on the host than most of these
kernels run. It depends on what `_key` holds and on nothing else: no launcher reads a tensor. A call
is recorded when its like is made for the second time, so that sizes which come once cost little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from molex_kernels._triton import direct, tuning

_MOST = 1024  # kept calls of an operator: sizes that always change must not fill the memory
_NEW, _SEEN, _CANNOT = "new", "seen", "cannot be recorded"
_NEW_EMPTY = torch.ops.aten.new_empty.default
Step = Callable[[list[Any], Any], None]  # of all tensors so far, and the stream


class Replayed:
    """`function` of an operator's arguments in a named tuple, replayed where that is possible."""

    def __init__(self, function: Callable[[Any], Any], named: Callable[..., Any]) -> None:
        self._function, self._named = function, named
        self._kept: dict[Any, Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        if tuning.AUTOTUNE or not direct.is_free():
            return self._function(self._named(*arguments))
        tensors: list[Any] = []
        key = _key(arguments, tensors)
        kept = self._kept.get(key, _NEW)
        if type(kept) is Tape and kept.is_free():
            return kept.play(tensors)
        if kept is _SEEN:
            tape = Tape()
            results = tape.record(self._function, self._named, arguments)
            self._kept[key] = tape if tape.is_whole else _CANNOT
            return results
        if kept is _NEW:
            if len(self._kept) >= _MOST:
                self._kept.clear()
            self._kept[key] = _SEEN
        return self._function(self._named(*arguments))


def _key(arguments: Sequence[Any], tensors: list[Any]) -> tuple[Any, ...]:
    """All that a launcher can know of its arguments; adds their tensors to a list."""
    key = [driver.active.get_current_device(), torch.get_float32_matmul_precision()]
    _add_to_key(arguments, key, tensors)
    return tuple(key)


def _add_to_key(arguments: Sequence[Any], key: list[Any], tensors: list[Any]) -> None:
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            aligned = argument.data_ptr() % 16 == 0
            key += (argument.dtype, argument.shape, argument.stride(), aligned)
        elif type(argument) is list:
            key.append(len(argument))
            _add_to_key(argument, key, tensors)
        else:  # of one type, that of the schema
            key.append(argument)


class Tape:
    """What a call did, in order, with places for its tensors: the arguments', then the made ones'.

    It holds no tensor itself.
    """

    def __init__(self) -> None:
        self.is_whole = True  # nothing was done that cannot be done again
        self._steps: list[Step] = []
        self._last: dict[int, int] = {}  # the step that is the last to use a tensor, by its place
        self._done: list[list[int]] = []  # by step, the places that are free behind it
        self._kernels: list[Any] = []
        self._places = WeakTensorKeyDictionary()
        self._count = 0  # of tensors
        self._fill: Callable[[list[Any]], list[Any]] = list  # the results
        self._is_single = False

    def is_free(self) -> bool:
        """Whether no kernel has got a hook since."""
        return all(map(direct.is_plain, self._kernels))

    def record(
        self, function: Callable[[Any], Any], named: Callable[..., Any], arguments: Sequence[Any]
    ) -> Any:
        """Calls the function, and keeps what it does."""
        given = self._distinct(arguments)
        with _Watch(self), direct.watched_by(self._launched):
            results = function(named(*given))
        self._is_single = isinstance(results, Tensor)
        self._fill = _filler(self._emptied([results] if self._is_single else list(results)))
        self._done = [[] for _ in self._steps]
        for place, step in self._last.items():
            if step < len(self._steps):
                self._done[step].append(place)
        self._places.clear()
        return results

    def play(self, tensors: list[Any]) -> Any:
        """Does it again with other tensors, which the list of them gets the made ones behind."""
        stream = direct.current_stream()
        for step, done in zip(self._steps, self._done, strict=True):
            step(tensors, stream)
            for place in done:
                tensors[place] = None
        results = self._fill(tensors)
        return results[0] if self._is_single else tuple(results)

    def _distinct(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments, each tensor an object of its own, since the next call's may be."""
        distinct: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                argument = argument.detach()
                self._add(argument)
            elif type(argument) is list:
                argument = self._distinct(argument)
            distinct.append(argument)
        return distinct

    def _add(self, tensor: Tensor) -> None:
        self._places[tensor] = self._count
        self._last[self._count] = len(self._steps)
        self._count += 1

    def _emptied(self, value: Any) -> Any:
        """The value with places for its tensors."""
        if isinstance(value, Tensor):
            place = self._places.get(value)
            if place is None:  # it was there before the call, or came past PyTorch's operators
                self.is_whole = False
                return None
            self._last[place] = len(self._steps)
            return _Place(place)
        if isinstance(value, TensorDescriptor):
            return _Blocks(self._emptied(value.base), {**vars(value), "base": None})
        if isinstance(value, tuple):
            return tuple(map(self._emptied, value))
        return [*map(self._emptied, value)] if type(value) is list else value

    def _launched(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        args: Sequence[Any],
        constants: tuple[Any, ...],
    ) -> None:
        if compiled is None:  # it went through Triton, which knows more of it than is known here
            self.is_whole = False
            return
        fill = _filler(self._emptied([*args, *constants]))
        self._kernels.append(kernel)
        self._steps.append(
            lambda tensors, stream: direct.run(compiled, grid, stream, fill(tensors))
        )

    def called(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """One of PyTorch's operators was called."""
        if not isinstance(result, Tensor):  # several, or a number that was read from a tensor
            self.is_whole = False
            return
        fill, fill_options = (
            _filler(self._emptied([*args])),
            _filler(self._emptied([*kwargs.values()])),
        )
        names = list(kwargs)
        is_new = result not in self._places
        if is_new:
            self._add(result)

        def step(tensors: list[Any], stream: Any) -> None:
            found = operator(*fill(tensors), **dict(zip(names, fill_options(tensors), strict=True)))
            if is_new:
                tensors.append(found)

        self._steps.append(self._allocation(args, kwargs) if operator is _NEW_EMPTY else step)

    def _allocation(self, args: Any, kwargs: Any) -> Step:
        """Past the dispatch of an operator's overload, which takes as long as the rest of it."""
        source, sizes = self._emptied(args[0]), tuple(args[1]) or ((),)
        options = {name: value for name, value in kwargs.items() if value is not None}
        # Sizes one by one are read in half the time that a list of them takes.
        return lambda tensors, stream: tensors.append(tensors[source].new_empty(*sizes, **options))


class _Place(int):
    """Of a tensor among those of a call."""


class _Blocks:
    """A descriptor without its tensor."""

    def __init__(self, place: int, facts: dict[str, Any]) -> None:
        self._place, self._facts = place, facts

    def fill(self, tensors: list[Any]) -> TensorDescriptor:
        """The descriptor of a tensor for which its checks would pass again."""
        blocks = object.__new__(TensorDescriptor)
        blocks.__dict__.update(self._facts, base=tensors[self._place])
        return blocks


def _filler(values: Sequence[Any]) -> Callable[[list[Any]], list[Any]]:
    """What makes a list of the values with tensors in their places."""
    places = [(n, value) for n, value in enumerate(values) if type(value) is _Place]
    parts: list[tuple[int, Callable[[list[Any]], Any]]] = []
    for n, value in enumerate(values):
        if isinstance(value, _Blocks):
            parts.append((n, value.fill))
        elif isinstance(value, list | tuple):
            parts.append((n, _part(type(value), _filler(value))))

    def fill(tensors: list[Any]) -> list[Any]:
        filled = list(values)
        for n, place in places:
            filled[n] = tensors[place]
        for n, part in parts:
            filled[n] = part(tensors)
        return filled

    return fill


def _part(kind: type, fill: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], Any]:
    return fill if kind is list else lambda tensors: tuple(fill(tensors))


class _Watch(TorchDispatchMode):
    """Tells a tape of PyTorch's operators. What they call in turn is theirs."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with direct.watched_by(None):
            result = func(*args, **kwargs)
        self._tape.called(func, args, kwargs, result)
        return result
