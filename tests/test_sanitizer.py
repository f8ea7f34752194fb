"""Every kernel under compute-sanitizer: out of bounds, races in shared memory, barriers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from molex_kernels._backends import CUDA
from molex_kernels.testing import load_ops

TOOL = shutil.which("compute-sanitizer")
SCRIPT = Path(__file__).with_name("sanitized.py")
# Triton has its own barriers and initialises nothing: what is left is where it reads and writes.
TOOLS = {
    "triton": ("memcheck", "racecheck"),
    "cuda": ("memcheck", "racecheck", "initcheck", "synccheck"),
}
# A thread waits for its asynchronous copies into shared memory and meets the other blocks of its
# cluster at barriers before one of them stores there; racecheck reports the two, as it does not
# for ordinary stores.
UNRELATED = re.compile(
    r"Error: Race reported between Write access at \S*copy_async\S*.*(\n=+     and Write access at "
    r"\S*store_remote\(.*)+\n"
)
# Only this package's kernels: PyTorch's are not the matter. Every Triton kernel is a _fwd or _bwd.
KERNELS = {"triton": "wd", "cuda": "molex"}

pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer on PATH"),
]


def _cases() -> list:
    without = pytest.mark.skipif(CUDA.why_not() is not None, reason=str(CUDA.why_not()))
    return [
        pytest.param(
            *(info.name, impl, tool),
            id=f"{info.name}-{impl}-{tool}",
            marks=[without] if impl == "cuda" else [],
        )
        for info in load_ops().values()
        for impl, tools in TOOLS.items()
        if impl in info.implementations
        for tool in tools
    ]


@pytest.mark.parametrize(("op", "impl", "tool"), _cases())
def test_sanitized(op: str, impl: str, tool: str):
    command = [str(TOOL), "--tool", tool, "--error-exitcode", "9"]
    if tool != "initcheck":  # it has to see PyTorch's kernels write what ours read
        command += ["--kernel-name", f"kernel_substring={KERNELS[impl]}"]
    run = subprocess.run(
        [*command, sys.executable, str(SCRIPT), op, impl],
        capture_output=True,
        text=True,
        # Each tensor is an allocation of its own, so that the end of one is no other's beginning.
        env={
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "PYTHONPATH": str(SCRIPT.parents[1]),
        },
        timeout=400,
    )
    output = run.stdout + run.stderr
    if tool == "racecheck" and run.returncode == 9:
        output, left_out = UNRELATED.subn("", output)
        assert left_out
        assert "Race reported" not in output, output[-4000:]
    else:
        assert run.returncode == 0, output[-4000:]
