"""What contributors are told is so: the files and targets exist, and hooks run what lint runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from molex_kernels.testing import _FOLDERS

ROOT = Path(__file__).parents[1]
CODE = re.findall(r"`([^`\n]+)`", (ROOT / "CONTRIBUTING.md").read_text())
PATHS = sorted({c for c in CODE if re.fullmatch(r"[\w<>./*-]+/[\w<>./*-]*", c)})
TARGETS = sorted({target for c in CODE for target in re.findall(r"^make ([\w-]+)", c)})


@pytest.mark.parametrize("path", PATHS)
def test_files_exist(path: str):
    found = [folder for folder in _FOLDERS if any(ROOT.glob(path.replace("<op>", folder)))]
    needed = 1 if path.endswith("types.py") or "cuda" in path else len(_FOLDERS)
    assert len(found) >= needed, f"only for {found}"


@pytest.mark.parametrize("target", TARGETS)
def test_targets_exist(target: str):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_hooks_have_the_versions_of_make_lint():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    extra = re.search(r"^dev = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra
    pinned = dict(re.findall(r"([\w-]+)==([\d.]+)", extra[1]))
    assert re.findall(r"ruff-pre-commit\n +rev: v(.*)", hooks) == [pinned["ruff"]]
    assert re.findall(r"\[clang-format==(.*)\]", hooks) == [pinned["clang-format"]]
