"""Which kernels of RPC attention run where no implementation is named: the table, and its use."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

import molex_kernels as mk
from molex_kernels import _backends, _operators, env
from molex_kernels._triton import chips
from molex_kernels.ops.rpc_attention import placement
from molex_kernels.ops.rpc_attention.placement import MANY, TABLE, Row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KERNELS = ("molex_kernels/ops/rpc_attention/kernels", "csrc/cuda/rpc_attention")
MEASURED = [row for row in TABLE if row.measured]
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _gain(ours: dict[str, Any], rows: list[dict[str, Any]], other: str) -> float:
    """How many times longer the other implementation takes: by CUDA graphs where there are both."""
    place = ("shape", "dtype", "mode")
    (beside,) = (
        r for r in rows if r["impl"] == other and all(r[name] == ours[name] for name in place)
    )
    if "graph_s" in ours and "graph_s" in beside:
        return beside["graph_s"] / ours["graph_s"]
    return ours["versus"][other][0]


ROWS = pytest.mark.parametrize(
    "row", MEASURED, ids=[f"{i}-{row.measured.shape}" for i, row in enumerate(MEASURED)]
)


@ROWS
def test_a_measured_row_names_the_faster(row: Row):
    """In its file, over its passes and iterations of its shape, and for that shape's d and N."""
    rows = json.loads((RESULTS / row.measured.results).read_text())["rows"]
    rows = [r for r in rows if r["op"] == "rpc_attention" and r["status"] == "ok"]
    rows = [r for r in rows if r["shape"].startswith(row.measured.shape + "-")]
    ours = [r for r in rows if r["impl"] == row.impl and NAMES[r["dtype"]] in row.dtypes]
    fewest, most = row.iterations
    ours = [r for r in ours if fewest <= r["sizes"].get("n", 1) <= most]
    modes = {None: {"forward", "step"}, True: {"step"}, False: {"forward"}}[row.trains]
    ours = [r for r in ours if r["mode"] in modes]
    assert {r["mode"] for r in ours} == modes
    for found in ours:
        assert row.least <= found["sizes"]["d"] <= row.most
        assert found["sizes"]["N"] <= row.tokens
    other = "cuda" if row.impl == "triton" else "triton"
    gains = [math.log(_gain(found, rows, other)) for found in ours]
    assert sum(gains) > 0, f"{other} is {math.exp(-sum(gains) / len(gains)):.2f} times as fast"


@ROWS
def test_a_measured_row_says_whether_its_kernels_still_run(row: Row):
    commit = Path(row.measured.results).stem.rpartition("-")[2]

    def git(*arguments: str) -> int:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True).returncode

    if git("cat-file", "-e", f"{commit}^{{commit}}"):
        pytest.skip("needs the repository and its history")
    assert row.measured.are_older == bool(git("diff", "--quiet", commit, "--", *KERNELS))


def test_no_prediction_stands_before_a_measurement():
    assert TABLE[: len(MEASURED)] == tuple(MEASURED)
    assert (TABLE[-1].impl, TABLE[-1].most, TABLE[-1].tokens) == ("triton", MANY, MANY)


def test_the_environment_shows_every_row():
    report = env.report()
    for row, line in zip(TABLE, placement.lines(), strict=True):
        assert line in report
        assert str(row.measured or "predicted") in line


def _implementation(
    *sizes: int,
    dtype: torch.dtype = torch.bfloat16,
    num_iters: int = 4,
    trains: bool = False,
    drops: bool = False,
) -> str:
    with FakeTensorMode():
        k = torch.empty(sizes, device="cuda", dtype=dtype)
        return placement.implementation(k, num_iters, trains, drops)


@pytest.fixture
def on_chip(monkeypatch: pytest.MonkeyPatch):
    """A GPU of a name, for which the CUDA kernels are built."""

    def stand_in(name: str) -> None:
        chip = chips.CHIPS[name]
        monkeypatch.setattr(chips, "of", lambda device: chip)
        monkeypatch.setattr(_backends, "block_memory", lambda device: chip.shared)
        built = _backends.Implementation("cuda", ("cuda",), _backends.KERNEL_DTYPES, lambda: None)
        monkeypatch.setattr(_backends, "CUDA", built)

    return stand_in


@pytest.mark.parametrize(
    ("chip", "sizes", "dtype", "impl"),
    [
        ("sm_90", (256, 3, 197, 64), torch.bfloat16, "cuda"),
        ("sm_90", (256, 3, 197, 64), torch.float16, "cuda"),
        ("sm_90", (256, 3, 197, 64), torch.float32, "cuda"),
        ("sm_90", (96, 8, 256, 16), torch.bfloat16, "cuda"),
        ("sm_90", (96, 8, 257, 16), torch.bfloat16, ""),
        ("sm_90", (96, 8, 256, 32), torch.float16, "cuda"),
        ("sm_90", (96, 8, 256, 33), torch.float16, "cuda"),
        ("sm_90", (96, 8, 256, 65), torch.float16, ""),
        ("sm_90", (96, 8, 256, 32), torch.float32, ""),
        ("sm_80", (96, 8, 197, 32), torch.float16, "cuda"),
        ("sm_80", (96, 8, 197, 64), torch.float32, ""),
        ("sm_89", (96, 8, 197, 16), torch.bfloat16, "cuda"),
        ("sm_100", (4, 16, 4096, 64), torch.bfloat16, ""),
        ("gfx942", (96, 8, 256, 16), torch.float16, ""),
    ],
)
def test_the_choice_by_chip_and_shape(on_chip, chip: str, sizes, dtype: torch.dtype, impl: str):
    on_chip(chip)
    assert _implementation(*sizes, dtype=dtype) == impl


@pytest.mark.parametrize(
    ("num_iters", "trains", "impl"),
    [(1, False, ""), (2, False, "cuda"), (2, True, ""), (3, True, "cuda"), (4, True, "cuda")],
)
def test_the_choice_by_pass_and_iterations(on_chip, num_iters: int, trains: bool, impl: str):
    on_chip("sm_90")
    assert _implementation(256, 3, 197, 64, num_iters=num_iters, trains=trains) == impl
    assert _implementation(256, 3, 197, 64, num_iters=num_iters, trains=trains, drops=True) == ""
    assert _implementation(256, 3, 197, 16, num_iters=num_iters, trains=trains) == "cuda"


def test_both_passes_of_a_call_choose_alike(monkeypatch: pytest.MonkeyPatch):
    """A forward pass that keeps its state is asked for as its backward pass is."""
    asked: list[tuple[int, bool, bool]] = []
    monkeypatch.setattr(placement, "implementation", lambda k, *how: asked.append(how) or "")
    k = torch.randn(1, 1, 5, 4, device=DEVICE, requires_grad=True)
    mk.rpc_attention(k, k, num_iters=3, threshold=1.0).sum().backward()
    with torch.no_grad():
        mk.rpc_attention(k, k, num_iters=3, threshold=1.0, dropout_p=0.1)
    assert asked == [(3, True, False), (3, True, False), (3, False, True)]


def test_what_cannot_run_is_not_chosen(on_chip, monkeypatch: pytest.MonkeyPatch):
    sizes = (96, 8, 256, 16)
    assert placement.implementation(torch.empty(sizes), 4, False, False) == ""
    on_chip("sm_90")
    assert _implementation(*sizes) == "cuda"
    monkeypatch.setattr(_backends, "block_memory", lambda device: 1024)
    assert _implementation(*sizes) == ""
    on_chip("sm_90")
    missing = _backends.Implementation("cuda", ("cuda",), (), lambda: "it is not built")
    monkeypatch.setattr(_backends, "CUDA", missing)
    assert _implementation(*sizes) == ""


@pytest.mark.parametrize(
    ("named", "default", "ran"),
    [(None, None, ["chosen"] * 2), ("triton", None, []), (None, "triton", [])],
)
def test_both_passes_ask_and_a_name_goes_before(
    named: str | None,
    default: str | None,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Where Triton shares the device with the extension: a GPU, a CPU under the interpreter."""
    found: list[str] = []
    for operator in _operators.OPERATORS:
        if operator.name.startswith("rpc_attention"):

            def run(*arguments: Any, operator: Any = operator) -> Any:
                found.append("chosen")
                return operator._runner("triton", DEVICE.type)(*arguments)

            monkeypatch.setitem(operator.runners, ("chosen", DEVICE.type), run)
    monkeypatch.setattr(placement, "implementation", lambda *call: "chosen")
    monkeypatch.setattr(_backends, "DEFAULT", default)
    k = torch.randn(1, 1, 5, 4, device=DEVICE, requires_grad=True)
    mk.rpc_attention(k, k, num_iters=1, threshold=1.0, impl=named).sum().backward()
    assert found == ran
