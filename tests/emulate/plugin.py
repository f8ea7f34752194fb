"""A pytest plugin that runs Triton kernels as a GPU runs them, on a CPU, through ttsem.

Every process of the run opens a ttsem session before conftest.py is imported: from then on there
"is" a GPU, and a launch is compiled by Triton's front end and its IR executed, bf16 included. An
access out of bounds, a race between program instances or an undefined result fails the test that
launched it. Named in PYTEST_PLUGINS rather than with `-p`, which xdist's workers read too late.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from emulate import left_out
from emulate.kernels import Launches, add, kernels_of, name_of, not_in_bf16
from ttsem import harness, ops, sanitize

import molex_kernels
from molex_kernels._triton import chips

HERE = Path(__file__).parent
# The library that the tree may hold is for every Python: loaded, it would take the CPU's tensors.
sys.modules["molex_kernels._C"] = None  # type: ignore[assignment]

_SESSION = pytest.StashKey[sanitize.Session]()
_ir: dict[tuple[Any, ...], str] = {}
_launched: dict[str, Launches] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-package",
        action="store_true",
        help="fail unless every kernel was launched in bf16 and every entry left something out",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    opened = ExitStack()
    early_config.stash[_SESSION] = opened.enter_context(sanitize.session())
    early_config.add_cleanup(opened.close)
    harness.ir_for_launch = _ir_for_launch
    chips.of = lambda device: chips.CHIPS["sm_90"]  # the driver that would say which is not there
    ops.OPS["tt.descriptor_load"] = partial(_descriptor_load, ops.OPS["tt.descriptor_load"])
    harness.mlir.parse = cache(harness.mlir.parse)  # most of the rest, and a module is only read


def _descriptor_load(given: ops.Handler, interp: Any, op: Any, args: list[Any]) -> list[Any]:
    """The block without its dimensions of 1, where Triton has folded their removal into the load.

    ttsem's own keeps the descriptor's dimensions whatever the result's type.
    """
    (block,) = given(interp, op, args)
    return [block.reshape(op.result_types[0].shape)]


def _ir_for_launch(record: harness.LaunchRecord, stage: str, target: Any) -> str:
    """The IR of a launch, once per specialisation and without Triton's back end.

    ttsem's own compiles down to a cubin to read the same IR, which takes most of a run's time.
    """
    specialised = harness._specialize(record.fn, record.args, record.kwargs, target)
    key = (record.fn, stage, *map(repr, specialised))
    if key not in _ir:
        harness.mlir.enable_generic_printing()
        _ir[key] = harness.mlir.to_generic(harness._stage_text(record, stage, target), None)
    add(_launched, name_of(record.fn), Launches(1, set(record.elems.values())))
    return _ir[key]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers leave the judgement to one process
        config.pluginmanager.register(Summary(config))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.name in left_out.FILES else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the Triton tests, and leaves some of them out with a reason."""
    others = {i for i in items if "triton" not in i.name and i.path.parent != HERE}
    config.hook.pytest_deselected(items=list(others))
    items[:] = [item for item in items if item not in others]
    for item in items:
        pattern = left_out.pattern_for(_described(item))
        if pattern is not None:
            item.add_marker(pytest.mark.skip(reason=left_out.TESTS[pattern]))
            item.user_properties.append(("left out", pattern))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    session = item.config.stash[_SESSION]
    unchecked = session.races_unchecked
    _launched.clear()
    try:
        return (yield)
    finally:
        # A report's properties reach the judging process as plain lists and numbers.
        seen = [(name, s.count, sorted(s.dtypes)) for name, s in _launched.items()]
        in_bf16 = any(value is torch.bfloat16 for value in _parameters(item).values())
        item.user_properties += [
            ("launched", seen),
            ("in bf16", in_bf16),
            ("unchecked", session.races_unchecked - unchecked),
        ]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _described(item: pytest.Item) -> str:
    """Its "file::test[parameters]", and the sizes of the op that those are, if not `tests`."""
    parameters = _parameters(item)
    info, case = parameters.get("info"), parameters.get("case")
    sizes = [s for s in ("large", "compiled") if case and case in getattr(info, s)]
    return " ".join([f"{item.path.name}::{item.name}", *sizes])


class Summary:
    """What ran, from the reports of every process, and what of it fails the run."""

    def __init__(self, config: pytest.Config) -> None:
        self.whole = config.getoption("--whole-package")
        self.tests = self.left_out = 0
        self.launched: dict[str, Launches] = {}
        self.patterns: set[str] = set()
        self.faults: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.skipped:
            self._skipped(report.nodeid, properties.get("left out"))
        elif report.when == "call":
            self.tests += 1
            if properties["unchecked"]:
                self.faults.append(f"{report.nodeid}: too large to look for races in")
            for name, count, dtypes in properties["launched"]:
                add(self.launched, name, Launches(count, set(dtypes), properties["in bf16"]))

    def _skipped(self, test: str, pattern: str | None) -> None:
        if pattern is None:
            self.faults.append(f"{test}: skipped, and not among what is left out")
        else:
            self.left_out += 1
            self.patterns.add(pattern)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        package = f"{molex_kernels.__name__}."
        self.launched = {n: s for n, s in self.launched.items() if n.startswith(package)}
        if self.whole:
            self.faults += [
                f"not launched in bf16: {kernel}"
                for kernel in not_in_bf16(kernels_of(molex_kernels), self.launched)
            ]
            files = {path.name for path in HERE.parent.glob("test_*.py")}
            self.faults += left_out.faults(files, self.patterns)
        if self.faults and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        out = config.get_terminal_writer()
        for fault in self.faults:
            out.line(f"emulate: {fault}", red=True)
        launches = sum(seen.count for seen in self.launched.values())
        out.line(
            f"emulated {self.tests} tests, {launches} launches, {len(self.launched)} kernels; "
            f"{self.left_out} tests and {len(left_out.FILES)} files left out; "
            f"{len(self.faults)} faults of the run itself"
        )
