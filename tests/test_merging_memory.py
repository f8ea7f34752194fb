"""Merging's memory: it grows neither with the segments nor with the rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from merging import OUT, D, E, draw

from benchmarks.memory import peak_bytes
from molex_kernels import KroneckerCurvature, _extension, _operators


def _extra_bytes(
    passes, segments: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> dict[str, int]:
    """Peak bytes of each pass beyond its results, at this many segments."""
    tokens, width, num_experts = 4, 16, 3

    def make(*sizes):
        return draw(generator, *sizes).to(dtype).cpu()

    x, dy = make(segments, tokens, width), make(segments, tokens, width)
    base, deltas = make(width, width), make(num_experts, width, width)
    gates = make(segments, num_experts).float()
    arguments = {
        "forward": (x, base, deltas, gates, None),
        "backward": (dy, x, base, deltas, gates, [True] * 5),
    }
    extra = {}
    for name, function in passes.items():
        peak = peak_bytes(lambda f=function, given=arguments[name]: f(*given), torch.device("cpu"))
        results = function(*arguments[name])
        results = results if isinstance(results, tuple) else (results,)
        extra[name] = peak - sum(r.untyped_storage().nbytes() for r in results)
    return extra


@pytest.fixture
def native():
    if reason := _extension.why_not():
        pytest.skip(reason)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_does_not_grow_with_the_segments_on_a_cpu(generator, dtype: torch.dtype):
    molex = torch.ops.molex
    passes = {"forward": molex.camex_linear_fwd, "backward": molex.camex_linear_bwd}
    # All but the results is a thread's own memory for a few rows, outside the allocator. In 16 bits
    # the weights and their gradients in fp32, and backwards x and dy, of 4 x 16 a segment, too;
    # matrix tiles take bf16 as it is.
    few, many = (_extra_bytes(passes, s, generator, dtype) for s in (8, 64))
    on_tiles = dtype == torch.bfloat16 and _extension.build_facts()["tiles"] != "none"
    widens = dtype != torch.float32 and not on_tiles
    weights = 4 * (1 + 3) * 16 * 16 if widens else 0
    a_segment = 4 * 2 * 4 * 16 if widens else 0
    assert few["forward"] == many["forward"] <= weights
    assert many["backward"] - few["backward"] == (64 - 8) * a_segment
    assert few["backward"] <= 2 * weights + 8 * a_segment


@pytest.fixture
def without_kernels(monkeypatch):
    """Launches allocate and start nothing: the interpreter's own copies would count as memory."""
    from molex_kernels.ops.merging.kernels import starts

    def launch(kernel, grid, args, constants, options, **_):
        if callable(args):
            args(options[0].blocks)
        return options[0]

    monkeypatch.setattr(starts, "launch", launch)


def _launcher(name):
    """The launcher behind an operator, of the operator's arguments."""
    from molex_kernels.ops.merging.kernels import launch

    operator = next(o for o in _operators.OPERATORS if o.name == name)
    function = getattr(launch, operator.function)
    return lambda *arguments: function(operator.named(*arguments))


def test_memory_of_the_kernels_grows_by_the_gates_partial_sums_alone(without_kernels, generator):
    passes = {"forward": _launcher("camex_linear_fwd"), "backward": _launcher("camex_linear_bwd")}
    few, many = (_extra_bytes(passes, segments, generator) for segments in (8, 64))
    assert few["forward"] == many["forward"] == 0
    assert many["backward"] - few["backward"] <= 4 * 56 * 3  # one tile holds this weight


@pytest.mark.usefixtures("native", "without_kernels")
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_memory_of_the_deltas_does_not_grow_with_the_rank(impl, generator):
    if impl == "cpu":
        forward, backward = (
            torch.ops.molex.camex_deltas_fwd,
            torch.ops.molex.camex_deltas_bwd,
        )
    else:
        forward, backward = _launcher("camex_deltas_fwd"), _launcher("camex_deltas_bwd")
    base, experts = (draw(generator, *s).float().cpu() for s in ((OUT, D), (E, OUT, D)))
    peaks = []
    for rank in (9, 33):
        curvature = KroneckerCurvature.identity(E, OUT, D, rank)
        needs = [True] * 2 + [False] * 4
        calls = (
            partial(forward, base, experts, *curvature, True),
            partial(backward, experts, base, experts, *curvature, True, needs),
        )
        peaks.append([peak_bytes(call, torch.device("cpu")) for call in calls])
    factors = 4 * 24 * E * (3 * 3 + 4 * 4 + 2 * 2 + 5 * 5)
    assert all(many - few <= factors for few, many in zip(*peaks, strict=True))


def test_the_measure_of_memory_sees_merged_weights(generator):
    from molex_kernels.ops.merging import reference

    few, many = (
        _extra_bytes({"forward": reference.linear}, segments, generator) for segments in (8, 64)
    )
    assert many["forward"] - few["forward"] >= 56 * 16 * 16 * 4
