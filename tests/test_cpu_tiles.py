"""Ops in bf16 on a CPU's matrix tiles, which a plain C++ emulation stands in for."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def emulated() -> dict[str, Any]:
    """What each script prints where tiles are emulated; they run side by side."""
    environment = {**os.environ, "MOLEX_CPU_TILES": "emulated", "PYTHONPATH": str(ROOT)}
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
        assert found[name]["tiles"] == "emulated"
    return found


@pytest.mark.parametrize(
    ("script", "check"), [(s.__name__, check) for s in SCRIPTS for check in s.CHECKS]
)
def test_on_emulated_tiles(script: str, check: str, emulated: dict[str, Any]):
    failed = emulated[script]["failed"][check]
    assert failed is None, failed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_without_tiles_other_code_runs(script: ModuleType, emulated: dict[str, Any]):
    if _extension.build_facts()["tiles"] != "none":
        pytest.skip("tiles were asked for")
    assert script.digest() != emulated[script.__name__]["digest"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fast", "expected amx or emulated, or nothing, got fast"),
        ("amx", "this processor has no AMX"),
    ],
)
def test_another_word_is_refused(word: str, message: str):
    info = Path("/proc/cpuinfo")
    if word == "amx" and info.exists() and "amx_bf16" in info.read_text():
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
