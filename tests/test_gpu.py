"""What only a GPU shows: graph capture, no host synchronisation, a second stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import DEVICE
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks import cuda_graph
from molex_kernels._backends import CUDA
from molex_kernels.testing import load_ops
from molex_kernels.testing.calls import run, upstream_for
from molex_kernels.testing.opinfo import Case, OpInfo

pytestmark = pytest.mark.gpu

BUILT = pytest.mark.skipif(CUDA.why_not() is not None, reason=str(CUDA.why_not()))
CASES = [
    pytest.param(
        *(info, case, impl),
        id=f"{info.name}-{case.id}-{impl}",
        marks=[BUILT] if impl == "cuda" else [],
    )
    for info in load_ops().values()
    for case in info.tests
    for impl in ("triton", "cuda")
    if impl in info.implementations
]


@pytest.fixture(autouse=True)
def _default_stream() -> Iterator[None]:
    """Whatever a test did, the next one begins on the default stream and may wait."""
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_stream(torch.cuda.default_stream())


@contextmanager
def _no_sync() -> Iterator[None]:
    """Any host synchronisation inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("info", "case", "impl"), CASES)
def test_never_waits_for_the_device(info: OpInfo, case: Case, impl: str, generator):
    inputs = info.make(case, torch.bfloat16, DEVICE, generator)
    upstream = upstream_for(run(info, inputs, impl, None).results, generator)
    run(info, inputs, impl, upstream)
    with _no_sync():
        run(info, inputs, impl, upstream)


@pytest.mark.parametrize(("info", "case", "impl"), CASES)
def test_replays_as_a_graph(info: OpInfo, case: Case, impl: str, generator):
    inputs = info.make(case, torch.bfloat16, DEVICE, generator)
    expected = run(info, inputs, impl, None).results
    captured = cuda_graph.capture(lambda: run(info, inputs, impl, None).results)
    assert isinstance(captured, cuda_graph.Captured), captured
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    given = {t.untyped_storage().data_ptr() for t in tensors}
    for result in captured.result.values():
        if result.untyped_storage().data_ptr() not in given:  # logits are handed on as they came
            result.zero_()
    captured.graph.replay()
    for name, result in captured.result.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(("info", "case", "impl"), CASES)
def test_runs_on_the_current_stream(info: OpInfo, case: Case, impl: str, generator):
    """The inputs come into being there, late: what runs on another stream reads blanks."""
    inputs = info.make(case, torch.bfloat16, DEVICE, generator)
    upstream = upstream_for(run(info, inputs, impl, None).results, generator)
    expected = run(info, inputs, impl, upstream)
    late: list[tuple[torch.Tensor, torch.Tensor]] = []

    def blank(t: torch.Tensor) -> torch.Tensor:
        """As large, and wrong: NaN, or 0 where any other integer might lead out of bounds."""
        late.append((torch.full_like(t, math.nan if t.is_floating_point() else 0), t))
        return late[-1][0]

    inputs, upstream = tree_map_only(torch.Tensor, blank, (inputs, upstream))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles; about 30 ms
        for target, value in late:
            target.copy_(value)
        got = run(info, inputs, impl, upstream)
    torch.cuda.synchronize()
    for name, result in got.results.items():
        assert torch.equal(result, expected.results[name]), name
    for name, gradient in got.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), f"gradient of {name}"


def test_a_capture_that_fails_leaves_nothing_behind():
    def call() -> torch.Tensor:
        x = torch.randn(4, device=DEVICE)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return x

    assert "no CUDA graph" in str(cuda_graph.capture(call))
    assert torch.randn(4, device=DEVICE).isfinite().all()
    assert isinstance(
        cuda_graph.capture(lambda: torch.randn(4, device=DEVICE)), cuda_graph.Captured
    )
