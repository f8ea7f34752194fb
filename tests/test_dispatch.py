"""What the dispatch ops mean: against loops, dense layers and one another."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from dispatch import GRADIENTS, IMPLS, SIZES, draw, with_gradients

from molex_kernels import _extension
from molex_kernels.ops.dispatch.api import grouped_gemm, moe_mlp
from molex_kernels.ops.dispatch.module import MoEMLP
from molex_kernels.ops.dispatch.types import ACTIVATIONS, ClampedSwiGLU, activation_of
from molex_kernels.ops.routing.api import route_plan
from molex_kernels.ops.routing.types import Routing
from molex_kernels.testing.cases.dispatch import OPINFOS

CLAMPED = ClampedSwiGLU(alpha=1.3, limit=0.7, up_limit=0.9, up_shift=0.5)
EVERY = [*ACTIVATIONS, CLAMPED]


def scalar_activation(name, value):
    if name == "relu":
        return max(value, 0.0)
    if name == "relu_squared":
        return max(value, 0.0) ** 2
    if name == "clamped_swiglu":
        value = min(value, 0.7)
        return value / (1 + math.exp(-1.3 * value))
    if name == "silu":
        return value / (1 + math.exp(-value))
    if name == "gelu":
        return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))
    inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
    return 0.5 * value * (1 + math.tanh(inner))


def by_loop(inputs, activation, gate_layout):
    """One token, one expert, one hidden unit at a time, in Python's floats."""
    name, gated, _ = activation_of(activation)
    x = inputs["x"].double()
    out = torch.zeros_like(x)
    hidden = inputs["w_down"].shape[2]
    for t in range(x.shape[0]):
        for e, weight in zip(
            inputs["expert_index"][t].tolist(), inputs["expert_weight"][t].tolist(), strict=True
        ):
            if not 0 <= e < inputs["w_up"].shape[0]:
                continue
            before = inputs["w_up"][e].double() @ x[t] + inputs["b_up"][e].double()
            acted = []
            for i in range(hidden):
                if not gated:
                    acted.append(scalar_activation(name, before[i].item()))
                    continue
                gate, up = (2 * i, 2 * i + 1) if gate_layout == "interleaved" else (i, hidden + i)
                up = before[up].item()
                if name == "clamped_swiglu":
                    up = max(-0.9, min(up, 0.9)) + 0.5
                acted.append(scalar_activation(name, before[gate].item()) * up)
            after = inputs["w_down"][e].double() @ x.new_tensor(acted)
            out[t] += weight * (after + inputs["b_down"][e].double())
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gate_layout", ["concat", "interleaved"])
@pytest.mark.parametrize(
    "activation", EVERY, ids=lambda a: activation_of(a)[0] if a is CLAMPED else a
)
def test_against_a_loop(activation, gate_layout, impl, generator):
    inputs = draw(generator, 5, 7, 6, 3, 2, gated=activation_of(activation)[1])
    inputs["expert_index"][0, 0] = 3
    inputs["expert_index"][1, 1] = -1
    inputs["expert_index"][2] = 1
    y = moe_mlp(**inputs, activation=activation, gate_layout=gate_layout, impl=impl)
    torch.testing.assert_close(
        y.double(), by_loop(inputs, activation, gate_layout), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
@pytest.mark.parametrize("gate_layout", ["concat", "interleaved"])
@pytest.mark.parametrize("activation", ["geglu_tanh", "relu_squared", CLAMPED], ids=str)
def test_gradients_of_activations(activation, gate_layout, impl, generator):
    inputs = draw(generator, **SIZES, gated=activation_of(activation)[1])
    upstream = torch.randn(18, 20, generator=generator).to(DEVICE)
    options = {"activation": activation, "gate_layout": gate_layout}
    y, got = with_gradients(inputs, upstream, **options, impl=impl)
    doubles = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    want, gradients = with_gradients(doubles, upstream.double(), **options)
    torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name].double(), gradient, atol=5e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_clamps_pass_a_gradient_at_the_bound_only_and_no_nan(impl):
    """One expert of identities: each of x's pairs is a gate and its up."""
    limit, above = 0.75, 1.5
    gates = [limit, above, -9.0, 0.5, 0.5, 0.5, 0.5, math.nan, 0.5]
    ups = [0.5, 0.5, 0.5, limit, -limit, above, -above, 0.5, math.nan]
    pairs = torch.tensor([gates, ups], dtype=torch.float64).T
    act = ClampedSwiGLU(limit=limit)
    lows = torch.tensor([-math.inf, -limit])
    clamped = pairs.clamp(lows, torch.tensor(limit)).requires_grad_()
    gate, up = clamped.T
    acted = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    (want,) = torch.autograd.grad(acted.sum(), clamped)
    want = torch.where((pairs >= lows) & (pairs <= limit), want, 0)
    ours = pairs.to(DEVICE, torch.float32).requires_grad_()
    index = torch.zeros(len(gates), 1, dtype=torch.int64, device=DEVICE)
    w_up, w_down = torch.eye(2, device=DEVICE)[None], torch.tensor([[[1.0], [0.0]]], device=DEVICE)
    # A row at a time, since NaN in one would reach the other's product with 0.
    for row, (value, slope) in enumerate(zip(acted, want, strict=True)):
        x = ours[row : row + 1].detach().requires_grad_()
        one = torch.ones(1, 1, device=DEVICE)
        b_up = x.new_zeros(1, 2)
        if value.isnan():  # by the bias, which no other number is multiplied by
            b_up, x = x.detach(), torch.zeros_like(x).requires_grad_()
        b_up.requires_grad_()
        y = moe_mlp(x, index[:1], one, w_up, w_down, b_up=b_up, activation=act, impl=impl)
        (got,) = torch.autograd.grad(y[0, 0], b_up)
        torch.testing.assert_close(
            y[0, 0].cpu().double(), value, atol=1e-6, rtol=1e-5, equal_nan=True
        )
        torch.testing.assert_close(
            got[0].cpu().double(), slope, atol=1e-6, rtol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"alpha": math.nan}, ValueError, "alpha: expected a finite number"),
        ({"alpha": "1"}, TypeError, "alpha: expected a number"),
        ({"limit": 0.0}, ValueError, "limit: expected a finite number above 0"),
        ({"limit": math.inf}, ValueError, "limit: expected a finite number above 0"),
        ({"up_limit": -1.0}, ValueError, "up_limit: expected a finite number above 0"),
        ({"up_shift": math.inf}, ValueError, "up_shift: expected a finite number"),
    ],
    ids=str,
)
def test_clamped_swiglu_names_what_is_wrong(numbers, error, message):
    with pytest.raises(error, match=message):
        ClampedSwiGLU(**numbers)


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_slopes_where_the_gate_is_nearly_1(activation, impl):
    """One expert of two identities: the gradient of x is the activation's slope."""
    width = 64
    x = torch.linspace(-9, 9, 16 * width, dtype=torch.float64).view(16, width)
    leaf = x.requires_grad_()
    function = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}.get(activation)
    acted = function(leaf) if function else F.gelu(leaf, approximate="tanh")
    slope = torch.autograd.grad(acted.sum(), leaf)[0]
    ours = x.detach().to(DEVICE, torch.float32).requires_grad_()
    identity = torch.eye(width, device=DEVICE)[None]
    index = torch.zeros(16, 1, dtype=torch.int64, device=DEVICE)
    one = torch.ones(16, 1, device=DEVICE)
    y = moe_mlp(ours, index, one, identity, identity, activation=activation, impl=impl)
    (got,) = torch.autograd.grad(y.sum(), ours)
    assert (got.cpu().double() - slope).abs().max() <= 6 * torch.finfo(torch.float32).eps


def test_reference_equals_the_loop_in_fp64(generator):
    inputs = draw(generator, 5, 7, 6, 3, 2, gated=True, dtype=torch.float64)
    y = moe_mlp(**inputs, activation="swiglu")
    torch.testing.assert_close(y, by_loop(inputs, "swiglu", "concat"), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_expert_is_a_dense_mlp(impl, generator):
    inputs = draw(generator, 18, 20, 12, 1, 1)
    inputs["expert_weight"] = torch.ones_like(inputs["expert_weight"])
    upstream = torch.randn(18, 20, generator=generator).to(DEVICE)
    y, got = with_gradients(inputs, upstream, activation="gelu", impl=impl)
    dense = {n: inputs[n].detach().requires_grad_() for n in GRADIENTS if n != "expert_weight"}
    hidden = F.gelu(F.linear(dense["x"], dense["w_up"][0], dense["b_up"][0]))
    want = F.linear(hidden, dense["w_down"][0], dense["b_down"][0])
    torch.testing.assert_close(y, want.detach(), atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(want, list(dense.values()), upstream)
    for name, gradient in zip(dense, gradients, strict=True):
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [1, 12, 50, 100])
def test_all_tile_shapes_agree_with_fp64(tokens, impl, generator):
    """For two experts these reach the tiles of 16, 32, 64 and 128 rows."""
    inputs = draw(generator, tokens, 32, 16, 2, 2, gated=True)
    upstream = torch.randn(tokens, 32, generator=generator).to(DEVICE)
    y, got = with_gradients(inputs, upstream, activation="swiglu", impl=impl)
    doubles = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    want, gradients = with_gradients(doubles, upstream.double(), activation="swiglu")
    torch.testing.assert_close(y.double(), want, atol=2e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name].double(), gradient, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_order_of_tokens_and_of_choices_is_free(impl, generator):
    inputs = draw(generator, **SIZES)
    y = moe_mlp(**inputs, impl=impl)
    order = torch.randperm(18, generator=generator).to(DEVICE)
    per_token = ("x", "expert_index", "expert_weight")
    shuffled = {**inputs, **{name: inputs[name][order] for name in per_token}}
    torch.testing.assert_close(moe_mlp(**shuffled, impl=impl), y[order], atol=1e-5, rtol=1e-5)
    flipped = {**inputs, **{name: inputs[name].flip(1) for name in per_token[1:]}}
    torch.testing.assert_close(moe_mlp(**flipped, impl=impl), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_experts_split_over_two_ranks(impl, generator):
    """Each rank sees the ids shifted by its first expert; the ranks' outputs add up."""
    inputs = draw(generator, **SIZES)
    upstream = torch.randn(18, 20, generator=generator).to(DEVICE)
    whole, gradients = with_gradients(inputs, upstream, impl=impl)
    halves = []
    for first in (0, 2):
        mine = {n: inputs[n][first : first + 2] for n in ("w_up", "w_down", "b_up", "b_down")}
        index = inputs["expert_index"] - first
        halves.append(
            with_gradients({**inputs, **mine, "expert_index": index}, upstream, impl=impl)
        )
    (y0, low), (y1, high) = halves
    torch.testing.assert_close(y0 + y1, whole, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        shared = name in ("x", "expert_weight")
        both = low[name] + high[name] if shared else torch.cat([low[name], high[name]])
        torch.testing.assert_close(both, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_id_twice_counts_twice(impl, generator):
    inputs = draw(generator, **SIZES)
    inputs["expert_index"] = inputs["expert_index"][:, :1].expand(-1, 2)
    once = {
        **inputs,
        "expert_index": inputs["expert_index"][:, :1],
        "expert_weight": inputs["expert_weight"].sum(1, keepdim=True),
    }
    torch.testing.assert_close(
        moe_mlp(**inputs, impl=impl), moe_mlp(**once, impl=impl), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_nobody_here(impl, generator):
    inputs = draw(generator, **SIZES)
    inputs["expert_index"] = torch.full_like(inputs["expert_index"], 4)
    y, gradients = with_gradients(inputs, torch.ones_like(inputs["x"]), impl=impl)
    assert not y.any()
    for gradient in gradients.values():
        assert not gradient.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_given_plan_changes_nothing(impl, generator):
    inputs = draw(generator, **SIZES)
    plan = route_plan(inputs["expert_index"], 4)
    upstream = torch.randn(18, 20, generator=generator).to(DEVICE)
    y, gradients = with_gradients(inputs, upstream, impl=impl)
    planned, planned_gradients = with_gradients(inputs, upstream, plan=plan, impl=impl)
    assert torch.equal(y, planned)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, planned_gradients[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_int32_ids(impl, generator):
    inputs = draw(generator, **SIZES)
    narrow = {**inputs, "expert_index": inputs["expert_index"].int()}
    assert torch.equal(moe_mlp(**narrow, impl=impl), moe_mlp(**inputs, impl=impl))


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
@pytest.mark.parametrize("wanted", [(name,) for name in GRADIENTS], ids=lambda w: w[0])
def test_one_gradient_alone(wanted, impl, generator):
    """Each gradient is the same whether or not the others are wanted."""
    inputs = draw(generator, **SIZES, gated=True)
    upstream = torch.randn(18, 20, generator=generator).to(DEVICE)
    options = {"activation": "geglu", "impl": impl}
    _, every = with_gradients(inputs, upstream, **options)
    _, alone = with_gradients(inputs, upstream, wanted, **options)
    torch.testing.assert_close(alone[wanted[0]], every[wanted[0]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
def test_only_input_and_preactivation_are_kept(impl, generator):
    inputs = draw(generator, **SIZES, gated=True)
    leaves = {name: inputs[name].requires_grad_() for name in GRADIENTS}
    kept = []

    def pack(tensor):
        if tensor.is_floating_point() and tensor.numel():
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_mlp(**inputs, activation="swiglu", impl=impl)
    pre_activation = (18 * 2, 2 * 12)
    own = {tuple(leaf.shape) for leaf in leaves.values()}
    assert pre_activation in kept
    assert set(kept) <= {pre_activation, *own}


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "reference"])
def test_second_derivatives_are_refused(impl, generator):
    inputs = draw(generator, **SIZES)
    inputs["x"].requires_grad_()
    y = moe_mlp(**inputs, impl=impl)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivative; impl="reference" has it'):
        dx.sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 2e-3), (torch.float16, 2.5e-4)], ids=str
)
def test_a_cpu_rounds_once_without_a_gradient(dtype, most, transposed):
    """A rounding to bf16 costs 1.7e-3 of the norm and one to fp16 2.1e-4.

    Matrix tiles take bf16, so the activated values are rounded, too.
    """
    on_tiles = dtype == torch.bfloat16 and not _extension.build_facts()["tiles"].startswith("none")
    most *= 1.5 if on_tiles else 1
    generator = torch.Generator().manual_seed(0)
    inputs = draw(generator, 256, 128, 128, 8, 4, gated=True, dtype=dtype)
    inputs = {name: value.cpu() for name, value in inputs.items()}
    if transposed:  # stored by columns
        stored = {name: inputs[name].mT.contiguous().mT for name in ("w_up", "w_down")}
        inputs = {**inputs, **stored}
    wide = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    want = moe_mlp(**wide, activation="swiglu", impl="reference")
    y = moe_mlp(**inputs, activation="swiglu", impl="cpu").double()
    assert (y - want).norm() <= most * want.norm()


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "triton" or DEVICE.type == "cuda"])
def test_autocast_casts_as_linear_does(impl, generator):
    inputs = draw(generator, **SIZES)
    leaves = {name: inputs[name].requires_grad_() for name in GRADIENTS}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = moe_mlp(**inputs, impl=impl)
        z = grouped_gemm(
            inputs["x"], inputs["w_up"], torch.arange(4, device=DEVICE).int() * 6, impl=impl
        )
    assert y.dtype == z.dtype == torch.bfloat16
    cast = {
        n: v.bfloat16() if n in leaves and n != "expert_weight" else v for n, v in inputs.items()
    }
    assert torch.equal(y, moe_mlp(**cast, impl=impl))
    y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32, name


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "triton" or DEVICE.type == "cuda"])
def test_autocast_leaves_fp64_alone(impl, generator):
    inputs = draw(generator, **SIZES, dtype=torch.float64)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert moe_mlp(**inputs).dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_grouped_gemm_by_slices(impl, generator):
    x = torch.randn(40, 20, generator=generator).to(DEVICE)
    weight = torch.randn(4, 12, 20, generator=generator).to(DEVICE)
    bias = torch.randn(4, 12, generator=generator).to(DEVICE)
    offsets = torch.tensor([7, 7, 30, 33], dtype=torch.int32, device=DEVICE)
    y = grouped_gemm(x, weight, offsets, bias=bias, impl=impl)
    parts = [x[:7] @ weight[0].T + bias[0]]
    parts += [x[7:30] @ weight[2].T + bias[2], x[30:33] @ weight[3].T + bias[3]]
    want = torch.cat([*parts, x.new_zeros(7, 12)])
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    assert not y[33:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_past_the_rows_are_clamped(impl, generator):
    x = torch.randn(10, 6, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(3, 5, 6, generator=generator).to(DEVICE).requires_grad_()
    gradients = []
    for ends in ([4, 500, 900], [4, 10, 10]):
        offsets = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        y = grouped_gemm(x, weight, offsets, impl=impl)
        gradients.append((y, *torch.autograd.grad(y.sum(), (x, weight))))
    for wild, tame in zip(*gradients, strict=True):
        assert torch.equal(wild, tame)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_expert_that_overflows_touches_its_own_tokens_alone(impl, generator):
    """Experts and tokens are selected, never weighed by 0: forward and every gradient."""
    given = draw(generator, **SIZES)
    index = given["expert_index"]
    given["w_up"][0] = math.nan
    given["x"][index[:, 0] == 1] = math.inf
    leaves = {name: given[name].requires_grad_() for name in GRADIENTS}
    y = moe_mlp(**given, activation="gelu", impl=impl)
    gradients = dict(zip(leaves, torch.autograd.grad(y.sum(), leaves.values()), strict=True))
    wild = (index == 0).any(1) | (index[:, 0] == 1)
    assert wild.any()
    assert not wild.all()
    assert y[~wild].isfinite().all()
    assert gradients["x"][~wild].isfinite().all()
    assert gradients["expert_weight"][~wild].isfinite().all()
    touched = torch.zeros(SIZES["num_experts"], dtype=torch.bool, device=DEVICE)
    touched[0] = True
    touched[index[wild]] = True
    for name in ("w_up", "w_down", "b_up", "b_down"):
        assert gradients[name][~touched].isfinite().all(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_overflows_touches_its_own_expert_alone(impl, generator):
    x = torch.randn(6, 5, generator=generator).to(DEVICE)
    weight = torch.randn(3, 4, 5, generator=generator).to(DEVICE)
    x[0], weight[2] = math.inf, math.nan
    offsets = torch.tensor([2, 4, 6], dtype=torch.int32, device=DEVICE)
    x.requires_grad_()
    weight.requires_grad_()
    y = grouped_gemm(x, weight, offsets, impl=impl)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y[1:4].isfinite().all()
    assert dx[:4].isfinite().all()
    assert dweight[1].isfinite().all()


@pytest.mark.parametrize("info", OPINFOS, ids=lambda info: info.name)
def test_baselines_compute_the_same(info, generator):
    case = info.compiled[1]
    inputs = info.make(case, torch.float32, DEVICE, generator)
    if "offsets" in inputs:
        inputs["offsets"][-1] = case.sizes["T"]  # past it, F.grouped_mm leaves dx unwritten
    leaves = {n: inputs[n].requires_grad_() for n in info.differentiable if n in inputs}
    want = info.function(**inputs, impl="reference")
    upstream = torch.randn(want.shape, generator=generator).to(DEVICE)
    want_gradients = torch.autograd.grad(want, list(leaves.values()), upstream)
    for name in ("published", "library"):
        y = info.baselines[name](**inputs)
        torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
        gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
        for gradient, expected in zip(gradients, want_gradients, strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", range(len(OPINFOS[1].compiled)))
def test_experts_of_transformers_compute_the_same(case, generator):
    pytest.importorskip("transformers.integrations.moe")
    info = OPINFOS[1]
    inputs = info.make(info.compiled[case], torch.float32, DEVICE, generator)
    leaves = [inputs[name].requires_grad_() for name in info.differentiable if name in inputs]
    want = info.function(**inputs, impl="reference")
    y = info.baselines["transformers"](**inputs)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
    upstream = torch.randn(want.shape, generator=generator).to(DEVICE)
    for got, expected in zip(
        torch.autograd.grad(y, leaves, upstream),
        torch.autograd.grad(want, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_experts_of_transformers_say_where_they_cannot_run(generator, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    info = OPINFOS[1]
    inputs = info.make(info.compiled[1], torch.float32, DEVICE, generator)
    with pytest.raises(NotImplementedError, match="no grouped_mm experts"):
        info.baselines["transformers"](**inputs)


def test_liger_baseline_says_where_it_cannot_run(generator):
    info = OPINFOS[1]
    inputs = info.make(info.compiled[1], torch.float32, torch.device("cpu"), generator)
    with pytest.raises(NotImplementedError, match=r"SwiGLU experts|needs a GPU"):
        info.baselines["liger"](**inputs)


def test_library_baseline_says_where_it_cannot_run(generator):
    info = OPINFOS[0]
    inputs = info.make(info.tests[1], torch.float32, DEVICE, generator)
    with pytest.raises(NotImplementedError, match="multiple of 16 bytes"):
        info.baselines["library"](**inputs)


def test_module(generator):
    layer = MoEMLP(20, 12, 4, activation="swiglu", gate_layout="interleaved", device=DEVICE)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "w_up": (4, 24, 20),
        "w_down": (4, 20, 12),
        "b_up": (4, 24),
        "b_down": (4, 20),
    }
    inputs = draw(generator, **SIZES, gated=True)
    routing = Routing(inputs["expert_index"], inputs["expert_weight"], inputs["x"])
    y = layer(inputs["x"], routing)
    want = moe_mlp(
        inputs["x"],
        *routing[:2],
        layer.w_up,
        layer.w_down,
        b_up=layer.b_up,
        b_down=layer.b_down,
        activation="swiglu",
        gate_layout="interleaved",
    )
    assert torch.equal(y, want)
    batched = tuple(t.view(3, 6, -1) for t in routing[:2])
    assert torch.equal(layer(inputs["x"].view(3, 6, 20), batched), y.view(3, 6, 20))
    assert "num_experts=4" in repr(layer)


def test_module_starts_like_linear_layers():
    layer = MoEMLP(100, 25, 8, bias=True)
    for weight, bias, bound in (
        (layer.w_up, layer.b_up, 0.1),
        (layer.w_down, layer.b_down, 0.2),
    ):
        for parameter in (weight, bias):
            assert parameter.abs().max() <= bound
            assert parameter.abs().max() > 0.8 * bound
    assert MoEMLP(8, 8, 2, bias=False).b_up is None
    assert MoEMLP(8, 8, 2, dtype=torch.float16).w_up.dtype == torch.float16


def test_published_names_load(generator):
    layer = MoEMLP(20, 12, 4)
    published = {
        "experts.htoh4.weight": torch.randn(4, 12, 20, generator=generator),
        "experts.htoh4.bias": torch.randn(4, 12, generator=generator),
        "experts.h4toh.weight": torch.randn(4, 20, 12, generator=generator),
        "experts.h4toh.bias": torch.randn(4, 20, generator=generator),
        "gate.gate.weight": torch.randn(4, 20, generator=generator),
    }
    layer.load_published(published)
    assert torch.equal(layer.w_up, published["experts.htoh4.weight"])
    assert torch.equal(layer.b_down, published["experts.h4toh.bias"])
    with pytest.raises(ValueError, match=r"h4toh\.bias"):
        layer.load_published({k: v for k, v in published.items() if k != "experts.h4toh.bias"})
    before = layer.w_up.clone()
    with pytest.raises(ValueError, match=r"h4toh\.weight"):
        layer.load_published(
            {
                **published,
                "experts.htoh4.weight": torch.zeros(4, 12, 20),
                "experts.h4toh.weight": torch.zeros(4, 12, 20),
            }
        )
    assert torch.equal(layer.w_up, before)
