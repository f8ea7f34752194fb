"""The package's kernels, found from the package, and which of them a run has launched in bf16."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from triton.runtime.jit import JITFunction

HALF = ("torch.float16", "torch.bfloat16")


@dataclass
class Launches:
    """What a run saw of one kernel: launches, dtypes of its tensors, and whether in bf16 tests."""

    count: int = 0
    dtypes: set[str] = field(default_factory=set)
    in_bf16_test: bool = False

    @property
    def in_bf16(self) -> bool:
        """Given a bf16 tensor; a kernel that is never given 16-bit ones: within a bf16 test."""
        if self.dtypes.isdisjoint(HALF):
            return self.in_bf16_test
        return "torch.bfloat16" in self.dtypes


def add(launched: dict[str, Launches], name: str, more: Launches) -> None:
    """Counts more launches of the kernel of this name."""
    seen = launched.setdefault(name, Launches())
    seen.count += more.count
    seen.dtypes |= more.dtypes
    seen.in_bf16_test |= more.in_bf16_test


def name_of(function: JITFunction) -> str:
    return f"{function.fn.__module__}.{function.fn.__name__}"


def kernels_of(package: types.ModuleType) -> set[str]:
    """The names of its kernels: the jitted functions that no other jitted function mentions."""
    found = {name_of(f): f for module in _modules(package) for f in _jitted(vars(module).values())}
    inner = {name_of(f) for function in found.values() for f in _mentioned(function)}
    return found.keys() - inner


def not_in_bf16(kernels: Iterable[str], launched: Mapping[str, Launches]) -> list[str]:
    """Of these kernels and those launched, what was not launched in bf16, and what was instead."""
    return [
        f"{name}: {', '.join(sorted(seen.dtypes)) if seen.count else 'not launched at all'}"
        for name in sorted({*kernels, *launched})
        if not (seen := launched.get(name, Launches())).in_bf16
    ]


def _modules(package: types.ModuleType) -> Iterator[types.ModuleType]:
    yield package
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if sys.modules.get(module.name, module) is not None:  # the extension is hidden
            yield importlib.import_module(module.name)


def _jitted(values: Iterable[object]) -> Iterator[JITFunction]:
    return (value for value in values if isinstance(value, JITFunction))


def _mentioned(function: JITFunction) -> Iterator[JITFunction]:
    """The jitted functions that its source names, plainly or as a module's attribute."""
    scope = function.fn.__globals__
    for node in ast.walk(ast.parse(function.src)):
        if isinstance(node, ast.Name):
            yield from _jitted([scope.get(node.id)])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from _jitted([getattr(scope.get(node.value.id), node.attr, None)])
