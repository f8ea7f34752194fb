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
