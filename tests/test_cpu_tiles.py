"""Ops in bf16 on a CPU's matrix tiles, which a plain C++ emulation stands in for."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import camex_tiles
import expert_tiles
import pytest
import rpc_tiles
from conftest import DEVICE

from molex_kernels import _extension

ROOT = Path(__file__).parents[1]
SCRIPTS = (camex_tiles, expert_tiles, rpc_tiles)
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" or _extension.why_not() is not None, reason="native CPU code"
)


def _has_amx() -> bool:
    """Whether the processor has AMX and Linux permits it."""
    info = Path("/proc/cpuinfo")
    if not info.exists() or "amx_bf16" not in info.read_text():
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


HAS_AMX = _has_amx()


@functools.cache
def results_on(tiles: str) -> dict[str, Any]:
    """What each script prints with these tiles; they run side by side."""
    environment = {**os.environ, "MOLEX_CPU_TILES": tiles, "PYTHONPATH": str(ROOT)}
    running = {
        script.__name__: subprocess.Popen(
            [sys.executable, str(script.__file__)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for script in SCRIPTS
    }
    found = {}
    for name, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        found[name] = json.loads(out)
        assert found[name]["tiles"] == tiles
    return found


@pytest.mark.parametrize("tiles", ["emulated", "amx"])
@pytest.mark.parametrize(
    ("script", "check"), [(s.__name__, check) for s in SCRIPTS for check in s.CHECKS]
)
def test_on_tiles(script: str, check: str, tiles: str):
    if tiles == "amx" and not HAS_AMX:
        pytest.skip("this processor has no AMX")
    failed = results_on(tiles)[script]["failed"][check]
    assert failed is None, failed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_without_tiles_other_code_runs(script: ModuleType):
    if _extension.build_facts()["tiles"] != "none":
        pytest.skip("this process has tiles")
    assert script.digest() != results_on("emulated")[script.__name__]["digest"]


@pytest.mark.skipif("MOLEX_CPU_TILES" in os.environ, reason="tiles were asked for")
def test_amx_is_taken_where_it_is():
    assert _extension.build_facts()["tiles"] == ("amx" if HAS_AMX else "none")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fast", "expected amx, none or emulated, or nothing, got fast"),
        ("amx", "this processor has no AMX"),
    ],
)
def test_another_word_is_refused(word: str, message: str):
    if word == "amx" and HAS_AMX:
        pytest.skip("this processor has AMX")
    call = "import torch, molex_kernels as m; k = torch.ones(1, 1, 2, 4).bfloat16(); "
    call += "m.rpc_attention(k, k, num_iters=1, lam=4.0, mu_width=4, impl='cpu')"
    done = subprocess.run(
        [sys.executable, "-c", call],
        capture_output=True,
        text=True,
        env={**os.environ, "MOLEX_CPU_TILES": word, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert f"MOLEX_CPU_TILES{'=amx' if word == 'amx' else ''}: {message}" in done.stderr
