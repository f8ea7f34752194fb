"""What the layer-mixing ops mean: bad indices, equal layers, ties, and no read of the index."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, calls_of, dtypes_of
from torch._subclasses.fake_tensor import FakeTensorMode

import molex_kernels as mk
from molex_kernels.testing import OPS, Case, check_budget

IMPLS = ("triton",) if DEVICE.type == "cuda" else ("triton", "cpu")


def normal(generator, *sizes):
    return torch.randn(sizes, generator=generator).to(DEVICE)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_an_index_outside_is_clamped_on_the_device(impl, generator):
    x, weights = normal(generator, 2, 5, 4).requires_grad_(), normal(generator, 3, 6, 4)
    y = mk.layer_linear(x, weights, torch.tensor([-4, 9], device=DEVICE), impl=impl)
    torch.testing.assert_close(y, torch.stack([x[0] @ weights[0].T, x[1] @ weights[2].T]))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, weights[[0, 2]].sum(1, keepdim=True).expand_as(x))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_index_outside_raises_where_the_host_reads_it(wrong, generator, monkeypatch):
    x, weights = normal(generator, 2, 5, 4), normal(generator, 3, 6, 4)
    index = torch.tensor([0, wrong], device=DEVICE)
    expected = rf"index: expected layers in \[0, 3\), got {wrong}"
    if "cpu" in IMPLS:
        with pytest.raises(ValueError, match=expected):
            mk.layer_linear(x, weights, index, impl="cpu")
    monkeypatch.setattr("molex_kernels.ops.layer_mixing.api.DEBUG", True)
    with pytest.raises(ValueError, match=expected):
        mk.layer_linear(x, weights, index, impl="reference")
    mk.layer_linear(x, weights, index.clamp(0, 2), impl="reference")


@pytest.mark.parametrize("impl", IMPLS)
def test_layers_with_other_strides_give_the_same(impl, generator):
    x = normal(generator, 2, 5, 4)
    weights = [normal(generator, 6, 4), normal(generator, 4, 6).T, normal(generator, 6, 4)]
    index = torch.tensor([1, 2], device=DEVICE)
    y = mk.layer_linear(x, weights, index, impl=impl)
    torch.testing.assert_close(y, torch.stack([x[0] @ weights[1].T, x[1] @ weights[2].T]))


@pytest.mark.parametrize("table", [False, True], ids=["stacked", "table"])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [(impl, dtype) for impl in (*IMPLS, "reference") for dtype in dtypes_of(impl)],
    ids=str,
)
def test_adapters_in_single_precision_on_narrow_weights(impl, dtype, table, seed):
    """As PEFT keeps them: within the budget, with gradients in the adapters' dtype."""
    sizes = {"G": 2, "T": 34, "D": 20, "N": 23, "L": 3, "r": 4}
    options = {"adapters": "fp32", "table": table, "shared": table}
    info, case = OPS["layer_linear"], Case(sizes, options)
    check_budget(info, case, dtype, impl, DEVICE, seed, calls=calls_of(impl))
    given = info.make(case, dtype, DEVICE, torch.Generator().manual_seed(seed))
    assert given["a"].dtype == torch.float32
    leaves = {name: given[name].requires_grad_() for name in ("x", "weights", "a", "b")}
    y = info.function(**given, impl=impl)
    assert y.dtype == dtype
    found = torch.autograd.grad(y.sum(), list(leaves.values()))
    wanted = [dtype, dtype, torch.float32, torch.float32]
    assert [gradient.dtype for gradient in found] == wanted


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_ties_go_to_the_lower_layer(impl):
    logits = torch.eye(4, device=DEVICE)[[3, 1, 1, 3, 2]]
    assert mk.layer_vote(logits, impl=impl).item() == 1
    nothing = torch.zeros(5, dtype=torch.bool, device=DEVICE)
    assert mk.layer_vote(logits, mask=nothing, impl=impl).item() == 0


NAN, INF = float("nan"), float("inf")
ODD_LOGITS = {
    "nan": [[0.0, NAN, 1.0], [2.0, 0.0, 0.0], [0.0, 1.0, NAN]],
    "all nan": [[NAN] * 3] * 2,
    "inf": [[0.0, 1.0, INF], [INF, 0.0, INF]],
    "minus inf": [[-INF, -INF, -INF], [-INF, 0.0, -INF]],
    "nan and inf": [[INF, NAN, 0.0], [0.0, INF, 1.0], [0.0, INF, 1.0]],
    "negative": [[-3.0, -2.0, -1.0]],
}


@pytest.mark.parametrize("values", ODD_LOGITS.values(), ids=ODD_LOGITS)
@pytest.mark.parametrize("mode", ["mode", "mean_softmax", "mean_sigmoid"])
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_the_vote_is_a_layer_whatever_the_logits(impl, mode, values):
    """A NaN is the largest, as in torch.argmax, and all implementations agree."""
    logits = torch.tensor(values, device=DEVICE)
    for rows in (logits, logits[:1], logits[:0]):
        got = mk.layer_vote(rows, mode=mode, impl=impl).item()
        assert 0 <= got < 3
        assert got == mk.layer_vote(rows, mode=mode, impl="reference").item()


def test_the_index_is_never_read():
    """A fake tensor has no values, so whatever read one would raise."""
    with FakeTensorMode():
        logits = torch.zeros(2, 5, 3, device=DEVICE)
        j = mk.layer_vote(logits)
        index = torch.stack((torch.zeros_like(j), j))
        x = torch.zeros(2, 5, 4, device=DEVICE, requires_grad=True)
        y = mk.layer_linear(x, torch.zeros(3, 6, 4, device=DEVICE), index)
        mk.layer_mix(y, torch.zeros(2, device=DEVICE)).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


X, W, INDEX = torch.zeros(2, 5, 4), torch.zeros(3, 6, 4), torch.zeros(2, dtype=torch.int64)
LORA = mk.LoRA(torch.zeros(3, 2, 4), torch.zeros(3, 6, 2))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: mk.layer_linear(X, W, INDEX.float()), TypeError, "index: expected dtype"),
        (lambda: mk.layer_linear(X, W.half(), INDEX), TypeError, "weights: expected dtype"),
        (lambda: mk.layer_linear(X, W, INDEX, lora=(W, W)), TypeError, "lora: expected a LoRA"),
        (lambda: mk.layer_linear(X, W, INDEX[:1]), ValueError, "index: expected shape"),
        (lambda: mk.layer_linear(X, [W[0], W[0, :5]], INDEX), ValueError, r"weights\[1\]: expect"),
        (
            lambda: mk.layer_linear(X, W, INDEX, lora=LORA._replace(b=torch.zeros(3, 6, 3))),
            ValueError,
            r"lora\.b: expected shape",
        ),
        (lambda: mk.layer_linear(X, W, INDEX, biases=X[0]), ValueError, "biases: expected shape"),
        (lambda: mk.layer_mix(X, torch.zeros(3)), ValueError, "coeff: expected shape"),
        (lambda: mk.layer_mix(X), ValueError, "coeff: expected either coeff or logits"),
        (lambda: mk.layer_vote(X, mode="max"), ValueError, "mode: expected one of"),
        (lambda: mk.layer_vote(X, mask=X[..., 0]), TypeError, "mask: expected dtype"),
    ],
)
def test_bad_input_names_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_number_of_16_bits_is_read_and_rounded_once(dtype: torch.dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    rows = every.view(1, 32, 2048)[..., :2045]  # whole vectors and a tail
    scale = torch.tensor([0.3337])
    expected = (rows[0].float() * scale).to(dtype)
    torch.testing.assert_close(mk.layer_mix(rows, scale), expected, rtol=0, atol=0, equal_nan=True)
