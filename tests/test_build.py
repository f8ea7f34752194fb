"""The build's own promises, tried on copies of the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("csrc", "molex_kernels"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def _setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_wheel_holds_the_package_and_the_library(tree: Path):
    run = _setup(tree, "bdist_wheel")
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = (tree / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("molex_kernels/_C.") for n in names)
    assert "molex_kernels/py.typed" in names
    assert any(n.startswith("molex_kernels/ops/routing/kernels/") for n in names)


def test_a_failed_build_is_a_warning_unless_demanded(tree: Path):
    (tree / "csrc/cpu/broken.cpp").write_text("this is not C++")
    run = _setup(tree, "build_ext", "--inplace", MOLEX_EXTENSION="0")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "warning: molex_kernels._C is not built" in run.stderr
    assert not list((tree / "molex_kernels").glob("_C*"))
    assert _setup(tree, "build_ext", "--inplace", MOLEX_EXTENSION="1").returncode != 0


def test_without_torch_the_build_says_what_to_do(tree: Path):
    (tree / "torch.py").write_text("raise ImportError('no torch here')")
    run = _setup(tree, "--version")
    assert run.returncode != 0
    assert "Install torch first, then: pip install --no-build-isolation ." in run.stderr


def test_cuda_cannot_be_demanded_where_it_is_not(tree: Path):
    import torch

    if torch.version.cuda:
        pytest.skip("this torch is built with CUDA")
    run = _setup(tree, "--version", MOLEX_CUDA="1")
    assert run.returncode != 0
    assert "MOLEX_CUDA=1 needs a torch built with CUDA" in run.stderr
