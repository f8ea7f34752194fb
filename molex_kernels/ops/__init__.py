"""The ops. `OPS` is the one list of them; each folder describes itself in `cases.py`."""

from __future__ import annotations

import importlib

from molex_kernels._opinfo import OpInfo

_FOLDERS = ("routing", "dispatch", "momentum", "merging", "layer_mixing", "rpc_attention")


def load_ops() -> dict[str, OpInfo]:
    """Every public op by name, as its folder's `cases.py` describes it."""
    infos: dict[str, OpInfo] = {}
    for folder in _FOLDERS:
        cases = importlib.import_module(f"molex_kernels.ops.{folder}.cases")
        infos.update({info.name: info for info in cases.OPINFOS})
    return infos


def __getattr__(name: str) -> dict[str, OpInfo]:
    if name == "OPS":
        return load_ops()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
