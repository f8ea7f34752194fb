"""Experts and grouped GEMM in 16 bits on the CPU's matrix tiles, fp16 in two terms of bf16.

Run by test_cpu_tiles.py in a process of its own with MOLEX_CPU_TILES, since the library reads the
variable once. Prints a JSON object: a digest of results, and what fails, by check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import tile_checks
import torch
from torch import Tensor

import molex_kernels as mk
from molex_kernels.testing import Case, contract, load_ops

BF16, FP16 = torch.bfloat16, torch.float16
SIZES = (1, 15, 16, 17, 31, 33, 48, 100)


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _fenced(made: Tensor, turned: bool) -> Tensor:
    """The same numbers with NaN around each matrix; stored by columns where `turned`."""
    rows, columns = made.shape[-2:]
    around = made.new_full((*made.shape[:-2], rows + 4, columns + 6), torch.nan)
    if turned:
        around = around.mT.contiguous().mT
    inner = around[..., 2 : rows + 2, 3 : columns + 3]
    inner.copy_(made)
    return inner


def _product(rows: int, columns: int, depth: int, turned: bool, dtype: torch.dtype = BF16) -> None:
    """All three products of two experts, y = x w^T, dx = dy w and dw = dy^T x."""
    ends = torch.tensor([rows, rows + 3], dtype=torch.int32)
    draw = partial(_draw, dtype=dtype)
    x = _fenced(draw(rows + 3, depth), False).requires_grad_()
    weight = _fenced(draw(2, columns, depth, seed=1), turned).requires_grad_()
    bias = draw(2, columns, seed=2)
    dy = _fenced(draw(rows + 3, columns, seed=3), False)
    y = mk.grouped_gemm(x, weight, ends, bias=bias, impl="cpu")
    y.backward(dy)
    parts = (slice(0, rows), slice(rows, rows + 3))
    xd, wd, dyd = x.detach().double(), weight.detach().double(), dy.double()
    expected = {
        "y": torch.cat([xd[p] @ wd[e].mT + bias[e].double() for e, p in enumerate(parts)]),
        "dx": torch.cat([dyd[p] @ wd[e] for e, p in enumerate(parts)]),
        "dw": torch.stack([dyd[p].mT @ xd[p] for p in parts]),
    }
    # Sums in fp32 of exact products, or of all but the product of their low terms, rounded once.
    half, left_out = (2.0**-8, 2.0**-18) if dtype == BF16 else (2.0**-11, 2.0**-15)
    sums = {
        "y": torch.cat([xd[p].abs() @ wd[e].abs().mT for e, p in enumerate(parts)]),
        "dx": torch.cat([dyd[p].abs() @ wd[e].abs() for e, p in enumerate(parts)]),
        "dw": torch.stack([dyd[p].abs().mT @ xd[p].abs() for p in parts]),
    }
    for name, made in (("y", y), ("dx", x.grad), ("dw", weight.grad)):
        allowed = half * expected[name].abs() + left_out * sums[name] + 1e-30
        worst = ((made.double() - expected[name]).abs() / allowed).max()
        assert worst <= 1, (name, rows, columns, depth, turned, dtype, float(worst))


def products_of_all_tails() -> None:
    """Every size of each dimension beside sizes of other tails, NaN outside of every operand."""
    for i, size in enumerate(SIZES):
        one, two = SIZES[(3 * i + 2) % len(SIZES)], SIZES[(5 * i + 1) % len(SIZES)]
        for dtype in (BF16, FP16):
            _product(size, one, two, turned=False, dtype=dtype)
            _product(one, two, size, turned=False, dtype=dtype)
            _product(two, size, one, turned=True, dtype=dtype)


def products_of_several_blocks() -> None:
    """More terms than are summed at a time, in every product."""
    for dtype in (BF16, FP16):
        _product(40, 33, 1100, turned=False, dtype=dtype)
        _product(33, 530, 64, turned=False, dtype=dtype)
        _product(1050, 33, 48, turned=True, dtype=dtype)


def _experts(threads: int, tokens: int, dtype: torch.dtype = BF16, **options: Any) -> list[Tensor]:
    """Results of experts of odd sizes, and gradients."""
    torch.set_num_threads(threads)
    inputs = {
        "x": _draw(tokens, 40, dtype=dtype),
        "w_up": _draw(3, 2 * 72, 40, seed=1, dtype=dtype),
        "w_down": _draw(3, 40, 72, seed=2, dtype=dtype),
    }
    for tensor in inputs.values():
        tensor.requires_grad_()
    index = torch.randint(3, (tokens, 2), generator=torch.Generator().manual_seed(3))
    y = mk.moe_mlp(
        expert_index=index,
        expert_weight=torch.full((tokens, 2), 0.5),
        activation="swiglu",
        impl="cpu",
        **inputs,
        **options,
    )
    y.backward(torch.ones_like(y))
    with torch.no_grad():
        alone = mk.moe_mlp(
            expert_index=index,
            expert_weight=torch.full((tokens, 2), 0.5),
            activation="swiglu",
            impl="cpu",
            **{name: tensor.detach() for name, tensor in inputs.items()},
            **options,
        )
    torch.set_num_threads(1)
    return [y.detach(), alone, *(tensor.grad for tensor in inputs.values())]


def same_with_any_threads() -> None:
    """Pieces, and parts of pieces where there are few, change no sum."""
    for dtype in (BF16, FP16):
        for tokens in (2, 300):
            made = (_experts(threads, tokens, dtype) for threads in (1, 4))
            for one, several in zip(*made, strict=True):
                assert torch.equal(one, several), (tokens, dtype)


def infinity_stays_in_its_units() -> None:
    """relu(-inf) is 0, also beside units and columns that only fill up a tile."""
    for dtype, tokens in ((BF16, 1), (FP16, 1), (FP16, 40)):
        x = torch.full((tokens, 20), torch.inf, dtype=dtype)
        w_up = -torch.ones(1, 20, 20, dtype=dtype)
        y = mk.moe_mlp(
            x,
            torch.zeros(tokens, 1, dtype=torch.int64),
            torch.ones(tokens, 1),
            w_up,
            torch.ones(1, 20, 20, dtype=dtype),
            activation="relu",
            impl="cpu",
        )
        assert torch.equal(y, torch.zeros_like(y)), (dtype, y)


def sizes_of_zero() -> None:
    """No token, feature or hidden unit, with a gradient and without."""
    for dtype in (BF16, FP16):
        for tokens, width, hidden in ((0, 8, 8), (40, 0, 40), (40, 40, 0), (3, 0, 0)):
            shapes = (
                (tokens, width),
                (2, 2 * hidden, width),
                (2, width, hidden),
                (2, 2 * hidden),
            )
            x, *parameters = (_draw(*shape, dtype=dtype).requires_grad_() for shape in shapes)
            index, weight = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
            call = partial(mk.moe_mlp, activation="swiglu", impl="cpu")
            w_up, w_down, b_up = parameters
            y = call(x, index, weight, w_up, w_down, b_up=b_up)
            y.sum().backward()
            with torch.no_grad():
                alone = call(x, index, weight, w_up, w_down, b_up=b_up)
            assert torch.equal(y, torch.zeros(tokens, width, dtype=dtype)), (tokens, width, hidden)
            assert torch.equal(alone, y), (tokens, width, hidden)
            assert not any(t.grad.any() for t in parameters), (tokens, width, hidden)


def what_is_not_finite_is_fp32s() -> None:
    """Infinity times a number without a low term, of operands stored either way."""
    for turned in (False, True):
        x, weight = torch.ones(20, 33, dtype=FP16), torch.ones(1, 18, 33, dtype=FP16)
        x[3, 5], x[4, 5], x[4, 6], x[7, 0], weight[0, 2] = (
            torch.inf,
            torch.inf,
            -torch.inf,
            torch.nan,
            4e3,
        )
        bias, ends = torch.ones(1, 18, dtype=FP16), torch.tensor([20], dtype=torch.int32)
        y = mk.grouped_gemm(x, _fenced(weight, turned), ends, bias=bias, impl="cpu")
        expected = (x.float() @ weight[0].float().mT + 1).to(FP16)
        assert torch.isinf(expected).sum() == 18 + 17, "a row, and a column that overflows"
        assert torch.equal(y.nan_to_num(7.0, 8e4, -8e4), expected.nan_to_num(7.0, 8e4, -8e4)), y


def _budget(check: Callable[..., None], op: str, sizes: dict[str, int], **options: Any) -> None:
    for dtype in (BF16, FP16):
        check(load_ops()[op], Case(sizes, options), dtype, "cpu", calls=1)


def digest() -> str:
    """Of results and gradients of one call."""
    made = hashlib.sha256()
    for dtype in (BF16, FP16):
        for result in _experts(1, 40, dtype):
            made.update(result.float().numpy().tobytes())
    return made.hexdigest()


_SMALL = {"T": 37, "D": 24, "I": 40, "E": 5, "K": 2}
_DEEP = {"T": 70, "D": 530, "I": 40, "E": 2, "K": 1}  # more terms than are summed at a time
_ONE = {"T": 1, "D": 7, "I": 3, "E": 4, "K": 2}


def _case(check: Callable[..., None], op: str, sizes: dict[str, int], **options: Any) -> Any:
    return lambda: _budget(check, op, sizes, **options)


CHECKS: dict[str, Callable[[], None]] = {
    **{
        f.__name__: f
        for f in (
            products_of_all_tails,
            products_of_several_blocks,
            same_with_any_threads,
            infinity_stays_in_its_units,
            sizes_of_zero,
            what_is_not_finite_is_fp32s,
        )
    },
    "relu, an idle expert": _case(contract.check_budget, "moe_mlp", _SMALL, routing="empty"),
    "gelu, bias": _case(
        contract.check_budget, "moe_mlp", {**_SMALL, "I": 50}, activation="gelu", bias=True
    ),
    "swiglu, bias, other ranks' experts": _case(
        contract.check_budget,
        "moe_mlp",
        _SMALL,
        activation="swiglu",
        bias=True,
        routing="elsewhere",
    ),
    "clamped_swiglu, interleaved, bias": _case(
        contract.check_budget,
        "moe_mlp",
        {**_SMALL, "I": 21},
        activation="clamped_swiglu",
        gate_layout="interleaved",
        bias=True,
    ),
    "swiglu, bias, several blocks": _case(
        contract.check_budget, "moe_mlp", _DEEP, activation="swiglu", bias=True
    ),
    "relu, bias, several blocks": _case(contract.check_budget, "moe_mlp", _DEEP, bias=True),
    "one token": _case(contract.check_budget, "moe_mlp", _ONE, activation="swiglu"),
    "strided": _case(contract.check_strided, "moe_mlp", _SMALL, activation="swiglu", bias=True),
}


if __name__ == "__main__":
    tile_checks.main(CHECKS, digest)
