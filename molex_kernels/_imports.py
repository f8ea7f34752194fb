"""Work that waits for an import: what PyTorch loads late is not loaded for everybody."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, work: Callable[[ModuleType], None]) -> None:
    """Calls `work` with this module: now, or when somebody has imported it."""
    if name in sys.modules:
        work(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waits(name, work))


class _Waits(MetaPathFinder, Loader):
    """Stands before the module's own loader."""

    loader: Any

    def __init__(self, name: str, work: Callable[[ModuleType], None]) -> None:
        self.name, self.work = name, work

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module has its own loader again before its code runs, and is as if nobody had waited.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.work(module)
