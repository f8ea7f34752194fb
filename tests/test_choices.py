"""Whatever the numbers, an op that chooses gives an index that exists, the same in each form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import DEVICE, runs_here
from torch import Tensor

import molex_kernels as mk
from molex_kernels.testing import load_ops
from molex_kernels.testing.opinfo import Case, Inputs, OpInfo

OPS = load_ops()
VALUES = (torch.nan, torch.inf, -torch.inf)
# The ops that choose: the index among their results, what it has to be below, and small cases.
CHOOSE: dict[str, tuple[str, Any, tuple[Case, ...]]] = {
    "topk_route": (
        "expert_index",
        lambda given: given["gate_weight"].shape[0],
        tuple(
            Case({"T": 12, "D": 3, "E": 5, "K": k}, {"bias": True, **options})
            for k, options in (
                (2, {}),
                (5, {"score": "softmax", "expert_bias": True}),
                (3, {"score": "sigmoid", "expert_bias": True}),
            )
        ),
    ),
    "ac_route": (
        "expert_index",
        lambda given: given["gate_weight"].shape[0],
        (
            OPS["ac_route"].masked[0],
            Case({"T": 12, "D": 3, "E": 5, "K": 2}, {"cosine": True, "stat": "pairwise"}),
        ),
    ),
    "route_from_logits": (
        "expert_index",
        lambda given: given["logits"].shape[1],
        tuple(
            Case({"T": 12, "E": 6, "K": k}, options)
            for k, options in (
                (2, {}),
                (6, {"score": "logits", "renormalize": True}),
                (3, {"score": "sigmoid", "expert_bias": True, "num_groups": 3, "top_groups": 2}),
            )
        ),
    ),
    "layer_vote": ("j", lambda given: given["logits"].shape[1], OPS["layer_vote"].masked),
}


def _poisoned(inputs: Inputs, generator: torch.Generator) -> list[Inputs]:
    """NaN and infinities here and there: in one argument, in all of them, in all of an argument."""
    names = [n for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()]
    here_and_there = {}
    for name in names:
        given = inputs[name]
        drawn = torch.randint(0, 16, given.shape, generator=generator).to(given.device)
        for number, value in enumerate(VALUES):
            given = torch.where(drawn == number, value, given)
        here_and_there[name] = given
    single = [{name: poisoned} for name, poisoned in here_and_there.items()]
    whole = [{names[0]: torch.full_like(inputs[names[0]], value)} for value in VALUES]
    return [{**inputs, **change} for change in (*single, here_and_there, *whole)]


@pytest.mark.parametrize(
    ("info", "case"),
    [
        pytest.param(OPS[op], case, id=f"{op}-{case.id}")
        for op, (_, _, cases) in CHOOSE.items()
        for case in cases
    ],
)
def test_an_index_exists_and_is_the_same_everywhere(info: OpInfo, case: Case, generator):
    chosen, below, _ = CHOOSE[info.name]
    inputs = info.make(case, torch.float32, DEVICE, generator)
    for given in _poisoned(inputs, generator):
        results = {
            impl: info.results(info.function(**given, impl=impl))
            for impl in info.implementations
            if runs_here(impl)
        }
        want = results["reference"]
        for impl, got in results.items():
            index = got[chosen]
            assert ((index >= 0) & (index < below(given))).all(), impl
            assert torch.equal(index, want[chosen]), impl
            if index.dim() == 2:
                assert all(len(set(row)) == len(row) for row in index.tolist()), impl
            for name in got.keys() - {chosen}:
                assert torch.equal(got[name].isnan(), want[name].isnan()), f"{impl}: {name}"


def test_an_infinite_weight_of_a_mixture_meets_no_padding():
    """Features that are not there, in the last block of them, are no number to be weighed."""
    x, gate = torch.ones(3, 5, device=DEVICE), torch.ones(4, 5, device=DEVICE)
    prev_index = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    prev_weight = torch.full((3, 2), torch.inf, device=DEVICE)
    for impl in OPS["ac_route"].implementations:
        if runs_here(impl):
            logits = mk.ac_route(
                x, gate, prev_index, prev_weight, top_k=2, mix=True, impl=impl
            ).logits
            assert (logits == torch.inf).all(), impl


def test_these_are_the_ops_that_choose(generator):
    """By numbers: a plan, which sorts given ids, chooses nothing, nor does who hands ids back."""
    found = set()
    for info in OPS.values():
        inputs = info.make(info.tests[0], torch.float32, DEVICE, generator)
        given = [t for t in inputs.values() if isinstance(t, Tensor)]
        results = info.results(info.function(**inputs, impl="reference")).values()
        made = [t for t in results if all(t is not other for other in given)]
        numbers = any(t.is_floating_point() for t in given)
        if numbers and not all(t.is_floating_point() for t in made):
            found.add(info.name)
    assert found == CHOOSE.keys()


def test_an_election_is_the_same_everywhere():
    """A NaN has no sign and stays; where the sum has none, only what has none is kept."""
    columns = list(itertools.product((*VALUES, 1.0, -2.0, 0.0), repeat=3))
    experts = torch.tensor(columns, device=DEVICE).T[:, None].contiguous()
    base = torch.zeros_like(experts[0])
    total = experts.sum(0)

    def sign(t: Tensor) -> Tensor:
        return (t > 0).int() - (t < 0).int()

    want = torch.where(sign(experts) == sign(total), experts, 0)
    for impl in OPS["camex_deltas"].implementations:
        if runs_here(impl):
            got = mk.camex_deltas(base, experts, mask="ties", impl=impl)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=impl)


@pytest.mark.parametrize("noise", [False, True], ids=["clean", "noisy"])
def test_gates_choose_experts_that_exist(noise: bool, generator):
    """K gates or fewer, and no more: a NaN is the largest, as in `torch.topk`, and is seen."""
    x, w_gate = (torch.randn(*sizes, generator=generator).to(DEVICE) for sizes in ((12, 3), (3, 5)))
    w_noise = torch.randn(3, 5, generator=generator).to(DEVICE) if noise else None
    inputs = {"x": x, "w_gate": w_gate}
    for given in _poisoned(inputs, generator):
        gates, load = mk.noisy_topk_gates(**given, w_noise=w_noise, top_k=2, training=noise)
        assert gates.shape == (12, 5)
        assert load.shape == (5,)
        assert ((gates != 0).sum(1) <= 2).all()
