"""The table of model families holds: a third of its rows anew, which one the commit says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import model_table
import pytest

transformers = pytest.importorskip("transformers", exc_type=ImportError)
ROOT = Path(__file__).parents[1]


def _commit() -> str:
    """The tree's, or none where it is a copy without git."""
    run = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return run.stdout.strip()


@pytest.mark.parametrize("family", model_table.third(_commit()))
def test_a_row_is_what_the_page_says(family: str):
    text = model_table.PAGE.read_text()
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip(f"docs/models.md is not of transformers {transformers.__version__}")
    assert model_table.line(family, model_table.row(family)) in text.splitlines()


def test_every_family_has_its_turn():
    turns = [model_table.third(digit * 8) for digit in "012"]
    assert sorted(f for turn in turns for f in turn) == sorted(model_table.FAMILIES)
