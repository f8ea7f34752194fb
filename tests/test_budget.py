"""The error budget itself: what is wrong fails, what is unlucky does not, nothing is left out."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from molex_kernels.testing import budget, contract, load_ops
from molex_kernels.testing.budget import DRAWS, ENOUGH, MOST_DRAWS, Errors, judge, within_budget
from molex_kernels.testing.contract import Sampler


def _draws(*ours: float, reference: float = 1.0, elements: int = ENOUGH):
    """Draws in turn, each of one tensor whose values are of size 1 / eps."""
    remaining = iter(ours)
    return lambda: {"y": Errors(next(remaining), reference, 1.0, elements)}


@pytest.mark.parametrize(
    ("elements", "draws"), [(0, 3), (1, 24), (42, 24), (50, 21), (342, 3), (10**6, 3)]
)
def test_the_number_of_draws_is_a_matter_of_elements(elements: int, draws: int):
    for ours in (0.0, 4.0):
        left = iter(range(draws))
        judge(lambda ours=ours, left=left: {"y": Errors(ours + 0 * next(left), 1.0, 1.0, elements)})
        assert not [*left]


def test_the_smallest_tensor_decides():
    both = {"x": Errors(0.0, 0.0, 1.0, 1000), "y": Errors(0.0, 0.0, 1.0, 100)}
    assert budget.draws_for(both) == 11
    assert budget.draws_for(both, enough=2 * ENOUGH) == 21
    assert budget.draws_for({**both, "empty": Errors(0.0, 0.0, 0.0, 0)}) == 11


def test_an_unlucky_draw_is_judged_with_the_others():
    lucky = iter([0.0, *(3.0,) * DRAWS])  # the reference was lucky in the first
    judge(lambda: {"y": Errors(5.0, next(lucky), 1.0)})


@pytest.mark.parametrize(("calls", "draws"), [(3, MOST_DRAWS), (2, MOST_DRAWS // 2)])
def test_of_few_elements_the_reference_is_drawn_more_often(calls, draws):
    alone = iter((9.0,) * MOST_DRAWS)
    judge(
        _draws(15.0, *(0.0,) * (calls - 1), elements=1),
        reference_alone=lambda: {"y": Errors(0.0, next(alone), 1.0, 1)},
        calls=calls,
    )
    assert len([*alone]) == MOST_DRAWS - (draws - calls)


def test_a_single_call_is_held_against_several_draws_of_the_reference():
    alone = iter((1.0, 3.0))
    judge(
        lambda: {"y": Errors(5.0, 0.0, 1.0)},
        reference_alone=lambda: {"y": Errors(0.0, next(alone), 1.0)},
        calls=1,
    )
    assert not [*alone]


@pytest.mark.parametrize("ours", [(5.0, 0.0, 0.0), (0.0, 0.0, 5.0)])
def test_no_draw_is_left_out(ours):
    with pytest.raises(AssertionError, match=r"y: error \d > 4 \(reference's own 1\)"):
        judge(_draws(*ours))


def test_what_has_to_be_exact_is():
    with pytest.raises(AssertionError, match="y: error"):
        judge(lambda: {"y": Errors(1e-30, 0.0, 0.0)})
    judge(lambda: {"y": Errors(0.0, 0.0, 0.0)})


def test_elements_count_by_the_largest_error():
    expected = torch.tensor([1.0, -4.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    exact = expected.float()
    within_budget("y", (expected + 7 * eps).float(), expected, exact, torch.float32)
    with pytest.raises(AssertionError, match="y: error"):
        within_budget("y", (expected + 13 * eps).float(), expected, exact, torch.float32)
    with pytest.raises(AssertionError, match="not finite"):
        within_budget("y", exact / torch.tensor([1, 0]), expected, exact, torch.float32)
    with pytest.raises(AssertionError, match="y: shape"):
        within_budget("y", exact[:1], expected, exact, torch.float32)


def test_a_draw_of_large_values_does_not_speak_for_all():
    small, large = (torch.full((ENOUGH,), size, dtype=torch.float64) for size in (1.0, 1e6))
    measured = partial(budget.measure, "y", dtype=torch.float32)
    off = measured(small * 1.001, small, small.float())
    with pytest.raises(AssertionError, match="y: error"):
        budget.check({"y": off | measured(large, large, large.float() * 1.0001)})


def test_a_number_that_is_nearly_0_is_judged_by_the_size_of_the_others():
    """What cancelled in one draw is no worse for it; what is wrong is."""
    one, none = (torch.tensor([size], dtype=torch.float64) for size in (1.0, 1e-6))
    measured = partial(budget.measure, "y", dtype=torch.float32)
    usual = measured(one + 1e-7, one, one + 1e-7)
    budget.check({"y": usual | measured(none + 2e-7, none, none + 1e-7)})
    with pytest.raises(AssertionError, match="y: error"):
        budget.check({"y": usual | measured(none + 9e-7, none, none + 1e-7)})
    with pytest.raises(AssertionError, match="y: error"):
        budget.check({"y": usual | measured(0 * one + 9e-7, 0 * one, 0 * one)})
    many = torch.full((budget.HANDFUL + 1,), 1.0, dtype=torch.float64)
    nearly = many * 1e-6
    with pytest.raises(AssertionError, match="y: error"):
        budget.check({"y": measured(many, many, many) | measured(nearly + 2e-7, nearly, nearly)})


def test_norms_are_over_all_draws_together():
    expected = torch.full((8,), 2.0, dtype=torch.float64)
    draws = [
        budget.measure("y", expected + ours, expected, expected + reference, torch.float32)
        for ours, reference in ((0.3, 0.1), (0.1, 0.3))
    ]
    both = draws[0] | draws[1]
    assert both.norms == pytest.approx(((0.05) ** 0.5 / 2,) * 2)
    assert both.norm_ratio == pytest.approx(1)
    assert draws[0].norm_ratio == pytest.approx(3)


def test_checks_of_one_case_share_the_draws_of_the_reference(monkeypatch):
    info = load_ops()["router_z_loss"]
    drawn = []
    given = Sampler.reference_alone
    monkeypatch.setattr(Sampler, "reference_alone", lambda s: drawn.append(s) or given(s))
    monkeypatch.setattr(contract, "_drawn", {})
    for check in (contract.check_budget, contract.check_strided):
        check(info, info.tests[0], torch.float32, "cpu")
        assert len(drawn) == MOST_DRAWS - DRAWS
    contract.check_budget(info, info.tests[0], torch.bfloat16, "cpu")
    assert len(drawn) == 2 * (MOST_DRAWS - DRAWS)
