"""The compiled library: built, described, and never in the way when it is missing or outdated."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molex_kernels import _backends, _extension, env

ROOT = Path(__file__).parents[1]

# Both come before the package is imported; importing None raises, as where it is not built.
ABSENT = "sys.modules['molex_kernels._C'] = None"
OUTDATED = """
class Old:
    build_facts = lambda: '{"operators": "cpu:route_plan,cpu:layer_vote", "cuda_version": ""}'
sys.modules["molex_kernels._C"] = Old
"""
FOR_ONE_PYTHON = """
class Older:
    build_facts = dict
sys.modules["molex_kernels._C"] = Older
"""
CALLS = """
import molex_kernels as mk
from molex_kernels import _extension
print(_extension.why_not())
plan = mk.route_plan(torch.tensor([[1, 0], [2, 1]]), 3)
print(plan.counts.tolist())
try:
    mk.route_plan(torch.tensor([[1, 0]]), 3, impl="cpu")
except NotImplementedError as error:
    print(error)
"""


def test_it_is_built_here():
    assert _extension.why_not() is None


def test_its_facts_name_operators_that_exist():
    facts = _extension.build_facts()
    assert facts["torch_target_version"] == "0x020b000000000000"
    operators = facts["operators"].split(",")
    assert operators
    for name in operators:
        device, operator = name.split(":")
        key = device.upper()
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"molex::{operator}", key)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (ABSENT, "is not built"),
        (OUTDATED, "is older than the package and lacks"),
        (FOR_ONE_PYTHON, "is older than the package ("),
    ],
    ids=["absent", "outdated", "for one Python"],
)
def test_the_ops_run_without_it(state, reason):
    script = "import sys, torch\n" + state + CALLS
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    why, counts, error = run.stdout.splitlines()
    assert f"the compiled extension {reason}" in why
    assert counts == "[1, 2, 1]"
    assert f"route_plan: impl='cpu' cannot run: {why}" in error
    assert f"taking the next implementation: {why}" in run.stderr


def test_what_an_outdated_one_lacks_is_named():
    facts = {**_extension.build_facts(), "cuda_version": ""}
    assert _extension._outdated(facts) is None
    kept = [name for name in facts["operators"].split(",") if "momentum" not in name]
    reason = _extension._outdated({**facts, "operators": ",".join(kept)})
    assert "lacks cpu:momentum_fwd, cpu:momentum_bwd (pip install" in reason
    reason = _extension._outdated({**facts, "operators": ""})
    natives = [name for name in _extension.EXPECTED if name.startswith("cpu:")]
    assert f"lacks {', '.join(natives[:3])} and {len(natives) - 3} more (pip install" in reason


def test_operators_on_cuda_are_missed_only_where_it_was_built_with_cuda():
    operators = ",".join(name for name in _extension.EXPECTED if name.startswith("cpu:"))
    facts = {"operators": operators, "cuda_version": ""}
    assert _extension._outdated(facts) is None
    reason = _extension._outdated({**facts, "cuda_version": "13.0"})
    assert "lacks cuda:rpc_attention_fwd, cuda:rpc_attention_bwd (pip install" in reason


def test_a_build_without_cuda_says_why():
    facts = {"cuda_version": "", "without_cuda": "no CUDA toolkit is found"}
    expected = "the compiled extension has no CUDA code: no CUDA toolkit is found"
    assert _extension.without_cuda(facts) == expected
    assert _extension.without_cuda({"cuda_version": "13.0"}) is None


def test_an_op_names_the_reason_that_a_build_has_no_cuda(monkeypatch):
    facts = {"cuda_version": "", "without_cuda": "no CUDA toolkit is found"}
    monkeypatch.setattr(_extension, "_load", lambda: (None, None))
    monkeypatch.setattr(_extension, "build_facts", lambda: facts)
    assert "no CUDA toolkit is found" in (_backends.CUDA.why_not() or "")


class _Installed:
    """What importlib.metadata knows of an installed package: its WHEEL file and its folder."""

    def __init__(self, wheel: str, folder: Path):
        self.wheel, self.folder = wheel, folder

    def read_text(self, name: str) -> str | None:
        return self.wheel if name == "WHEEL" else None

    def locate_file(self, name: str) -> Path:
        return self.folder / name


def test_a_missing_library_is_explained(monkeypatch, tmp_path):
    def reason(wheel: str, folder: Path) -> str:
        found = [_Installed(wheel, folder)]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda name: found)
        return _extension._absent()

    here, built = Path(_extension.__file__).parents[1], "Root-Is-Purelib: false\n"
    expected = f"the compiled extension is not built in {here / 'molex_kernels'} (several times"
    assert reason(built, here).startswith(expected)
    assert reason(built, tmp_path).startswith(expected)  # an editable install
    pure = "Root-Is-Purelib: true\n"
    for place in (here, tmp_path):
        assert "left out by choice, MOLEX_EXTENSION=0" in reason(pure, place)
    (tmp_path / "molex_kernels").mkdir()
    for wheel in (built, pure):
        hidden = f"; another molex_kernels is installed in {tmp_path / 'molex_kernels'}"
        assert reason(wheel, tmp_path).startswith(expected)
        assert reason(wheel, tmp_path).endswith(hidden)


def test_sources_use_only_the_stable_interface():
    sources = [*ROOT.glob("csrc/cpu/*/*"), *ROOT.glob("csrc/cuda/*/*")]
    assert sources
    for source in sources:
        text = source.read_text()
        for header in ("torch/extension.h", "ATen/", "torch/library.h", "c10/"):
            assert f"#include <{header}" not in text, f"{source.name} includes {header}"


def test_env_reports_what_runs(capsys: pytest.CaptureFixture):
    text = env.report()
    for expected in (
        "torch",
        "extension     built",
        "vectors",
        "tiles",
        "route_plan",
        "reference  runs",
        "needs a GPU",
    ):
        if expected == "needs a GPU" and (torch.cuda.is_available() or _backends.interpreted()):
            continue
        assert expected in text


def test_env_has_the_same_facts_as_json(capsys: pytest.CaptureFixture):
    env.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert env.report(found) == env.report()
    assert found["extension"]["built"] is True
    assert found["implementations"]["cpu"]["route_plan"]["reference"] is None
    env.main([])
    assert capsys.readouterr().out == env.report() + "\n"
