"""What is launched without Triton's search, or replayed, is what Triton would have launched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("what", ["hits", "values", "ops", "tapes", "memory"])
def test_direct_launches(what: str) -> None:
    """Grid, specialisation and arguments, after hits and misses of every op's launches."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "MOLEX_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests" / "direct_launches.py"), what]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    assert not run.stdout, run.stdout[:4000]
