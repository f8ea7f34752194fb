"""What only a GPU shows: graph capture, no host synchronisation, a second stream."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from contract import run, upstream_for

from molex_kernels._dispatch import CUDA
from molex_kernels._opinfo import Case, OpInfo
from molex_kernels.ops import load_ops

pytestmark = pytest.mark.gpu

CASES = [
    pytest.param(info, case, impl, id=f"{info.name}-{case.id}-{impl}")
    for info in load_ops().values()
    for case in info.tests
    for impl in ("triton", "cuda")
    if impl in info.implementations and (impl != "cuda" or CUDA.why_not() is None)
]


@pytest.fixture
def no_sync():
    """Any host synchronisation inside is an error."""

    class Guard:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    return Guard()


@pytest.mark.parametrize(("info", "case", "impl"), CASES)
def test_never_waits_for_the_device(info: OpInfo, case: Case, impl: str, generator, no_sync):
    inputs = info.make(case, torch.bfloat16, DEVICE, generator)
    upstream = upstream_for(run(info, inputs, impl, None).results, generator)
    run(info, inputs, impl, upstream)
    with no_sync:
        run(info, inputs, impl, upstream)


@pytest.mark.parametrize(("info", "case", "impl"), CASES)
def test_replays_as_a_graph(info: OpInfo, case: Case, impl: str, generator):
    inputs = info.make(case, torch.bfloat16, DEVICE, generator)
    expected = run(info, inputs, impl, None).results
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(info, inputs, impl, None)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(info, inputs, impl, None).results
    for result in captured.values():
        result.zero_()
    graph.replay()
    for name, result in captured.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(("info", "case", "impl"), CASES)
def test_runs_on_the_current_stream(info: OpInfo, case: Case, impl: str, generator):
    inputs = info.make(case, torch.bfloat16, DEVICE, generator)
    expected = run(info, inputs, impl, None).results
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = run(info, inputs, impl, None).results
    stream.synchronize()
    for name, result in got.items():
        assert torch.equal(result, expected[name]), name
