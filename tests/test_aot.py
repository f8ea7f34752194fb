"""Every Triton kernel compiles for every chip: no spills, within shared memory, with wgmma."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molex_kernels.ops import load_ops

# Usable shared memory of a block, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
WITH_TRITON = [info.name for info in load_ops().values() if "triton" in info.implementations]


@pytest.mark.parametrize("name", WITH_TRITON)
def test_kernels_compile_for_every_chip(name: str):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot.py")
    run = subprocess.run(
        [sys.executable, script, name], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert kernels, "no kernel was launched"
    for kernel in kernels:
        where = f"{kernel['kernel']} {kernel['dtype']} sm_{kernel['capability']} {kernel['blocks']}"
        assert kernel["spills"] == 0, f"{where}: spills {kernel['spills']} bytes"
        assert kernel["shared"] <= SHARED[kernel["capability"]], f"{where}: {kernel['shared']} B"
    gemms = [
        k
        for k in kernels
        if k["capability"] == 90 and k["dots"] and k["dtype"] != "float32" and _large(k)
    ]
    for kernel in gemms:
        assert kernel["wgmma"], f"{kernel['kernel']} {kernel['dtype']} {kernel['blocks']}: no wgmma"


def _large(kernel: dict) -> bool:
    """wgmma needs 64 rows: a tile with fewer runs on mma.sync by design."""
    blocks = kernel["blocks"]
    rows = blocks.get("BLOCK_I", blocks.get("BLOCK_T", 64))
    return rows >= 64 and not blocks.get("HAS_WEIGHTS")
