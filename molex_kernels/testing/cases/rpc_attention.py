"""What tests and benchmarks need to know of the attention ops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from molex_kernels._dtypes import accumulate_dtype
from molex_kernels.ops.rpc_attention import reference
from molex_kernels.ops.rpc_attention.api import rpc_attention, scaled_attention
from molex_kernels.testing.baselines.rpc_attention import (
    attention_per_iteration,
    compiled_library_rpc_attention,
    library_rpc_attention,
    published_rpc_attention,
    published_scaled_attention,
)
from molex_kernels.testing.opinfo import Case, Cost, Draw, Inputs, OpInfo, Sweep

# Gradients jump where |a| = T: tests keep every a of every iteration this far from it, which is
# more than a half dtype errs by.
KINK = 0.03
ROUNDS = 200
_TESTED = 2**15  # elements of k up to which a case is for tests


def _make_rpc(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    sizes = tuple(case.sizes[name] for name in "BHNd")
    batch, heads, tokens, _ = sizes
    options = case.options
    inputs: Inputs = {
        "k": draw.normal(*sizes, scale=options.get("std", 1.0)),
        "v": draw.normal(*sizes, scale=options.get("std", 1.0)),
        "num_iters": case.sizes["n"],
        "lam": options.get("lam", 4.0),
    }
    if options.get("q"):
        inputs["q"] = draw.normal(*sizes)
    if options.get("causal"):
        inputs["causal"] = options["causal"]
    if options.get("over_mu"):
        inputs["threshold"] = "lam_over_mu"
    if options.get("given"):
        rows = (tokens,) if options["given"] == "T_per_token" else ()
        wide = accumulate_dtype(dtype)
        inputs["threshold"] = draw.normal(batch, heads, *rows, dtype=wide).abs() + 0.5
    if options.get("mask"):
        there = draw.normal(batch, tokens, dtype=torch.float32) < 0.5  # two in three
        there[:1] = False  # nothing at all, for one of the batch
        inputs["key_mask"] = there
    if options.get("dropout"):
        inputs["dropout_p"] = options["dropout"]
        inputs["dropout_seed"] = draw.integers(2**62)
    if options.get("sparse"):
        inputs["return_sparse"] = True
    if draw.generator is not None and 0 < inputs["k"].numel() <= _TESTED:
        _clear_kinks(inputs, draw, options.get("std", 1.0))
    return inputs


def _clear_kinks(inputs: Inputs, draw: Draw, scale: float) -> None:
    """Draws elements of k anew until no |a| is close to T in any iteration."""
    for _ in range(ROUNDS):
        near = near_kinks(inputs)
        if not near.any():
            return
        k = inputs["k"]
        inputs["k"] = torch.where(near, draw.normal(*k.shape, scale=scale), k)
    raise AssertionError(f"{int(near.sum())} elements of k stay close to a kink")


def near_kinks(inputs: Inputs) -> Tensor:
    """Where |a| is close to T in some iteration."""
    k, v, q = (inputs[n].double() if n in inputs else None for n in "kvq")
    assert k is not None
    assert v is not None
    causal = inputs.get("causal", False)
    threshold = inputs.get("threshold", "lam_times_mu")
    key_mask = inputs.get("key_mask")
    if isinstance(threshold, Tensor):
        bound = threshold.double()
    else:
        width = k.shape[1] * k.shape[3]
        over = threshold == "lam_over_mu"
        bound = reference.thresholds(
            k, key_mask, inputs["lam"], over, width, 4.0, causal == "prefix"
        )
    scale = 1 / math.sqrt(k.shape[3])
    near = torch.zeros_like(k, dtype=torch.bool)
    rows = bound.view(*bound.shape, *(1,) * (4 - bound.dim()))
    low = u = torch.zeros_like(k)
    for t in range(1, inputs["num_iters"] + 1):
        a = k - low + u
        near |= ((a.abs() - rows).abs() < KINK) & (t > 1)
        # The first a is k itself, the same in every dtype, but for the rounding of T.
        near |= (a.abs() - rows).abs() < KINK / 30
        low, sparse = reference.rpc_attention(
            k, v, q, bound, key_mask, t, scale, causal is not False, 0.0, None
        )
        u = u + k - low - sparse
    return near


def _results(result: Any) -> dict[str, Tensor]:
    if isinstance(result, tuple):
        return {"low": result[0], "sparse": result[1]}
    return {"low": result}


def _left_out_of_rpc(inputs: Inputs) -> dict[str, Tensor]:
    """Masked tokens, whose rows of the results are 0."""
    masked = ~inputs["key_mask"][:, None, :, None]
    names = [name for name in ("k", "v", "q") if name in inputs]
    results = ["low", *(["sparse"] if inputs.get("return_sparse") else [])]
    return dict.fromkeys([*names, *results], masked)


def _make_scaled(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Inputs:
    draw = Draw(dtype, device, generator)
    sizes = tuple(case.sizes[name] for name in "BHNd")
    _, heads, tokens, _ = sizes
    # Milder q and k than unit ones: flash attention's fp32 errors grow with the scores.
    inputs: Inputs = {name: draw.normal(*sizes, scale=0.35) for name in "qk"}
    inputs["v"] = draw.normal(*sizes)
    if case.options.get("matrix"):
        inputs["s"] = draw.normal(heads, tokens, tokens, scale=max(tokens, 1) ** -0.5)
    else:
        # The gradient of one number is a sum: a mean in v keeps it from cancelling.
        inputs["v"] = inputs["v"] + 1
        inputs["s"] = torch.full((1,), 0.5, dtype=dtype, device=device)
    return inputs


def _product(case: Case) -> int:
    """FLOPs of a product with N x N on one side, half of them under a causal mask."""
    batch, heads, tokens, width = (case.sizes[name] for name in "BHNd")
    flops = 2 * batch * heads * tokens * tokens * width
    return flops // 2 if case.options.get("causal") else flops


def _elements(case: Case) -> int:
    batch, heads, tokens, width = (case.sizes[name] for name in "BHNd")
    return batch * heads * tokens * width


def _cost_rpc(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    """k, v and the output; backward, the two, the output and three gradients once more."""
    tensors, products = (9, 7) if backward else (3, 2)
    return Cost(
        tensors * _elements(case) * dtype.itemsize, products * case.sizes["n"] * _product(case)
    )


def _cost_scaled(case: Case, dtype: torch.dtype, backward: bool) -> Cost:
    tensors, attention = (12, 7) if backward else (4, 2)
    elements = tensors * _elements(case)
    if case.options.get("matrix"):
        products = attention + (3 if backward else 1)
        heads, tokens = case.sizes["H"], case.sizes["N"]
        elements += (3 if backward else 1) * heads * tokens * tokens
    else:
        products = 2 * attention
    return Cost(elements * dtype.itemsize, products * _product(case))


def _rpc(b: int, h: int, n: int, d: int, iters: int, **options: Any) -> Case:
    return Case({"B": b, "H": h, "N": n, "d": d, "n": iters}, options)


def _scaled(b: int, h: int, n: int, d: int, **options: Any) -> Case:
    return Case({"B": b, "H": h, "N": n, "d": d}, options)


_VISION = (256, 3, 197, 64)

_WIDTHS = (16, 32, 64, 65, 128)

OPINFOS = (
    OpInfo(
        name="rpc_attention",
        function=rpc_attention,
        make=_make_rpc,
        results=_results,
        differentiable=("k", "v", "q", "threshold"),
        tests=(
            _rpc(1, 1, 17, 44, 2, lam=0.5, std=0.5),
            _rpc(2, 1, 17, 16, 2, lam=0.5, std=0.5, mask=True, dropout=0.3),
            _rpc(2, 1, 17, 17, 2, lam=1.0, std=0.5, causal="prefix", mask=True, sparse=True),
            _rpc(1, 1, 37, 16, 3, lam=1.0),
            _rpc(1, 1, 17, 70, 2, lam=0.5, std=0.5),
            _rpc(1, 1, 33, 16, 2, lam=0.0),
            _rpc(2, 4, 17, 16, 2, std=0.5, given="T", q=True, causal=True),
            _rpc(1, 2, 17, 16, 1, std=0.5, given="T_per_token", dropout=0.5, causal=True),
            _rpc(1, 1, 70, 16, 2, lam=0.5, std=0.5, over_mu=True, sparse=True),
            _rpc(2, 2, 0, 16, 2, lam=1.0),
        ),
        benchmarks=(
            *(_rpc(*_VISION, iters, lam=4.0) for iters in (1, 2, 4, 6)),
            *(_rpc(*_VISION, iters, lam=0.5) for iters in (1, 4)),
            _rpc(64, 12, 197, 64, 4),
            _rpc(96, 8, 256, 16, 4, causal=True),
            _rpc(4, 16, 1024, 64, 4),
            _rpc(4, 16, 4096, 64, 4),
        ),
        quick=(_rpc(8, 3, 197, 64, 4), _rpc(8, 8, 256, 16, 2, causal=True)),
        cost=_cost_rpc,
        baselines={
            "published": published_rpc_attention,
            "library": library_rpc_attention,
            "compiled_library": compiled_library_rpc_attention,
        },
        proxies={"sdpa_per_iteration": attention_per_iteration},
        left_out=_left_out_of_rpc,
        masked=(
            _rpc(3, 1, 7, 6, 2, lam=0.5, std=0.5, mask=True, sparse=True),
            _rpc(2, 2, 7, 6, 2, std=0.5, given="T", q=True, causal=True, mask=True),
            _rpc(2, 1, 7, 6, 2, lam=1.0, std=0.5, causal="prefix", mask=True, dropout=0.3),
        ),
        sweeps=(
            Sweep("N", tuple(_rpc(4, 16, n, 64, 4) for n in (256, 1024, 4096))),
            Sweep("n", tuple(_rpc(64, 3, 197, 64, iters) for iters in (1, 2, 4, 8))),
        ),
        quick_sweeps=(
            Sweep("N", tuple(_rpc(2, 3, n, 64, 4) for n in (64, 128, 256, 512))),
            Sweep("n", tuple(_rpc(2, 3, 197, 64, iters) for iters in (1, 2, 4, 8))),
        ),
        compiled=(
            *(_rpc(1, 1, 256, d, 2, causal=True, mask=True, dropout=0.1) for d in _WIDTHS),
            *(_rpc(1, 1, 256, d, 2, causal=True, mask=True) for d in (65, 128)),
            # More heads than a grid's second dimension may have.
            _rpc(300, 256, 2, 16, 2),
        ),
    ),
    OpInfo(
        name="scaled_attention",
        function=scaled_attention,
        make=_make_scaled,
        results=lambda out: {"out": out},
        differentiable=("q", "k", "v", "s"),
        tests=(
            _scaled(2, 3, 17, 16, matrix=True),
            _scaled(2, 2, 37, 44),
            _scaled(2, 2, 0, 16),
            _scaled(1, 2, 33, 58, matrix=True),
        ),
        benchmarks=(_scaled(*_VISION), _scaled(*_VISION, matrix=True)),
        quick=(_scaled(8, 3, 197, 64, matrix=True),),
        cost=_cost_scaled,
        baselines={"published": published_scaled_attention},
    ),
)
