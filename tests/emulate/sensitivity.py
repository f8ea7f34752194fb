"""The emulation sees what it is for: kernels with one fault each, and the faults it must report.

Not named test_*.py, since nothing here holds where kernels are interpreted or really launched.
"""

from __future__ import annotations

import types

import pytest
import torch
import triton
import triton.language as tl
from emulate import left_out
from emulate.kernels import Launches, kernels_of, name_of, not_in_bf16
from triton.compiler.errors import CompilationError
from ttsem.sanitize import KernelFault


@triton.jit
def _copy(x_ptr, y_ptr, size, IS_MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size if IS_MASKED else offs >= 0
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def _returns_at_compile_time(x_ptr, y_ptr, table_ptr):
    if table_ptr is None:
        tl.store(y_ptr, tl.load(x_ptr))
        return
    tl.store(y_ptr, tl.load(x_ptr + tl.load(table_ptr)))


@triton.jit
def _all_store_to_one_place(y_ptr):
    tl.store(y_ptr, tl.program_id(0))


@triton.jit
def _sum(x_ptr, y_ptr, size, DTYPE: tl.constexpr):
    total = tl.zeros((), DTYPE)
    for i in range(size):
        total += tl.load(x_ptr + i).to(DTYPE)
    tl.store(y_ptr, total.to(y_ptr.dtype.element_ty))


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _calls(x_ptr, y_ptr):
    tl.store(y_ptr, _add(tl.load(x_ptr), 1))


def test_a_dropped_mask():
    x, y = torch.randn(100, device="cuda"), torch.empty(100, device="cuda")
    _copy[(2,)](x, y, 100, True, BLOCK=64)
    assert torch.equal(x, y)
    with pytest.raises(KernelFault, match=r"28 element.* past the end of the tensor"):
        _copy[(2,)](x, y, 100, False, BLOCK=64)


def test_a_return_in_a_compile_time_branch():
    x, y = torch.randn(3, device="cuda"), torch.empty(1, device="cuda")
    _returns_at_compile_time[(1,)](x, y, torch.tensor([2], device="cuda"))
    assert y[0] == x[2]
    with pytest.raises(CompilationError):
        _returns_at_compile_time[(1,)](x, y, None)


def test_a_race_between_programs():
    y = torch.empty(1, dtype=torch.int32, device="cuda")
    _all_store_to_one_place[(1,)](y)
    with pytest.raises(KernelFault, match="write-write"):
        _all_store_to_one_place[(2,)](y)


def test_memory_that_nobody_wrote():
    x, y = torch.empty(4, device="cuda"), torch.zeros(4, device="cuda")
    _copy[(1,)](x, y, 4, True, BLOCK=4)
    assert y.isnan().all()


def test_sums_in_bf16_round_at_every_step():
    """To nearest even: 256 + 1 stays 256, and 256 + 3 is 260; a sum in fp32 is seen to differ."""
    y = torch.empty(1, dtype=torch.bfloat16, device="cuda")
    for terms, in_bf16, in_fp32 in (([256, 1, 1, 1, 1], 256, 260), ([256, 3, 0, 0], 260, 260)):
        x = torch.tensor(terms, dtype=torch.bfloat16, device="cuda")
        for dtype, want in ((tl.bfloat16, in_bf16), (tl.float32, in_fp32)):
            _sum[(1,)](x, y, len(terms), dtype)
            assert y.item() == want


def test_a_kernel_is_what_no_other_kernel_calls():
    package = types.ModuleType("package")
    package.__path__ = []
    vars(package).update(_calls=_calls, _add=_add)
    assert kernels_of(package) == {name_of(_calls)}


@pytest.mark.parametrize(
    ("launches", "reported"),
    [
        (Launches(), "k: not launched at all"),
        (Launches(3, {"torch.float16", "torch.float32"}, in_bf16_test=True), "k: torch.float16"),
        (Launches(3, {"torch.int64"}), "k: torch.int64"),
        (Launches(3, {"torch.int64"}, in_bf16_test=True), ""),
        (Launches(3, {"torch.float16", "torch.bfloat16"}), ""),
    ],
)
def test_a_kernel_that_no_test_launched_in_bf16(launches, reported):
    found = not_in_bf16({"k"}, {"k": launches} if launches.count else {})
    assert len(found) == bool(reported)
    assert all(line.startswith(reported) for line in found)


def test_entries_that_leave_nothing_out(monkeypatch):
    files, patterns = list(left_out.FILES), list(left_out.TESTS)
    assert left_out.faults(files, patterns) == []
    assert left_out.faults([], patterns) == [f"{name}: no such file" for name in sorted(files)]
    monkeypatch.setitem(left_out.TESTS, "test_contract.py::test_gone*", "a reason")
    found = left_out.faults(files, patterns)
    assert len(found) == 2
    assert "entries, not" in found[0]
    assert found[1] == "test_contract.py::test_gone*: matches no test"
