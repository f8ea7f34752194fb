"""RPC attention's CUDA kernels, run on a CPU and compiled for the chips they are written for."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import peaked
import pytest
import rpc_compiled
import rpc_precision
import sass
import torch
from conftest import once
from rpc_cuda import Call, Library, build
from torch import Tensor

import molex_kernels as mk
from molex_kernels._backends import CUDA
from molex_kernels._triton import chips
from molex_kernels.ops.rpc_attention import reference
from molex_kernels.ops.rpc_attention.placement import TABLE, block_memory
from molex_kernels.testing.budget import Errors, judge, measure
from molex_kernels.testing.cases.rpc_attention import ROUNDS, near_kinks
from molex_kernels.testing.opinfo import Inputs

ITERATED = {"shared_limit": 0}  # no block has the memory to hold a head
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return Library(once(tmp_path_factory, "librpc_attention.so", build))


def _make(
    tokens: int,
    width: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    sparse: float = 0.3,
    n: int = 2,
    heads: tuple[int, int] = (1, 1),
    causal: bool = False,
    mask: bool = False,
    has_q: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Call:
    """Elements of k stand clear of the threshold, a share of `sparse` of them above it.

    v is small, so that most stay there in the first three iterations, and what comes near is drawn
    anew: what a gradient does at the threshold is a matter of rounding. With more than one
    iteration each row has its threshold: the direct terms of the gradient then cancel, and one
    number's error would be a matter of luck.
    """
    shape = (*heads, tokens, width)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    above = torch.rand(shape, generator=generator) < sparse
    magnitude = torch.where(above, uniform(1.5, 2.0), uniform(0.05, 0.2))
    k = magnitude * torch.randn(shape, generator=generator).sign()
    threshold = 1.1 + 0.1 * torch.rand(shape[: 3 if n > 1 else 2], generator=generator)
    key_mask = None
    if mask:
        key_mask = torch.rand((heads[0], tokens), generator=generator) < 0.7
        key_mask[0] = heads[0] == 1  # one of the batch has no token at all
        key_mask[-1, 0] = True
    seed = torch.randint(2**62, (), generator=generator) if dropout_p else None
    v = 0.15 * torch.randn(shape, generator=generator)
    q = torch.randn(shape, generator=generator) if has_q else None
    k, v, q = (None if x is None else x.to(dtype) for x in (k, v, q))
    seen = {"v": v, "threshold": threshold, "key_mask": key_mask, "num_iters": n, "causal": causal}
    if has_q:
        seen["q"] = q
    for _ in range(ROUNDS):
        near = near_kinks({**seen, "k": k})
        if not near.any():
            break
        anew = torch.where(above, uniform(1.5, 2.0), uniform(0.05, 0.2)).to(dtype) * k.sign()
        k = torch.where(near, anew, k)
    return Call(
        *(k, v, q, threshold, key_mask, n),
        *(width**-0.5 if scale is None else scale, causal, dropout_p, seed),
    )


def _reference(
    call: Call, dtype: torch.dtype, grad_out: Tensor, grad_sparse: Tensor
) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {"k": call.k, "v": call.v, "q": call.q}
    leaves = {n: t.to(dtype).requires_grad_() for n, t in leaves.items() if t is not None}
    wide = torch.promote_types(dtype, torch.float32)
    leaves["threshold"] = call.threshold.to(wide).requires_grad_()
    out, sparse = reference.rpc_attention(
        *(leaves["k"], leaves["v"], leaves.get("q"), leaves["threshold"], call.key_mask),
        *(call.num_iters, call.scale, call.is_causal, call.dropout_p, call.seed),
    )
    upstream = [grad_out.to(out.dtype), grad_sparse.to(sparse.dtype)]
    gradients = torch.autograd.grad([out, sparse], list(leaves.values()), upstream)
    return {
        "out": out.detach(),
        "sparse": sparse.detach(),
        **{f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)},
    }


def _upstream(call: Call, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = call.k.shape
    grad_out = torch.randn(shape, generator=generator).to(call.k.dtype)
    # S has the sign of k, so that a threshold's gradient is no sum of terms that cancel.
    return grad_out, call.k.sign().float() * (0.5 + torch.rand(shape, generator=generator))


def _errors(call: Call, got: dict[str, Tensor], *upstream: Tensor) -> dict[str, Errors]:
    """Of the results and of the gradients."""
    expected = _reference(call, torch.float64, *upstream)
    own = _reference(call, call.k.dtype, *upstream)
    assert got.keys() == expected.keys()
    return {
        name: measure(name, value, expected[name], own[name], call.k.dtype)
        for name, value in got.items()
    }


def _measured(
    library: Library, call: Call, generator: torch.Generator, **limits: int
) -> dict[str, Errors]:
    upstream = _upstream(call, generator)
    library.schedule(int(torch.randint(2**31, (), generator=generator)))
    result = library.forward(call, **limits)
    gradients = library.backward(call, result, *upstream, **limits)
    got = {"out": result.out, "sparse": result.sparse}
    got |= {f"gradient of {n}": g for n, g in gradients.items()}
    return _errors(call, got, *upstream)


# Of one token and two iterations gradients are exactly 0, which rounding is not.
CASES = {
    "N1-d16": (1, 16, FLOAT, {"n": 1}),
    "N1-d44-causal": (1, 44, HALF, {"causal": True, "n": 1}),
    "N1-d58-q": (1, 58, FLOAT, {"n": 1, "has_q": True, "dropout_p": 0.3, "heads": (2, 4)}),
    "N1-d128": (1, 128, BFLOAT, {"n": 1, "sparse": 0.95}),
    "N16-d16": (16, 16, BFLOAT, {"heads": (2, 3)}),
    "N16-d58-q": (16, 58, FLOAT, {"has_q": True, "heads": (2, 2)}),
    "N16-d64-dropout": (16, 64, HALF, {"dropout_p": 0.3, "n": 1}),
    "N37-d16-mask": (37, 16, HALF, {"mask": True, "heads": (2, 2), "causal": True}),
    "N37-d17": (37, 17, FLOAT, {"sparse": 0.0, "n": 3}),
    "N37-d44-q": (37, 44, BFLOAT, {"has_q": True, "n": 3}),
    "N37-d58-negative": (37, 58, HALF, {"scale": -0.2, "mask": True}),
    "N37-d58-peaked": (37, 58, FLOAT, {"sparse": 0.95, "mask": True, "causal": True}),
    "N37-d58-even": (37, 58, FLOAT, {"scale": 0.0, "mask": True, "heads": (2, 1)}),
    "N37-d58-even-q": (37, 58, HALF, {"scale": 0.0, "causal": True, "has_q": True}),
    "N37-d64-negative": (37, 64, FLOAT, {"scale": -0.5, "causal": True}),
    "N37-d64-causal": (37, 64, FLOAT, {"sparse": 0.5, "causal": True}),
    "N37-d128-everything": (
        *(37, 128, FLOAT),
        {"causal": True, "mask": True, "has_q": True, "dropout_p": 0.2},
    ),
    "N197-d16-causal": (197, 16, BFLOAT, {"causal": True, "n": 3}),
    "N197-d44-dropout": (197, 44, HALF, {"dropout_p": 0.2, "mask": True, "causal": True}),
    "N197-d16-dense": (197, 16, FLOAT, {"sparse": 0.95, "mask": True}),
    "N197-d58": (197, 58, FLOAT, {}),
    "N197-d64-empty": (197, 64, BFLOAT, {"sparse": 0.0, "n": 3}),
    "N197-d64-dense": (197, 64, HALF, {"sparse": 0.95}),
    "N197-d128-causal-q": (197, 128, BFLOAT, {"causal": True, "has_q": True}),
    "N65-d64-q": (65, 64, HALF, {"has_q": True, "heads": (1, 2)}),
    "N128-d64-causal": (128, 64, BFLOAT, {"causal": True, "mask": True}),
    "N129-d33-negative": (129, 33, BFLOAT, {"scale": -0.2, "n": 1}),
    "N256-d64-mask-q": (256, 64, HALF, {"mask": True, "has_q": True}),
    "N600-d16": (600, 16, FLOAT, {"mask": True}),
    "N330-d16-empty": (330, 16, FLOAT, {"sparse": 0.0}),
    "N400-d58-q": (400, 58, FLOAT, {"has_q": True, "causal": True, "n": 1}),
    "N330-d58-causal": (330, 58, BFLOAT, {"causal": True}),
    "N330-d64-dropout": (330, 64, HALF, {"dropout_p": 0.1, "n": 1}),
    "N440-d128": (440, 128, BFLOAT, {"n": 1}),
}


@pytest.mark.parametrize("form", ["warp_groups", "on_chip", "iterated"])
@pytest.mark.parametrize("name", CASES)
def test_within_budget(library: Library, name: str, form: str, generator: torch.Generator):
    tokens, width, dtype, options = CASES[name]
    limits = ITERATED if form == "iterated" else {}

    def make() -> Call:
        return _make(tokens, width, dtype, generator, **options)

    with nullcontext() if form == "warp_groups" else library.without_warp_groups():
        if form == "warp_groups" and not library.runs_in_warp_groups(make()):
            pytest.skip("another form has it")
        if library.runs_on_chip(make(), **limits) != (form != "iterated"):
            pytest.skip("does not fit on the chip")
        judge(lambda: _measured(library, make(), generator, **limits))


def test_what_runs_in_warp_groups(library: Library, generator: torch.Generator):
    """16 bits, widths whose padded one is 64, up to 256 keys, without dropout."""

    def runs(tokens: int, width: int, dtype: torch.dtype = BFLOAT, **options) -> bool:
        return library.runs_in_warp_groups(_make(tokens, width, dtype, generator, **options))

    assert runs(1, 33)
    assert runs(197, 64, HALF)
    assert runs(256, 64, causal=True, mask=True, has_q=True)
    assert not runs(257, 64)
    assert not runs(64, 32)
    assert not runs(64, 65)
    assert not runs(64, 64, FLOAT)
    assert not runs(64, 64, dropout_p=0.1)
    with library.without_clusters():
        assert runs(64, 64)
        assert not runs(65, 64)
    with library.without_warp_groups():
        assert not runs(64, 64)


def test_whose_gradient_stays_on_the_chip(library: Library, generator: torch.Generator):
    """As in warp groups; q takes more memory, which an H200 has."""

    def stays(tokens: int, width: int, dtype: torch.dtype = BFLOAT, limits=(), **options) -> bool:
        call = _make(tokens, width, dtype, generator, **options)
        return library.gradient_is_on_chip(call, **dict(limits))

    assert stays(1, 33, HALF)
    assert stays(256, 64, causal=True, mask=True, has_q=True)
    assert not stays(257, 64)
    assert not stays(64, 32)
    assert not stays(64, 65)
    assert not stays(64, 64, FLOAT)
    assert not stays(64, 64, dropout_p=0.1)
    assert stays(128, 64, limits={"cluster_limit": 1})
    assert not stays(129, 64, limits={"cluster_limit": 1})
    assert not stays(64, 64, limits=ITERATED)
    with library.without_clusters():
        assert stays(64, 64)
        assert not stays(65, 64)
    with library.without_warp_groups():
        assert not stays(64, 64)


def test_what_fits_on_the_chip(library: Library, generator: torch.Generator):
    """The shapes of the published vision models do, on an H200; without clusters, one block's."""
    for tokens, width, dtype in ((197, 64, HALF), (197, 64, FLOAT), (512, 64, BFLOAT)):
        assert library.runs_on_chip(_make(tokens, width, dtype, generator))
    assert not library.runs_on_chip(_make(513, 64, BFLOAT, generator))
    assert not library.runs_on_chip(_make(197, 64, HALF, generator), cluster_limit=1)
    assert library.runs_on_chip(_make(256, 32, HALF, generator), cluster_limit=1)
    assert not library.runs_on_chip(_make(257, 32, HALF, generator), cluster_limit=1)
    assert library.runs_on_chip(_make(128, 128, HALF, generator), cluster_limit=1)


def test_a_predicted_row_takes_what_stays_on_chip(library: Library, generator: torch.Generator):
    """All that the row is for, on each of its chips; clusters come with sm_90."""
    rows = [row for row in TABLE if row.impl == "cuda" and not row.measured]
    assert rows
    for row in rows:
        for name, dtype in itertools.product(row.chips, row.dtypes):
            limits = {
                "shared_limit": chips.CHIPS[name].shared,
                "cluster_limit": 8 if int(name.removeprefix("sm_")) >= 90 else 1,
            }
            for tokens, has_q in itertools.product((1, row.tokens), (False, True)):
                call = _make(tokens, row.most, dtype, generator, has_q=has_q)
                assert library.runs_on_chip(call, **limits), (name, dtype, tokens, has_q)


def test_without_room_for_clusters(library: Library, generator: torch.Generator):
    """A head that one block does not hold is iterated, and one that a larger block holds is not."""
    for width, on_chip in ((64, False), (32, True)):
        call = _make(197, width, BFLOAT, generator)
        expected = library.forward(call).out if on_chip else library.forward(call, **ITERATED).out
        with library.without_clusters():
            assert library.runs_on_chip(call) == on_chip
            assert torch.equal(library.forward(call).out, expected)


@pytest.mark.parametrize(("form", "width"), [({}, 24), (ITERATED, 24), ({}, 40)])
def test_strides_and_expanded_gradients(
    library: Library, form, width: int, generator: torch.Generator
):
    """Heads inside tokens, odd offsets, one row of gradients for all."""
    call = _make(37, width, HALF, generator, heads=(2, 3), has_q=True)
    assert library.gradient_is_on_chip(call, **form) == (width > 32)

    def spread(t: Tensor) -> Tensor:
        wide = torch.full((2, 37, 4, width + 3), float("nan"), dtype=t.dtype)
        return wide[:, :, 1:, 2:-1].permute(0, 2, 1, 3).copy_(t)

    moved = Call(**{**vars(call), **{n: spread(getattr(call, n)) for n in "kvq"}})
    grad_out, grad_sparse = _upstream(call, generator)
    grad_out, grad_sparse = (t[:, :1, :1].expand(call.k.shape) for t in (grad_out, grad_sparse))
    plain, strided = library.forward(call, **form), library.forward(moved, **form)
    assert torch.equal(plain.out, strided.out)
    expected = library.backward(
        call, plain, grad_out.contiguous(), grad_sparse.contiguous(), **form
    )
    for name, value in library.backward(moved, strided, grad_out, grad_sparse, **form).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("tokens", "width", "dtype"), [(197, 16, FLOAT), (130, 64, HALF)])
def test_a_threshold_for_a_head_is_one_for_each_row(
    library: Library, tokens: int, width: int, dtype: torch.dtype, generator: torch.Generator
):
    rows = _make(tokens, width, dtype, generator, heads=(2, 2))
    rows.threshold.copy_(rows.threshold[..., :1].expand(rows.threshold.shape))
    head = Call(**{**vars(rows), "threshold": rows.threshold[..., 0].contiguous()})
    results = [library.forward(call) for call in (rows, head)]
    assert torch.equal(results[0].out, results[1].out)
    upstream = _upstream(rows, generator)
    of_rows, of_head = (
        library.backward(call, result, *upstream)
        for call, result in zip((rows, head), results, strict=True)
    )
    assert torch.equal(of_rows["k"], of_head["k"])
    sums, terms = of_rows["threshold"].double().sum(-1), of_rows["threshold"].abs().sum(-1)
    assert ((of_head["threshold"] - sums).abs() <= 1e-6 * terms).all()


@pytest.mark.parametrize("form", [{}, ITERATED], ids=["on_chip", "iterated"])
def test_at_a_threshold_of_0_a_0_has_no_sign(
    library: Library, form: dict[str, int], generator: torch.Generator
):
    """But it is outside of the threshold: its S is a."""
    call = _make(5, 40, BFLOAT, generator)
    assert library.gradient_is_on_chip(call, **form) == (form == {})
    call.k[..., ::2] = 0.0
    call.threshold.zero_()
    upstream = torch.zeros_like(call.v), torch.ones(call.k.shape)
    call.num_iters = 1
    got = library.backward(call, library.forward(call, **form), *upstream, **form)
    assert torch.equal(got["threshold"], -call.k.sign().float().sum(-1))
    assert torch.equal(got["k"], torch.ones_like(call.k))


def test_scores_keep_every_bit(library: Library, generator: torch.Generator):
    """Two numbers of TF32 hold 23 bits of this one, and a row's largest score is its square's."""
    call = _make(37, 16, FLOAT, generator, n=1)
    call.k.copy_(call.k.sign() * torch.tensor(0x3F800BFF, dtype=torch.int32).view(FLOAT))
    call.threshold.fill_(2.0)
    largest = library.forward(call).stats[0, 0].double()
    expected = call.k.double().square().sum(-1)
    assert ((largest - expected).abs() < torch.finfo(FLOAT).eps * expected).all()


def test_of_peaked_attention_half_a_rounding_is_left(library: Library, generator: torch.Generator):
    k, v, upstream = peaked.draw(generator)
    threshold = torch.full(k.shape[:2], float("inf"))
    call = Call(k, v, None, threshold, None, 1, k.shape[-1] ** -0.5, is_causal=False)
    dk = library.backward(call, library.forward(call), upstream, None)["k"]
    assert peaked.roundings(dk, k, v, upstream) < 0.55


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@rpc_precision.every_regime
def test_in_16_bits_gradients_err_by_no_more_than_pytorchs(
    library: Library,
    regime: str,
    std: float,
    num_iters: int,
    dtype: torch.dtype,
    generator: torch.Generator,
):
    def gradients(inputs: Inputs, upstream: Tensor) -> dict[str, Tensor]:
        call = Call(
            *(inputs.get(name) for name in ("k", "v", "q", "threshold", "key_mask", "num_iters")),
            inputs["k"].shape[3] ** -0.5,
            inputs.get("causal", False),
        )
        found = library.backward(call, library.forward(call, **form), upstream, None, **form)
        return {name: found[name] for name in "kvq" if name in found}

    form = ITERATED if num_iters == 2 else {}  # both keep what rounding took
    rpc_precision.judge(gradients, regime, std, num_iters, dtype, torch.device("cpu"), generator)


@pytest.mark.parametrize(
    ("form", "width", "dtype"), [({}, 16, FLOAT), (ITERATED, 16, FLOAT), ({}, 64, BFLOAT)]
)
def test_masked_tokens_do_not_exist(
    library: Library, form, width: int, dtype: torch.dtype, generator: torch.Generator
):
    """Whatever stands in their place; a NaN elsewhere reaches the rows that see it."""
    call = _make(37, width, dtype, generator, heads=(2, 1), mask=True)
    assert call.key_mask is not None
    grad_out, grad_sparse = _upstream(call, generator)
    clean = library.forward(call, **form)
    expected = library.backward(call, clean, grad_out, grad_sparse)
    gone = ~call.key_mask[:, None, :, None]
    for t in (call.k, call.v, grad_out, grad_sparse):
        t.masked_fill_(gone, float("nan"))
    result = library.forward(call, **form)
    assert torch.equal(result.out, clean.out)
    assert (result.out.masked_select(gone) == 0).all()
    for name, value in library.backward(call, result, grad_out, grad_sparse).items():
        assert torch.equal(value, expected[name]), name

    call = _make(37, width, dtype, generator, causal=True)
    call.k[0, 0, 20, 3] = float("nan")
    missing = library.forward(call, **form).out.isnan().any(-1)[0, 0]
    assert missing.equal(torch.arange(37) >= 20)


@pytest.mark.parametrize(
    ("part", "dtype"),
    [
        *itertools.product(("on_chip", "iterated", "backward"), (BFLOAT, FLOAT)),
        ("warp_groups", BFLOAT),
        ("gradient", BFLOAT),
    ],
)
def test_order_does_not_matter_and_every_barrier_does(
    library: Library, part: str, dtype: torch.dtype, generator: torch.Generator
):
    """Bit for bit the same in every order of threads; a barrier left out is seen.

    So is a fence of shared memory, and a wait for products.
    """
    sizes = {"warp_groups": (150, 64), "gradient": (140, 64)}
    call = _make(*sizes.get(part, (200, 16)), dtype, generator)
    assert library.runs_in_warp_groups(call) == (part in sizes)
    assert library.gradient_is_on_chip(call) == (part in sizes)
    grad_out, grad_sparse = _upstream(call, generator)
    library.schedule(0)  # with every barrier, whatever ran before
    state = library.forward(call)

    def run(seed: int, left_out: tuple[int, int] = (-1, -1)) -> list[Tensor]:
        library.schedule(seed, left_out)
        if part in ("backward", "gradient"):
            return list(library.backward(call, state, grad_out, grad_sparse).values())
        result = library.forward(call, **(ITERATED if part == "iterated" else {}))
        return list(vars(result).values())

    def same(got: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    expected = run(0)
    barriers = library.barriers()
    assert len(barriers) >= 6
    for seed in range(1, 4):
        assert same(run(seed)), f"differs in the order {seed}"
    for barrier in barriers:
        seen = any(not same(run(seed, barrier)) for seed in range(1, 6))
        assert seen, f"nothing shows that barrier {barrier} of {barriers} is needed"


# ---- Compiled for the chips ----

SM_80_MEMORY = 163 * 1024  # bytes of shared memory that a block may have there


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple]]:
    """By chip: kernel, element, width, registers and spilled bytes of every instance."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on PATH")
    found = json.loads(
        once(tmp_path_factory, "resources.json", rpc_compiled.compile_all).read_text()
    )
    return {chip: [tuple(instance) for instance in each] for chip, each in found.items()}


@pytest.mark.parametrize("chip", rpc_compiled.CHIPS)
def test_compiles_without_spills(resources: dict[str, list[tuple]], chip: str):
    for kernel, element, width, registers, spills in resources[chip]:
        name = f"{kernel}<{element}, {width}>"
        assert spills <= rpc_compiled.SPILLED.get((kernel, chip), 0), (
            f"{name}: {spills} bytes spilled"
        )
        assert registers <= rpc_compiled.most_registers(kernel, element, width), (
            f"{name}: {registers} registers"
        )


def test_three_blocks_share_a_multiprocessor(
    library: Library, resources: dict[str, list[tuple]], generator: torch.Generator
):
    """On chip, at N = 197 and d = 64 in 16 bits: what sm_90 has is enough for three."""
    registers = max(
        count
        for kernel, element, width, count, _ in resources["sm_90a"]
        if (kernel, element, width) == ("rpc_forward_on_chip", "device::BFloat", 64)
    )
    for has_q in (False, True):
        threads, shared = library.on_chip(_make(197, 64, BFLOAT, generator, has_q=has_q))
        # A warp's registers come in units of 8 for each lane; a block's own KiB is the system's.
        of_registers = 65536 // (-(-registers // 8) * 8 * threads)
        of_shared = 228 * 1024 // (shared + 1024)
        assert min(of_registers, of_shared) == (2 if has_q else 3), (registers, threads, shared)


def test_two_heads_gradients_share_a_multiprocessor(
    library: Library, resources: dict[str, list[tuple]], generator: torch.Generator
):
    """One block of 4 warps of each, up to 208 tokens, with q up to 144; else one of 8 warps."""
    found = resources["sm_90a"]
    most = max(n for kernel, *_, n, _ in found if kernel.startswith("rpc_backward_on_chip"))
    for tokens, has_q in itertools.product((64, 144, 197, 208, 256), (False, True)):
        call = _make(tokens, 64, BFLOAT, generator, has_q=has_q)
        threads, shared = library.gradient_block(call)
        of_registers = 65536 // (-(-most // 8) * 8 * threads)
        of_shared = 228 * 1024 // (shared + 1024)
        blocks = 2 if tokens <= (144 if has_q else 208) else 1
        assert min(of_registers, of_shared) == blocks, (tokens, has_q, most, threads, shared)
        assert threads * blocks == 256


@pytest.mark.parametrize("chip", rpc_compiled.CHIPS)
def test_warp_groups_multiply_by_wgmma(
    resources: dict[str, list[tuple]], chip: str, tmp_path_factory: pytest.TempPathFactory
):
    """Of sm_90a alone: for other chips the kernel is empty, so that no launcher takes it."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    cubin = once(tmp_path_factory, "resources.json", rpc_compiled.compile_all).with_name(
        f"{chip}.cubin"
    )
    text = subprocess.run([tool, "-c", cubin], check=True, capture_output=True, text=True).stdout
    wanted = re.compile("warp_groups|backward_on_chip")
    groups = {n: code for n, code in sass.functions(text).items() if wanted.search(n)}
    assert len(groups) == len(rpc_compiled.KEYS) + 4
    for name, code in groups.items():
        assert ("HGMMA" in code) == (chip == "sm_90a"), name


@pytest.mark.parametrize("width", rpc_compiled.WIDTHS)
def test_shared_memory_fits_every_chip(library: Library, width: int, generator: torch.Generator):
    for dtype in (BFLOAT, FLOAT):
        sizes = library.shared_bytes(_make(1, width, dtype, generator))
        for kernel, size in sizes.items():
            assert 0 < size <= SM_80_MEMORY, f"{kernel}: {size} bytes"
        for narrower in (width, width // 2 + 1):
            asked = block_memory(torch.empty(0, 0, 0, narrower, dtype=dtype))
            assert asked == max(sizes.values()), f"{narrower} {dtype}"
    if width == 128:  # as the files state
        assert sizes == {"step": 104_448, "gradient": 157_056}


# ---- On a GPU ----


def _on_a_gpu(call: Call, grad_out: Tensor, grad_sparse: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of the compiled operator, by name."""
    tensors = {n: getattr(call, n) for n in ("k", "v", "q", "threshold")}
    leaves = {n: t.cuda().requires_grad_() for n, t in tensors.items() if t is not None}
    key_mask, seed = (None if t is None else t.cuda() for t in (call.key_mask, call.seed))
    out, sparse = mk.rpc_attention(
        **leaves,
        num_iters=call.num_iters,
        causal=call.is_causal,
        key_mask=key_mask,
        scale=call.scale,
        dropout_p=call.dropout_p,
        dropout_seed=seed,
        return_sparse=True,
        impl="cuda",
    )
    gradients = torch.autograd.grad(
        [out, sparse], list(leaves.values()), [grad_out.cuda(), grad_sparse.cuda()]
    )
    return {
        "out": out.detach().cpu(),
        "sparse": sparse.detach().cpu(),
        **{f"gradient of {n}": g.cpu() for n, g in zip(leaves, gradients, strict=True)},
    }


@pytest.fixture
def with_cuda() -> None:
    reason = CUDA.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_within_budget_on_a_gpu(name: str, with_cuda: None, generator: torch.Generator):
    tokens, width, dtype, options = CASES[name]

    def draw() -> dict[str, Errors]:
        call = _make(tokens, width, dtype, generator, **options)
        upstream = _upstream(call, generator)
        got, again = _on_a_gpu(call, *upstream), _on_a_gpu(call, *upstream)
        for name, value in got.items():
            assert torch.equal(value, again[name]), f"{name} differs when repeated"
        return _errors(call, got, *upstream)

    judge(draw)
