"""The fastest configurations of earlier sweeps, on disk.

One JSON file, `launches.json` in MOLEX_CACHE or else in ~/.cache/molex_kernels. A file that cannot
be read or written is left alone, with one warning: the sweep is then repeated by every process.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

_LOG = logging.getLogger("molex_kernels")

Entries = dict[str, dict[str, Any]]


def file() -> Path:
    """Where the entries are."""
    folder = os.environ.get("MOLEX_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "molex_kernels") / "launches.json"


@functools.cache
def platform(device: torch.device) -> str:
    """What makes a sweep of elsewhere void: the device, its driver and Triton."""
    import triton

    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    kind = f"hip {torch.version.hip}" if torch.version.hip else f"cuda {driver}"
    return f"{torch.cuda.get_device_name(device)} | {kind} | triton {triton.__version__}"


def load() -> Entries:
    """Every entry there is; none where there is no file or it is broken."""
    try:
        entries = json.loads(file().read_text())
        if not isinstance(entries, dict):
            raise ValueError("expected an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(f"the sweeps' results in {file()} cannot be read and are ignored: {error}")
        return {}
    return entries


def keep(key: str, entry: dict[str, Any]) -> None:
    """Adds an entry; the file is replaced in one step, so that a reader never sees half of it."""
    path = file()
    entries = {**load(), key: entry}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as new:
            json.dump(entries, new, indent=1, sort_keys=True)
        os.replace(new.name, path)
    except OSError as error:
        _warn(f"the sweeps' results cannot be kept in {path}: {error}")


@functools.cache
def _warn(message: str) -> None:
    _LOG.warning(message)
