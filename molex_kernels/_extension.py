"""Loads the compiled library once and keeps the reason if it cannot."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch  # noqa: F401  (the library links against torch's, which have to be loaded first)


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("molex_kernels._C"), None
    except ModuleNotFoundError as error:
        if error.name != "molex_kernels._C":
            return None, f"the compiled extension does not load: {error}"
        return None, "the compiled extension is not built (pip install --no-build-isolation -e .)"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the compiled extension does not load: {error}"


def why_not() -> str | None:
    """Why the compiled library cannot be used, or None where it can. Loads it at the first call."""
    return _load()[1]


def build_facts() -> dict[str, Any]:
    """What the library was built with: compiler, flags, CUDA version, architectures, operators."""
    module, reason = _load()
    return {"built": False, "reason": reason} if module is None else module.build_facts()
