"""The checks' messages name the argument, what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch

from molex_kernels import _check

X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: _check.floating("x", [1], "T, D", (None, 3)),
            TypeError,
            r"x: .*\[T, D\], got list",
        ),
        (
            lambda: _check.floating("x", X.long(), "T, D", (None, 3)),
            TypeError,
            "x: expected dtype float16 or .*, got int64",
        ),
        (
            lambda: _check.floating("x", X, "T, D", (None, 5)),
            ValueError,
            r"x: expected shape \[T, D\] with D=5, got \[4, 3\]",
        ),
        (lambda: _check.floating("x", X, "T", (None,)), ValueError, r"shape \[T\], got \[4, 3\]"),
        (
            lambda: _check.floating("w", X.double(), "T, D", (4, 3), like=X),
            TypeError,
            "w: expected dtype float32, got float64",
        ),
        (
            lambda: _check.floating("w", X.to("meta"), "T, D", (4, 3), like=X),
            ValueError,
            "w: expected device cpu, got meta",
        ),
        (lambda: _check.index("i", X, "T, K", (4, None)), TypeError, "i: .*int64 or int32"),
        (lambda: _check.integer("k", 2.0, 1), TypeError, "k: expected an int, got float"),
        (lambda: _check.integer("k", True, 1), TypeError, "k: expected an int, got bool"),
        (lambda: _check.integer("k", 0, 1), ValueError, "k: expected at least 1, got 0"),
        (
            lambda: _check.integer("k", 9, 1, 8, " (the experts)"),
            ValueError,
            r"at least 1 and at most 8 \(the experts\), got 9",
        ),
        (lambda: _check.number("t", "a", 0), TypeError, "t: expected a number, got str"),
        (lambda: _check.number("t", math.nan, 0), ValueError, "finite number at least 0, got nan"),
        (lambda: _check.number("t", 0, 0, exclusive=True), ValueError, "above 0, got 0"),
        (lambda: _check.choice("s", "c", ("a", "b")), ValueError, "s: expected one of 'a', 'b'"),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_good_values_pass():
    _check.floating("x", X, "T, D", (None, 3))
    _check.floating("w", X, "T, D", (4, None), like=X)
    _check.index("i", X.int(), "T, K", (4, 3))
    _check.integer("k", 8, 1, 8)
    _check.number("t", 0, 0)
    _check.choice("s", "b", ("a", "b"))
