"""camex_linear in bf16 on matrix tiles, which a plain C++ emulation stands in for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import camex_tiles
import pytest
from conftest import DEVICE

from molex_kernels import _extension

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" or _extension.why_not() is not None, reason="native CPU code"
)


@pytest.fixture(scope="module")
def emulated() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, camex_tiles.__file__],
        capture_output=True,
        text=True,
        env={**os.environ, "MOLEX_CPU_TILES": "emulated", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tiles"] == "emulated"
    return found


@pytest.mark.parametrize("check", camex_tiles.CHECKS)
def test_on_emulated_tiles(check: str, emulated: dict[str, Any]):
    failed = emulated["failed"][check]
    assert failed is None, failed


def test_without_tiles_other_code_runs(emulated: dict[str, Any]):
    if _extension.build_facts()["tiles"] != "none":
        pytest.skip("this machine has the tiles")
    assert camex_tiles.digest() != emulated["digest"]
