"""The error budget itself: what is wrong fails, what is unlucky does not."""

from __future__ import annotations

import pytest
import torch

from molex_kernels.testing.budget import DRAWS, Errors, judge, within_budget


def _draws(*ours: float, reference: float = 1.0):
    """Draws in turn, each of one tensor whose values are of size 1 / eps."""
    remaining = iter(ours)
    return lambda: {"y": Errors(next(remaining), reference, 1.0)}


def test_inside_the_budget_one_draw_is_enough():
    judge(_draws(4.0))


def test_an_unlucky_draw_is_judged_with_others():
    lucky = iter([0.0, *(3.0,) * (DRAWS - 1)])  # the reference was lucky in the first
    judge(lambda: {"y": Errors(5.0, next(lucky), 1.0)})


def test_a_badly_conditioned_draw_is_judged_by_others():
    judge(_draws(5.0, *(0.0,) * (DRAWS - 1), *(4.0,) * DRAWS))


@pytest.mark.parametrize(
    "ours",
    [
        (5.0,) * 2 * DRAWS,
        (5.0, *(0.0,) * (2 * DRAWS - 2), 5.0),
        (7.0, *(0.0,) * (DRAWS - 1)),  # grossly
    ],
)
def test_what_is_outside_in_all_draws_together_fails(ours):
    with pytest.raises(AssertionError, match=r"y: error \d > 4 \(reference's own 1\)"):
        judge(_draws(*ours))


def test_what_has_to_be_exact_is():
    with pytest.raises(AssertionError, match="y: error"):
        judge(lambda: {"y": Errors(1e-30, 0.0, 0.0)})
    judge(lambda: {"y": Errors(0.0, 0.0, 0.0)})


def test_elements_count_by_the_largest_error():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    exact = truth.float()
    within_budget("y", (truth + 7 * eps).float(), truth, exact, torch.float32)
    with pytest.raises(AssertionError, match="y: error"):
        within_budget("y", (truth + 13 * eps).float(), truth, exact, torch.float32)
    with pytest.raises(AssertionError, match="not finite"):
        within_budget("y", exact / torch.tensor([1, 0]), truth, exact, torch.float32)
    with pytest.raises(AssertionError, match="y: shape"):
        within_budget("y", exact[:1], truth, exact, torch.float32)
