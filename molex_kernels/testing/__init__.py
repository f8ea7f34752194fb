"""What tests and benchmarks share: the ops' cases and baselines, the error budget, the contract.

Nothing else in the package imports it. `OPS` is the one list of the ops, by name.
"""

from __future__ import annotations

import importlib

from molex_kernels.testing.opinfo import OpInfo

_FOLDERS = ("routing", "dispatch", "momentum", "merging", "layer_mixing", "rpc_attention")


def load_ops() -> dict[str, OpInfo]:
    """Every public op by name, as the cases of its folder describe it."""
    infos: dict[str, OpInfo] = {}
    for folder in _FOLDERS:
        cases = importlib.import_module(f"molex_kernels.testing.cases.{folder}")
        infos.update({info.name: info for info in cases.OPINFOS})
    return infos


def __getattr__(name: str) -> dict[str, OpInfo]:
    if name == "OPS":
        return load_ops()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
