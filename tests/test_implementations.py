"""Choosing an implementation: what is asked for runs or raises; None takes the best."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys

import pytest
import torch

from molex_kernels import LoRA, _backends, layer_linear
from molex_kernels._backends import CPU, CUDA, REFERENCE, TRITON
from molex_kernels.ops.layer_mixing import cpu

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


# Products of 16 bits on a CPU


def test_products_are_fp32_where_a_cpu_has_none_of_16_bits(monkeypatch):
    takes = {"bf16": False, "fp16": True}
    for name in takes:
        ask = f"_is_mkldnn_{name}_supported"
        monkeypatch.setattr(torch.ops.mkldnn, ask, lambda name=name: takes[name], raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert _backends.cpu_product_dtype(torch.bfloat16) == torch.float32
    assert _backends.cpu_product_dtype(torch.float16) == torch.float16
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert _backends.cpu_product_dtype(torch.float16) == torch.float32
    for dtype in (torch.float32, torch.float64):
        assert _backends.cpu_product_dtype(dtype) == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_fp32_is_rounded_once(monkeypatch, generator, dtype: torch.dtype):
    """Forward and backward, with a bias and adapters, which would round on the way in 16 bits."""
    monkeypatch.setattr(cpu, "cpu_product_dtype", lambda dtype: torch.float32)
    sizes = (2, 9, 16), (3, 11, 16), (3, 11), (3, 2, 16), (3, 11, 2)
    given = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
    upstream = torch.randn(2, 9, 11, generator=generator).to(dtype)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        x, weight, bias, a, b = leaves = [t.to(dtype).requires_grad_() for t in given]
        lora = LoRA(a, b, 0.5)
        index = torch.tensor([2, 0])
        out = layer_linear(x, weight, index, biases=bias, lora=lora, impl="cpu")
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    for got, want in zip(run(dtype), run(torch.float32), strict=True):
        torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=0)
