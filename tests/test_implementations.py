"""Choosing an implementation: what is asked for runs or raises; None takes the best."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys

import pytest
import torch

from molex_kernels import _backends
from molex_kernels._backends import CPU, CUDA, REFERENCE, TRITON

X = torch.zeros(2)
BROKEN = dataclasses.replace(CPU, why_not=lambda: "it is broken")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(_backends, "DEFAULT", None)
    monkeypatch.setattr(_backends, "_warned", set())
    monkeypatch.setattr(_backends, "IMPLEMENTATIONS", dict(_backends.IMPLEMENTATIONS))


def select(op, implementations, impl, x, **limits):
    _backends.declare(op, *implementations)
    return _backends.select(op, impl, x, **limits)


def test_none_takes_the_first_that_runs():
    works = dataclasses.replace(CPU, why_not=lambda: None)
    assert select("op", (TRITON, works, REFERENCE), None, X) == "cpu"
    assert select("op", (TRITON, REFERENCE), None, X) == "reference"


def test_fp64_takes_the_reference_silently(caplog):
    assert select("op", (TRITON, CPU, REFERENCE), None, X.double()) == "reference"
    assert not caplog.records


def test_a_limit_passes_the_call_on():
    works = dataclasses.replace(CPU, why_not=lambda: None)
    limits = {"cpu": "E is at most 4; got 5"}
    assert select("op", (works, REFERENCE), None, X, **limits) == "reference"
    with pytest.raises(NotImplementedError, match="E is at most 4; got 5"):
        select("op", (works, REFERENCE), "cpu", X, **limits)


def test_a_fall_back_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING, "molex_kernels"):
        for _ in range(3):
            assert select("op", (BROKEN, REFERENCE), None, X) == "reference"
    assert [r.getMessage() for r in caplog.records] == [
        "op: 'cpu' cannot run, taking the next implementation: it is broken"
    ]


def test_an_explicit_choice_never_falls_back():
    with pytest.raises(NotImplementedError) as error:
        select("op", (CUDA, BROKEN, REFERENCE), "cpu", X)
    message = str(error.value)
    assert "op: impl='cpu' cannot run: it is broken" in message
    assert "cuda: it runs on cuda, the inputs are on cpu" in message
    assert "reference: would run" in message


def test_an_absent_implementation_is_named():
    with pytest.raises(NotImplementedError, match="op has no such implementation"):
        select("op", (REFERENCE,), "cuda", X)


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"impl: expected one of 'cuda', .* got 'tritn'"):
        select("op", (REFERENCE,), "tritn", X)


def test_bf16_is_refused_under_the_interpreter(monkeypatch):
    monkeypatch.setattr(_backends, "interpreted", lambda: True)
    monkeypatch.setattr(_backends, "_version", {"triton": "3.7.1", "numpy": "2.5.2"}.get)
    assert select("op", (TRITON, REFERENCE), "triton", X) == "triton"
    with pytest.raises(NotImplementedError, match="the inputs are bfloat16"):
        select("op", (TRITON, REFERENCE), "triton", X.bfloat16())


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0+git123", "2.10.1", False),
        ("3.6.0", "3.0.0", False),
        ("3.7.1", "2.5.2", True),
        ("3.10.0", "2.5.2", True),
    ],
)
def test_an_interpreter_that_does_not_know_this_numpy_is_refused(
    monkeypatch, triton: str, numpy: str, works: bool
):
    monkeypatch.setattr(_backends, "interpreted", lambda: True)
    monkeypatch.setattr(_backends, "_version", {"triton": triton, "numpy": numpy}.get)
    if works:
        assert select("op", (TRITON, REFERENCE), "triton", X) == "triton"
        return
    with pytest.raises(NotImplementedError) as error:
        select("op", (TRITON, REFERENCE), "triton", X)
    assert f"the interpreter of Triton {triton} fails with numpy {numpy}" in str(error.value)
    assert "pip install 'numpy<2.4', or Triton 3.7 or later" in str(error.value)
    assert "interpreter" in _backends.reasons("topk_route", "cpu")["triton"]


def test_triton_without_a_gpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(_backends, "interpreted", lambda: False)
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        select("other op", (TRITON, REFERENCE), "triton", X)


def test_the_environment_sets_the_default(monkeypatch):
    monkeypatch.setattr(_backends, "DEFAULT", "reference")
    works = dataclasses.replace(CPU, why_not=lambda: None)
    assert select("op", (works, REFERENCE), None, X) == "reference"
    monkeypatch.setattr(_backends, "DEFAULT", "cuda")
    assert select("op", (works, REFERENCE), None, X) == "cpu", "an op without it chooses as ever"
    monkeypatch.setattr(_backends, "DEFAULT", "fast")
    with pytest.raises(ValueError, match="MOLEX_IMPL: expected one of"):
        select("op", (REFERENCE,), None, X)


def test_the_environment_is_read():
    script = "from molex_kernels import _backends; print(_backends.DEFAULT)"
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "MOLEX_IMPL": "reference"},
    )
    assert run.stdout.strip() == "reference", run.stderr
