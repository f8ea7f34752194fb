"""What the tests' settings promise: nothing that was asked for is skipped in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEVICE

MODULE = """
import pytest
pytest.importorskip("no_such_package", exc_type=ImportError)
def test(): pass
"""
FUNCTION = """
import pytest
@pytest.fixture
def package():
    return pytest.importorskip("no_such_package", reason="it is not here")
def test_in_a_fixture(package): pass
def test_in_a_test(): pytest.importorskip("no_such_package.part")
def test_of_a_package_that_is_there(): assert pytest.importorskip("json.decoder").JSONDecoder
"""


def test_a_missing_package_fails_in_ci(tmp_path: Path):
    for name, text in (("module", MODULE), ("function", FUNCTION)):
        (tmp_path / f"test_of_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q"]
    command += ["--continue-on-collection-errors", "."]
    for ci, counts in (("", "1 passed, 3 skipped"), ("true", "1 failed, 1 passed, 2 errors")):
        run = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "CI": ci, "PYTHONPATH": str(Path(__file__).parent)},
        )
        assert counts in run.stdout, run.stdout
        assert not ci or run.stdout.count("No module named 'no_such_package'") >= 3


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
@pytest.mark.parametrize("mark", ["gpu", "sanitizer"])
def test_gpu_tests_asked_for_without_a_gpu_fail(mark: str):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n2", "-m", mark]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"-m {mark}: there is no CUDA device" in run.stderr
