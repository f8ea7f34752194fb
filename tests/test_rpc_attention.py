"""What robust and scaled attention mean: the published iteration, its corners, what is not seen."""

from __future__ import annotations

import math
from functools import partial

import peaked
import pytest
import rpc_precision
import torch
import torch.nn.functional as F
from conftest import DEVICE, dtypes_of
from torch import Tensor, nn

import molex_kernels as mk
from molex_kernels.ops.rpc_attention import reference
from molex_kernels.testing.baselines.rpc_attention import (
    library_rpc_attention,
    published_rpc_attention,
    published_scaled_attention,
)
from molex_kernels.testing.budget import Errors, judge, measure
from molex_kernels.testing.cases import rpc_attention as cases

B, H, N, D = 2, 3, 11, 8
IMPLS = ["triton", "reference"] if DEVICE.type == "cuda" else ["cpu", "triton", "reference"]


def draw(generator: torch.Generator, *sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def heads(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return draw(generator, B, H, N, D, dtype=dtype), draw(generator, B, H, N, D, dtype=dtype)


def multiplier_form(
    k: Tensor,
    v: Tensor,
    num_iters: int,
    lam: float,
    *,
    over_mu: bool = False,
    mu_width: int = H * D,
    mu_divisor: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """The published iteration, with the dual Y = mu u and the threshold as two products."""
    low, y = torch.zeros_like(k), torch.zeros_like(k)
    norm = sum(k[:, :, i].abs().sum(-1) for i in range(k.shape[2]))
    mu = (k.shape[2] * mu_width / (mu_divisor * norm))[..., None, None]
    t = lam / mu if over_mu else lam * mu
    for _ in range(num_iters):
        a = k - low + y / mu
        s = (a - t) * (a >= t) + (a + t) * (a <= -t)
        c = k - s - y / mu
        weights = (torch.einsum("bhid,bhjd->bhij", c, c) * k.shape[-1] ** -0.5).softmax(-1)
        low = torch.einsum("bhij,bhjd->bhid", weights, v)
        y = y + mu * (k - low - s)
    return low, s


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


@pytest.mark.parametrize("lam", [0.0, 0.4, 2.0, 50.0])
@pytest.mark.parametrize("num_iters", [1, 2, 3, 4, 5, 6])
def test_the_published_iteration(num_iters: int, lam: float, generator: torch.Generator):
    """fp64, forward and gradients, the one through mu included; S from dense to empty."""
    k, v = (x.requires_grad_() for x in heads(generator))
    wanted, wanted_sparse = multiplier_form(k, v, num_iters, lam)
    got, sparse = mk.rpc_attention(k, v, num_iters=num_iters, lam=lam, return_sparse=True)
    same(got, wanted)
    same(sparse, wanted_sparse)
    if lam == 0.0:
        assert (sparse != 0).all()
    if lam == 50.0:
        assert num_iters > 3 or (sparse == 0).all()
    upstream = [draw(generator, B, H, N, D) for _ in range(2)]
    got_gradients = torch.autograd.grad([got, sparse], [k, v], upstream)
    for a, b in zip(
        got_gradients,
        torch.autograd.grad([wanted, wanted_sparse], [k, v], upstream),
        strict=True,
    ):
        # The iteration amplifies a rounding error, six times over.
        same(a, b, 1e-10 if num_iters < 5 else 1e-8)


@pytest.mark.parametrize(
    "options",
    [{"over_mu": True}, {"mu_width": D}, {"mu_divisor": 8.0}],
    ids=["over_mu", "width", "divisor"],
)
def test_other_thresholds(options: dict, generator: torch.Generator):
    k, v = heads(generator)
    ours = dict(options)
    if ours.pop("over_mu", False):
        ours["threshold"] = "lam_over_mu"
    got = mk.rpc_attention(k, v, num_iters=3, lam=0.5, **ours)
    same(got, multiplier_form(k, v, 3, 0.5, **options)[0])
    assert not torch.allclose(got, mk.rpc_attention(k, v, num_iters=3, lam=0.5))


def test_the_gradient_through_mu_counts(generator: torch.Generator):
    k, v = (x.requires_grad_() for x in heads(generator))
    upstream = draw(generator, B, H, N, D)
    through = torch.autograd.grad(mk.rpc_attention(k, v, num_iters=2, lam=1.0), k, upstream)[0]
    bound = reference.thresholds(k, None, 1.0, False, H * D, 4.0, False).detach()
    fixed = mk.rpc_attention(k, v, num_iters=2, threshold=bound)
    fixed = torch.autograd.grad(fixed, k, upstream)[0]
    assert (through - fixed).abs().max() > 1e-3 * through.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_number_on_the_threshold(impl: str):
    """|a| = T: S is 0, and its gradient that of |a| > T, as two inclusive masks have it."""
    k = torch.tensor([1.0, -1.0, 0.5, 2.0], device=DEVICE).view(1, 1, 1, 4).requires_grad_()
    threshold = torch.ones(1, 1, device=DEVICE, requires_grad=True)
    _, sparse = mk.rpc_attention(
        k, k, num_iters=1, threshold=threshold, return_sparse=True, impl=impl
    )
    assert sparse.flatten().tolist() == [0.0, 0.0, 0.0, 1.0]
    dk, dthreshold = torch.autograd.grad(sparse.sum(), [k, threshold])
    assert dk.flatten().tolist() == [1.0, 1.0, 0.0, 1.0]
    assert dthreshold.item() == -1.0 + 1.0 - 1.0


@pytest.mark.parametrize("impl", IMPLS)
def test_with_an_empty_sparse_part(impl: str, generator: torch.Generator):
    """The first iteration is symmetric attention, the second attends with its own result."""
    k, v = heads(generator, torch.float32)
    once = mk.rpc_attention(k, v, num_iters=1, threshold=math.inf, impl=impl)
    same(once, F.scaled_dot_product_attention(k, k, v), 1e-5)
    twice, sparse = mk.rpc_attention(
        k, v, num_iters=2, threshold=1e6, return_sparse=True, impl=impl
    )
    assert (sparse == 0).all()
    same(twice, F.scaled_dot_product_attention(once, once, v), 1e-5)


@pytest.mark.parametrize("impl", IMPLS[:-1])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_what_cancels_in_the_gradient_of_k_leaves_no_rounding_error(
    share: float, impl: str, generator: torch.Generator
):
    """Small elements get through two iterations what one adds and the other takes; large ones 0."""
    tokens, width = 50, 16

    def gradients(dtype: torch.dtype, impl: str) -> Tensor:
        leaf = k.to(dtype).requires_grad_()
        out = mk.rpc_attention(leaf, v.to(dtype), num_iters=2, threshold=1.1, impl=impl)
        return torch.autograd.grad(out, leaf, upstream.to(dtype))[0]

    def measured() -> dict[str, Errors]:
        nonlocal k, v, upstream
        spread = torch.rand(1, 2, tokens, width, generator=generator)
        is_large = torch.rand(spread.shape, generator=generator) < share
        sign = torch.randn(spread.shape, generator=generator).sign()
        k = (sign * torch.where(is_large, 1.5 + spread / 2, 0.05 + spread / 6)).to(DEVICE)
        v, upstream = (draw(generator, *k.shape, dtype=torch.float32) / s for s in (7, 1))
        got = gradients(torch.float32, impl)
        assert (got[is_large.to(DEVICE)] == 0).all()
        truth, own = (gradients(d, "reference") for d in (torch.float64, torch.float32))
        return {"gradient of k": measure("gradient of k", got, truth, own, torch.float32)}

    k = v = upstream = torch.empty(0)
    judge(measured)


@pytest.mark.parametrize("impl", IMPLS[:-1])
def test_of_peaked_attention_half_a_rounding_is_left(impl: str, generator: torch.Generator):
    k, v, upstream = (x.to(DEVICE) for x in peaked.draw(generator))
    leaf = k.clone().requires_grad_()
    out = mk.rpc_attention(leaf, v, num_iters=1, threshold=math.inf, impl=impl)
    dk = torch.autograd.grad(out, leaf, upstream)[0]
    assert peaked.roundings(dk, k, v, upstream) < 0.55


@pytest.mark.parametrize(
    ("impl", "dtype"), [(i, t) for i in IMPLS[:-1] for t in dtypes_of(i) if t != torch.float32]
)
@rpc_precision.every_regime
def test_in_16_bits_gradients_err_by_no_more_than_pytorchs(
    regime: str,
    std: float,
    num_iters: int,
    impl: str,
    dtype: torch.dtype,
    generator: torch.Generator,
):
    ours = partial(rpc_precision.gradients, impl)
    rpc_precision.judge(ours, regime, std, num_iters, dtype, DEVICE, generator)


@pytest.mark.parametrize("impl", IMPLS)
def test_q_attends_in_place_of_the_keys(impl: str, generator: torch.Generator):
    k, v = heads(generator, torch.float32)
    q = draw(generator, B, H, N, D, dtype=torch.float32)
    got = mk.rpc_attention(k, v, q=q, num_iters=1, threshold=math.inf, scale=0.2, impl=impl)
    same(got, F.scaled_dot_product_attention(q, k, v, scale=0.2), 1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("has_q", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-40, -0.7])
def test_the_scale_of_scores(scale: float, has_q: bool, impl: str, generator: torch.Generator):
    """Hidden keys stay hidden where all scores are 0; a negative scale prefers the smallest."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(N, N, dtype=torch.bool, device=DEVICE).triu(1)
        return (q @ k.mT * scale).masked_fill(later, -math.inf).softmax(-1) @ v

    k, v, q = (x.requires_grad_() for x in (*heads(generator), draw(generator, B, H, N, D)))
    once = attend(q if has_q else k, k, v)
    wanted = attend(q if has_q else once, once, v)
    singles = [x.detach().float().requires_grad_() for x in (k, v, q)]
    got = mk.rpc_attention(
        *singles[:2],
        q=singles[2] if has_q else None,
        num_iters=2,
        threshold=math.inf,
        causal=True,
        scale=scale,
        impl=impl,
    )
    same(got, wanted, 1e-5)
    upstream = draw(generator, B, H, N, D)
    leaves = slice(None) if has_q else slice(2)
    gradients = torch.autograd.grad(got, singles[leaves], upstream.float())
    for a, b in zip(
        gradients, torch.autograd.grad(wanted, [k, v, q][leaves], upstream), strict=True
    ):
        same(a, b, 1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [True, "prefix"])
def test_the_future_does_not_leak(causal: bool | str, impl: str, generator: torch.Generator):
    """Later tokens change nothing under "prefix"; with mu over the segment they do, through T."""
    k, v = heads(generator, torch.float32)
    arguments = {"num_iters": 3, "lam": 0.5, "causal": causal, "impl": impl}
    before = mk.rpc_attention(k, v, **arguments)
    changed = [torch.cat([x[:, :, :6], 3 * x[:, :, 6:] + 1], dim=2) for x in (k, v)]
    after = mk.rpc_attention(*changed, **arguments)
    equal = torch.equal(before[:, :, :6], after[:, :, :6])
    assert equal == (causal == "prefix")
    assert not torch.allclose(before[:, :, 6:], after[:, :, 6:])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_prefix_is_a_segment_of_its_own_for_its_last_token(impl: str, generator: torch.Generator):
    """The last row's T is that of the whole segment."""
    k, v = heads(generator, torch.float32)
    _, sparse = mk.rpc_attention(
        k, v, num_iters=1, lam=0.3, causal="prefix", return_sparse=True, impl=impl
    )
    for tokens in (1, 4, N):
        _, alone = mk.rpc_attention(
            k[:, :, :tokens], v[:, :, :tokens], num_iters=1, lam=0.3, return_sparse=True, impl=impl
        )
        same(sparse[:, :, tokens - 1], alone[:, :, -1], 1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [False, True, "prefix"])
def test_a_masked_token_does_not_exist(impl: str, causal: bool | str, generator: torch.Generator):
    """The others are as if it were cut out, its rows and gradients 0, whatever it holds."""
    k, v = heads(generator, torch.float32)
    there = torch.tensor([True, False, True, True, False, False, True, True, True, True, False])
    key_mask = there.expand(B, N).clone().to(DEVICE)
    key_mask[1] = False
    arguments = {
        "num_iters": 3,
        "lam": 0.5,
        "causal": causal,
        "return_sparse": True,
        "impl": impl,
    }
    holes = [torch.where(key_mask[:, None, :, None], x, torch.nan).requires_grad_() for x in (k, v)]
    whole = [x[:1, :, there].clone().requires_grad_() for x in (k, v)]
    got = mk.rpc_attention(*holes, key_mask=key_mask, **arguments)
    wanted = mk.rpc_attention(*whole, **arguments)
    for a, b in zip(got, wanted, strict=True):
        same(a[:1, :, there], b, 1e-4)
        assert (a[:, :, ~there] == 0).all()
        assert (a[1] == 0).all()
    upstream = [draw(generator, B, H, N, D, dtype=torch.float32) for _ in got]
    short = [g[:1, :, there] for g in upstream]
    gradients = torch.autograd.grad(got, holes, upstream)
    for a, b in zip(gradients, torch.autograd.grad(wanted, whole, short), strict=True):
        same(a[:1, :, there], b, 1e-3)
        assert (a[:, :, ~there] == 0).all()
        assert (a[1] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_repeats_with_its_seed(impl: str, generator: torch.Generator):
    k, v = heads(generator, torch.float32)
    v = v.abs() + 1
    arguments = {"num_iters": 2, "lam": 1.0, "dropout_p": 0.4, "impl": impl}
    seed = torch.tensor(2**40 + 5, device=DEVICE)
    first = mk.rpc_attention(k, v, dropout_seed=seed, **arguments)
    assert torch.equal(first, mk.rpc_attention(k, v, dropout_seed=seed, **arguments))
    assert not torch.equal(first, mk.rpc_attention(k, v, dropout_seed=seed + 1, **arguments))
    same(
        first,
        mk.rpc_attention(k, v, dropout_seed=seed, **{**arguments, "impl": "reference"}),
        1e-4,
    )
    torch.manual_seed(3)
    drawn = mk.rpc_attention(k, v, **arguments)
    torch.manual_seed(3)
    assert torch.equal(drawn, mk.rpc_attention(k, v, **arguments))


def test_dropout_keeps_the_mean(generator: torch.Generator):
    k = draw(generator, 1, 2, 200, 4, dtype=torch.float32)
    v = torch.ones_like(k)
    kept = mk.rpc_attention(k, v, num_iters=1, lam=1.0, dropout_p=0.3)
    assert abs(kept.mean().item() - 1) < 0.05
    assert kept.std() > 0.01


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_heads_of_zeros(impl: str, lam: float):
    """The published mu is infinite there; here results and gradients are finite."""
    k = torch.zeros(1, 2, 5, 4, device=DEVICE, requires_grad=True)
    v = torch.ones(1, 2, 5, 4, device=DEVICE)
    out = mk.rpc_attention(k, v, num_iters=3, lam=lam, impl=impl)
    assert torch.isfinite(out).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), k)[0]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_nan(impl: str, generator: torch.Generator):
    """In its own head alone; with T given and a causal mask, from its own row on."""
    k, v = heads(generator, torch.float32)
    k[0, 1, 4, 2] = math.nan
    out = mk.rpc_attention(k, v, num_iters=2, lam=1.0, impl=impl)
    bad = out.isnan()
    assert bad[0, 1].all()
    assert bad.sum() == N * D
    out = mk.rpc_attention(k, v, num_iters=2, threshold=1.0, causal=True, impl=impl)
    bad = out.isnan()
    assert bad[0, 1, 4:].all()
    assert bad.sum() == (N - 4) * D
    # mu over the segment is NaN for every row, also those before it.
    out = mk.rpc_attention(k, v, num_iters=1, lam=1.0, causal=True, impl=impl)
    assert out[0, 1].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_token_and_none(impl: str, generator: torch.Generator):
    """One token attends to itself: v comes out, and all of the gradient goes there."""
    k, v = (draw(generator, 2, 1, 1, D, dtype=torch.float32).requires_grad_() for _ in range(2))
    out = mk.rpc_attention(k, v, num_iters=3, lam=1.0, impl=impl)
    assert torch.equal(out, v)
    dk, dv = torch.autograd.grad(out.sum(), [k, v])
    same(dv, torch.ones_like(v), 1e-4)
    same(dk, torch.zeros_like(k), 1e-4)
    for sizes in ((2, 3, 0, D), (0, 3, 5, D)):
        empty = torch.zeros(sizes, device=DEVICE, requires_grad=True)
        out = mk.rpc_attention(empty, empty, num_iters=2, lam=1.0, impl=impl)
        assert out.shape == sizes
        assert torch.autograd.grad(out.sum(), empty)[0].shape == sizes


def test_wide_heads_run_the_reference(generator: torch.Generator):
    k = draw(generator, 1, 1, 3, 160, dtype=torch.float32)
    same(
        mk.rpc_attention(k, k, num_iters=2, lam=1.0),
        mk.rpc_attention(k.double(), k.double(), num_iters=2, lam=1.0).float(),
        1e-4,
    )
    with pytest.raises(NotImplementedError, match=r"d = 160 is above 128"):
        mk.rpc_attention(k, k, num_iters=2, lam=1.0, impl="triton")


def test_autocast_casts_k_and_v(generator: torch.Generator):
    k, v = heads(generator, torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out, sparse = mk.rpc_attention(k, v, num_iters=2, lam=0.5, return_sparse=True)
    assert (out.dtype, sparse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_the_baselines_compute_the_same(causal: bool, generator: torch.Generator):
    k, v = heads(generator, torch.float32)
    wanted = mk.rpc_attention(k, v, num_iters=3, lam=0.5, causal=causal, impl="reference")
    traced = torch.compile(library_rpc_attention, backend="eager", fullgraph=True)
    for baseline in (published_rpc_attention, library_rpc_attention, traced):
        same(baseline(k, v, num_iters=3, lam=0.5, causal=causal), wanted, 1e-4)


def test_cases_stay_clear_of_kinks(generator: torch.Generator):
    for case in cases.OPINFOS[0].tests:
        inputs = cases.OPINFOS[0].make(case, torch.float32, DEVICE, generator)
        assert not cases.near_kinks(inputs).any()


@pytest.mark.parametrize("form", ["scalar", "matrix"])
def test_scaled_attention(form: str, generator: torch.Generator):
    """The published form, with its identity; 0 is ordinary attention."""
    q, k, v = (draw(generator, B, H, N, D) for _ in range(3))
    s = draw(generator, 1) if form == "scalar" else draw(generator, H, N, N)
    wanted = published_scaled_attention(q, k, v, s)
    same(mk.scaled_attention(q, k, v, s), wanted)
    singles = [x.float() for x in (q, k, v, s)]
    same(mk.scaled_attention(*singles, impl="sdpa").double(), wanted, 1e-5)
    same(mk.scaled_attention(q, k, v, torch.zeros_like(s)), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("projection", ["kv", "qkv"])
def test_the_module(projection: str, generator: torch.Generator):
    """The published block: two linear layers around the op, k's rows before v's."""
    block = mk.RPCAttention(24, 3, num_iters=2, lam=1.0, projection=projection, qkv_bias=True)
    x = torch.randn(2, 5, 24, generator=generator)
    parts = [p.view(2, 5, 3, 8).transpose(1, 2) for p in block.qkv(x).split(24, dim=-1)]
    *q, k, v = parts
    low = mk.rpc_attention(k, v, q=q[0] if q else None, num_iters=2, lam=1.0)
    same(block(x), block.proj(low.transpose(1, 2).reshape(2, 5, 24)), 1e-5)
    other = mk.RPCAttention(24, 3, num_iters=2, lam=1.0, projection=projection, qkv_bias=True)
    other.load_published({f"blocks.0.attn.{n}": p for n, p in block.state_dict().items()})
    assert torch.equal(other(x), block(x))
    key_mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    short = block(x[:, :3])
    same(block(x, key_mask=key_mask)[:, :3], short, 1e-5)


def test_the_module_without_robustness_and_with_dropout(generator: torch.Generator):
    block = mk.RPCAttention(24, 3, robust=False, attn_drop=0.5)
    x = torch.randn(2, 5, 24, generator=generator)
    dropped = block(x)
    block.eval()
    k, v = (p.view(2, 5, 3, 8).transpose(1, 2) for p in block.qkv(x).split(24, dim=-1))
    low = F.scaled_dot_product_attention(k, k, v).transpose(1, 2).reshape(2, 5, 24)
    same(block(x), block.proj(low), 1e-5)
    assert not torch.allclose(dropped, block(x))


@pytest.mark.parametrize(("kind", "tokens"), [("scalar", None), ("matrix", 5)])
def test_the_scaled_module_starts_as_attention(
    kind: str, tokens: int | None, generator: torch.Generator
):
    block = mk.ScaledAttention(24, 3, tokens, kind=kind)
    x = torch.randn(2, 5, 24, generator=generator)
    q, k, v = (p.view(2, 5, 3, 8).transpose(1, 2) for p in block.qkv(x).split(24, dim=-1))
    low = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 24)
    same(block(x), block.proj(low), 1e-5)
    block(x).square().sum().backward()
    assert block.s.grad is not None
    assert block.s.grad.abs().max() > 0
    nn.init.ones_(block.s)
    block.reset_parameters()
    assert (block.s == 0).all()
