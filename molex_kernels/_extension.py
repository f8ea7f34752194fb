"""Loads the compiled library once and keeps the reason if it cannot be used."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (the library links against torch's, which have to be loaded first)

_BUILD = "pip install --no-build-isolation -e ."
_PACKAGE = Path(__file__).parent
_NAMED = 3  # operators that a message names

# The operators that the package leaves to the library, "<device>:<name>".
EXPECTED: list[str] = []
_callbacks: list[Callable[[Sequence[str]], None]] = []


def when_loaded(callback: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
    """Has `callback` called with the operators of the library once it is loaded."""
    _callbacks.append(callback)
    return callback


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        module = importlib.import_module("molex_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "molex_kernels._C":
            return None, f"the compiled extension does not load: {error}"
        return None, _absent()
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the compiled extension does not load: {error}"
    text = module.build_facts()
    if not isinstance(text, str):  # one for a single Python, which would be found first
        return None, f"the compiled extension is older than the package ({_BUILD})"
    facts = json.loads(text)
    for callback in _callbacks:
        callback(facts["operators"].split(","))
    return module, _outdated(facts)


def _absent() -> str:
    """That there is no library where the package was imported from, and how that came about."""
    cost = f"several times slower on a CPU; {_BUILD}"
    reason = f"the compiled extension is not built in {_PACKAGE} ({cost})"
    for installed in importlib.metadata.distributions(name="molex_kernels"):
        folder = Path(str(installed.locate_file("molex_kernels")))
        if folder.exists() and folder.resolve() != _PACKAGE.resolve():
            return f"{reason}; another molex_kernels is installed in {folder}"
        # The tag of a wheel that was built with MOLEX_EXTENSION=0.
        if "Root-Is-Purelib: true" in (installed.read_text("WHEEL") or ""):
            return f"the compiled extension was left out by choice, MOLEX_EXTENSION=0 ({cost})"
    return reason


def _outdated(facts: dict[str, Any]) -> str | None:
    """That the package has operators that this build lacks on one of its devices."""
    devices = ("cpu:", "cuda:") if facts["cuda_version"] else ("cpu:",)
    built = set(facts["operators"].split(","))
    lacking = [n for n in EXPECTED if n.startswith(devices) and n not in built]
    if not lacking:
        return None
    named = ", ".join(lacking[:_NAMED])
    more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    return f"the compiled extension is older than the package and lacks {named}{more} ({_BUILD})"


def without_cuda(facts: dict[str, Any]) -> str | None:
    """That a build has no CUDA code, and why; None where it has."""
    if facts["cuda_version"]:
        return None
    # Builds that do not know why are older than the package.
    return f"the compiled extension has no CUDA code: {facts.get('without_cuda', 'an older build')}"


def why_not(device: str = "cpu") -> str | None:
    """Why the library has nothing for a device, None where it has. The first call loads it."""
    reason = _load()[1]
    if reason or device == "cpu":
        return reason
    return without_cuda(build_facts())


def build_facts() -> dict[str, Any]:
    """What the library was built with: compiler, flags, CUDA version, architectures, operators."""
    module, reason = _load()
    if module is None:
        return {"built": False, "reason": reason}
    return {"built": True, **json.loads(module.build_facts())}
