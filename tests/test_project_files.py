"""What the files beside the code say of it is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
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
    assert any("`python -m molex_kernels.env --json`" in label for label in required)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_a_developer_runs(path: Path):
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    jobs = _yaml(path)["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        program, target, *_ = command.split()
        assert (program, target in targets) == ("make", True), command


def test_workflows_cover_the_pythons_and_torches_that_are_promised():
    matrix = _yaml(ROOT / ".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={matrix["python"][0]}"' in project
    assert f'"{matrix["torch"][0].split()[0].replace("==", ">=").removesuffix(".0")}"' in project


def _readme() -> str:
    return (ROOT / "README.md").read_text()
