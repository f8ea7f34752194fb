"""What the files beside the code say of it is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def _yaml(path: Path) -> dict:
    return pytest.importorskip("yaml").safe_load(path.read_text())


def test_the_papers_of_the_readme_are_cited():
    cited = _yaml(ROOT / "CITATION.cff")["references"]
    linked = re.findall(r"\[([\w-]+)\]\((https://arxiv.org/abs/[\d.]+)\)", _readme())
    assert {(paper["notes"], paper["url"]) for paper in cited} == set(linked)
    for paper in cited:
        assert paper["url"].rsplit("/")[-1] == paper["identifiers"][0]["value"].split(":")[-1]


def test_a_bug_comes_with_its_environment():
    asked = [field for form in FORMS for field in _yaml(form)["body"] if "validations" in field]
    required = [field["attributes"]["label"] for field in asked if field["validations"]["required"]]
    assert any("`python -m molex_kernels.env`" in label for label in required)


def _readme() -> str:
    return (ROOT / "README.md").read_text()
