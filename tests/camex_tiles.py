"""camex_linear in bf16 on the CPU's matrix tiles.

Run by test_cpu_tiles.py in a process of its own with MOLEX_CPU_TILES, since the library reads the
variable once. Prints a JSON object: a digest of results, and by check what fails, or null.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import tile_checks
import torch
from torch import Tensor

from molex_kernels.ops.merging import op
from molex_kernels.testing import Case, contract, load_ops

BF16 = torch.bfloat16
GUARD = 64  # elements in front of an operand and behind it

Inputs = dict[str, Tensor]


def _budget(check: Callable[..., None], sizes: tuple[int, ...], **options: Any) -> None:
    case = Case(dict(zip("STODEr", sizes, strict=True)), options)
    for dtype in (BF16, torch.float16):  # of fp16, products forward
        check(load_ops()["camex_linear"], case, dtype, "cpu", calls=1)


def _draw(s: int, t: int, o: int, d: int, e: int) -> Inputs:
    draw = torch.Generator().manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*sizes, generator=draw)

    return {
        "x": normal(s, t, d).to(BF16),
        "base": normal(o, d, scale=d**-0.5).to(BF16),
        "deltas": normal(e, o, d, scale=d**-0.5).to(BF16),
        "gates": normal(s, e).softmax(-1),
        "bias": normal(s, o),
        "dy": normal(s, t, o).to(BF16),
    }


def _passes(x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor, dy: Tensor):
    """The result, and the gradients of x, base, deltas, gates and bias."""
    y = op.linear("cpu", x, base, deltas, gates, bias)
    needs = [True] * 5
    return [y, *op.linear.backward(dy, x, base, deltas, gates, needs, "cpu")]


def _exact(x: Tensor, base: Tensor, deltas: Tensor, gates: Tensor, bias: Tensor, dy: Tensor):
    """The same in fp64."""
    x, base, deltas, gates, bias, dy = (v.double() for v in (x, base, deltas, gates, bias, dy))
    weight = base + torch.einsum("se,eod->sod", gates, deltas)
    dweight = torch.einsum("sto,std->sod", dy, x)
    return [
        torch.einsum("std,sod->sto", x, weight) + bias[:, None],
        torch.einsum("sto,sod->std", dy, weight),
        dweight.sum(0),
        torch.einsum("se,sod->eod", gates, dweight),
        torch.einsum("sod,eod->se", dweight, deltas),
        dy.sum(1),
    ]


def _tails(*sizes: int) -> None:
    """Operands lie between NaN: what is read outside of one is seen."""
    given = {}
    for name, value in _draw(*sizes).items():
        around = torch.full((value.numel() + 2 * GUARD,), float("nan"), dtype=value.dtype)
        given[name] = around[GUARD:-GUARD].view(value.shape).copy_(value)
    # A weight and an output are rounded once each: with bf16's 2^-9 that is 0.0024 of the norm.
    for one, exact in zip(_passes(**given), _exact(**given), strict=True):
        assert (one - exact).norm() <= 0.003 * exact.norm()


def same_with_any_threads() -> None:
    """A sum does not depend on the thread that takes it."""
    given = _draw(11, 20, 70, 40, 2)
    one = _passes(**given)
    torch.set_num_threads(3)
    several = _passes(**given)
    torch.set_num_threads(1)
    assert all(map(torch.equal, one, several))


def an_infinite_gate_stays_with_its_segment() -> None:
    """Also where tiles are filled up with zeros, of which an infinite gate would make NaN."""
    given = _draw(3, 5, 18, 40, 2)
    finite = _passes(**given)
    given["gates"][1, 0] = float("inf")
    y, dx = _passes(**given)[:2]
    assert not y[1].isfinite().any()
    for got, want in ((y, finite[0]), (dx, finite[1])):
        assert torch.equal(got[[0, 2]], want[[0, 2]])
    # One token and positive products: the sum is infinite, and NaN only if something else is.
    given = {name: value.abs() for name, value in _draw(1, 1, 18, 40, 1).items()}
    given["gates"][0, 0] = float("inf")
    y, dx = _passes(**given)[:2]
    assert (y == float("inf")).all()
    assert (dx == float("inf")).all()


def only_what_is_needed() -> None:
    """Each gradient is the same by itself, and the others are empty."""
    given = _draw(9, 7, 33, 20, 3)
    whole = _passes(**given)[1:]
    given.pop("bias")
    dy = given.pop("dy")
    for place, want in enumerate(whole):
        needs = [place == other for other in range(5)]
        found = op.linear.backward(dy, *given.values(), needs, "cpu")
        assert torch.equal(found[place], want)
        assert all(found[other].numel() == 0 for other in range(5) if other != place)


def digest() -> str:
    """Of the results and gradients of one call."""
    made = hashlib.sha256()
    for result in _passes(**_draw(2, 20, 40, 50, 3)):
        made.update(result.float().numpy().tobytes())
    return made.hexdigest()


CHECKS: dict[str, Callable[[], None]] = {
    "one of everything": lambda: _tails(1, 1, 1, 1, 1),
    "ends inside of tiles": lambda: _tails(3, 37, 17, 45, 5),
    "whole tiles": lambda: _tails(8, 32, 64, 64, 2),
    "two groups of segments": lambda: _tails(15, 18, 65, 31, 2),
    "two blocks of columns, many tokens": lambda: _tails(3, 520, 33, 530, 1),
    "two blocks of rows": lambda: _tails(10, 18, 530, 33, 2),
    "contract": lambda: _budget(
        contract.check_budget, (2, 17, 44, 18, 3, 2), mask="ties", bias=True, alpha=0.5
    ),
    "strided": lambda: _budget(contract.check_strided, (2, 33, 48, 32, 2, 0), deltas=True),
    **{
        f.__name__: f
        for f in (
            same_with_any_threads,
            an_infinite_gate_stays_with_its_segment,
            only_what_is_needed,
        )
    },
}


if __name__ == "__main__":
    tile_checks.main(CHECKS, digest)
