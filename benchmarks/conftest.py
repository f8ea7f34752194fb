"""Options, rows and fixtures of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import goals, presets, rows
from benchmarks.measure import Meter, Outcome, Outcomes
from benchmarks.progress import Progress
from benchmarks.record import Record
from benchmarks.rows import Group, Row
from molex_kernels.testing import load_ops


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("molex_kernels")
    options.addoption("--preset", choices=sorted(presets.PRESETS), default="quick")
    options.addoption("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    options.addoption("--progress", action="store_true", help="a progress bar instead of dots")
    options.addoption("--rows", type=Path, help="a file for the rows, written as they come")


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    return torch.device(name) if name else presets.default_device()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" not in metafunc.fixturenames:
        return
    preset = presets.PRESETS[metafunc.config.getoption("--preset")]
    device = _device(metafunc.config)
    dtype = presets.default_dtype(device)
    wanted = partial(goals.speaks_of, device.type)
    groups = rows.groups(load_ops(), preset, device, dtype, wanted)
    found = [row for group in groups for row in rows.rows(group)]
    metafunc.parametrize("row", found, ids=[row.name for row in found])


def pytest_report_teststatus(
    report: pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    # The progress bar speaks for the rows: no dots between its lines.
    if not config.getoption("--progress") or (report.failed and report.when != "call"):
        return None
    counted = report.when == "call" or report.skipped
    return report.outcome if counted else "", "", ""


@pytest.fixture(scope="session")
def progress(request: pytest.FixtureRequest) -> Any:
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    names = {spec.params["row"].group.name for spec in specs if spec and "row" in spec.params}
    with Progress(len(names), enabled=request.config.getoption("--progress")) as shown:
        yield shown


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, progress: Progress) -> Callable[[Row], Outcome]:
    """The outcome of a row; its whole group is measured when the first row asks."""
    config = request.config
    preset = presets.PRESETS[config.getoption("--preset")]
    if preset.needs_cuda and _device(config).type != "cuda":
        pytest.exit(f"--preset {preset.name} needs a CUDA device", returncode=2)
    enabled = config.getoption("benchmark_enable") or not config.getoption("benchmark_disable")
    meter = Meter(preset, timed=enabled)
    target = config.getoption("--rows")
    record = Record(target, preset.name, _device(config)) if target else None
    outcomes: dict[str, Outcomes] = {}

    def outcome_of(row: Row) -> Outcome:
        group: Group = row.group
        if group.name not in outcomes:
            progress.start(group)
            outcomes[group.name] = meter.group(group)
            progress.done(group, outcomes[group.name])
        outcome = outcomes[group.name][row.label, row.mode]
        if record:
            record.add(outcome)
        return outcome

    return outcome_of
