"""The compiled library: built, described, and never in the way when it is missing or broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molex_kernels import _extension, env

ROOT = Path(__file__).parents[1]

ABSENT = """
import sys, logging, torch
sys.modules["molex_kernels._C"] = None  # an import of it raises, as where it is not built
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
        key = "CUDA" if name.endswith("_cuda") else "CPU"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"molex::{name}", key)


def test_the_ops_run_without_it():
    run = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reason, counts, error = run.stdout.splitlines()
    assert "the compiled extension" in reason
    assert counts == "[1, 2, 1]"
    assert "route_plan: impl='cpu' cannot run: the compiled extension" in error
    assert "taking the next implementation" in run.stderr


def test_sources_use_only_the_stable_interface():
    sources = [*ROOT.glob("csrc/cpu/*"), *ROOT.glob("csrc/cuda/*")]
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
        "route_plan",
        "reference  runs",
        "needs a GPU",
    ):
        if expected == "needs a GPU" and (torch.cuda.is_available() or _interpreting()):
            continue
        assert expected in text


def _interpreting() -> bool:
    from molex_kernels import _dispatch

    return _dispatch.interpreted()
