"""Every example runs, and what it trains learns."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(p.stem for p in FOLDER.glob("*.py") if "def main(" in p.read_text())
LISTED = (FOLDER / "README.md").read_text()


def test_all_are_listed():
    assert "train_moe" in EXAMPLES
    assert all(f"| `{path.name}` |" in LISTED for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_learns(name, monkeypatch, seed):
    if name not in ("train_moe", "expert_parallel"):
        pytest.importorskip("transformers", exc_type=ImportError)
        pytest.importorskip("transformers.integrations.moe", exc_type=ImportError)
    monkeypatch.syspath_prepend(str(FOLDER))
    torch.manual_seed(seed)
    losses = importlib.import_module(name).main(steps=8, width=16)
    monkeypatch.delitem(sys.modules, name)
    assert len(losses) == 8
    assert sum(losses[-2:]) < sum(losses[:2])
