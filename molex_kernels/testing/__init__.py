"""What tests and benchmarks share: the ops' cases and baselines, the error budget, the contract.

Nothing else in the package imports it. To hold an op of your own to the contract, describe it as an
`OpInfo`, whose function takes `impl="reference"` and the names of your implementations, and call
the checks:

    for case in info.tests:
        check_budget(info, case, torch.bfloat16, "mine", "cuda", seed=0)

`OPS` is the one list of this package's ops, by name.
"""

from __future__ import annotations

import importlib

from molex_kernels.testing.contract import (
    check_budget,
    check_left_out,
    check_misaligned,
    check_opcheck,
    check_reference_gradients,
    check_strided,
    check_traces,
)
from molex_kernels.testing.opinfo import Case, Cost, Draw, OpInfo, Sweep

__all__ = [
    "Case",
    "Cost",
    "Draw",
    "OpInfo",
    "Sweep",
    "check_budget",
    "check_left_out",
    "check_misaligned",
    "check_opcheck",
    "check_reference_gradients",
    "check_strided",
    "check_traces",
    "load_ops",
]

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
