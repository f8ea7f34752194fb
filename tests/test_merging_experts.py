"""A mixture merged whole: it is two merged linear layers with an activation between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, dtypes_of, is_slow
from merging import D, E, R, S, T, draw, same
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import molex_kernels as mk
from molex_kernels.ops.merging.types import nearest_factors

I = 12  # noqa: E741  (the width inside an expert, as the docstrings have it)
IMPLS = ["triton", "reference"] if DEVICE.type == "cuda" else ["cpu", "triton", "reference"]
EXACT = [
    pytest.param(impl, dtype, id=f"{impl}-{str(dtype).removeprefix('torch.')}")
    for impl in IMPLS
    for dtype in (*dtypes_of(impl), *([torch.float64] if impl == "reference" else []))
]
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
}
PLAIN = ("x", "gates", "up.base", "up.experts", "down.base", "down.experts")

Values = dict[str, Tensor]


def values(
    generator: torch.Generator, dtype: torch.dtype = torch.float64, experts: int = E, **sizes: int
) -> Values:
    """Leaves by name; those of a layer under up and down."""
    segments, tokens = sizes.get("S", S), sizes.get("T", T)
    shapes: dict[str, tuple[int, ...]] = {"x": (segments, tokens, D), "gates": (segments, experts)}
    for part, (out, features) in {"up": (I, D), "down": (D, I)}.items():
        (o1, o2), (d1, d2) = nearest_factors(out), nearest_factors(features)
        shapes[f"{part}.base"], shapes[f"{part}.experts"] = (
            (out, features),
            (experts, out, features),
        )
        shapes[f"{part}.bias"], shapes[f"{part}.base_bias"] = (experts, out), (out,)
        factors = {"out1": o1, "out2": o2, "in1": d1, "in2": d2, "bias_out1": o1, "bias_out2": o2}
        for name, size in factors.items():
            shapes[f"{part}.{name}"] = (R, experts, size, size)
    # At a third of unit scale, so that the products of a row stay in fp16's range.
    return {n: (0.3 * draw(generator, *s)).to(dtype).requires_grad_() for n, s in shapes.items()}


def layer(v: Values, part: str) -> dict[str, Any]:
    """The keyword arguments of one `camex_linear`; without factors and biases where v has none."""
    own = {n.removeprefix(f"{part}."): t for n, t in v.items() if n.startswith(f"{part}.")}
    fields = mk.KroneckerCurvature._fields
    factors = [own.pop(name, None) for name in fields]
    of_bias = (own.pop("bias_out1", None), own.pop("bias_out2", None))
    own["curvature"] = None if factors[0] is None else mk.KroneckerCurvature(*factors)
    return {"bias": None, "base_bias": None, **own} | {
        "bias_curvature": None if of_bias[0] is None else of_bias
    }


def pairs(v: Values) -> dict[str, Any]:
    up, down = layer(v, "up"), layer(v, "down")
    return {name: (up[name], down[name]) for name in up}


def whole(v: Values, **options: Any) -> Tensor:
    return mk.camex_experts(v["x"], gates=v["gates"], **{**pairs(v), **options})


def composed(v: Values, activation: str = "gelu", **options: Any) -> Tensor:
    """The specification."""
    hidden = mk.camex_linear(v["x"], gates=v["gates"], **layer(v, "up"), **options)
    hidden = ACTIVATIONS[activation](hidden)
    return mk.camex_linear(hidden, gates=v["gates"], **layer(v, "down"), **options)


def kept(v: Values, mask: str | None, impl: str | None = None) -> mk.CamexDeltas:
    given = pairs(v)
    return mk.camex_experts_deltas(
        given["base"], given["experts"], curvature=given["curvature"], mask=mask, impl=impl
    )


def with_gradients(y: Tensor, v: Values) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    found = torch.autograd.grad(y, list(v.values()), upstream, materialize_grads=True)
    return [y.detach(), *found]


def identical(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("impl", "dtype"), EXACT)
def test_it_is_two_layers_bit_for_bit(impl, dtype, generator):
    v = values(generator, dtype)
    if is_slow(impl):
        # The curvature takes most of the time, and another test has it.
        v = {n: t for n, t in v.items() if n.startswith(PLAIN) or "bias" in n}
    options = {"mask": "ties", "alpha": 0.7, "impl": impl}
    want = with_gradients(composed(v, **options), v)
    assert all(t.any() for t in want)
    assert identical(with_gradients(whole(v, **options), v), want)
    deltas = kept(v, "ties", impl)
    assert identical(with_gradients(whole(v, deltas=deltas, **options), v), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_agrees_with_the_reference_in_fp64(impl, generator):
    v = values(generator)
    want = with_gradients(composed(v, impl="reference"), v)
    single = {n: t.detach().float().requires_grad_() for n, t in v.items()}
    got = with_gradients(whole(single, impl=impl), single)
    assert all(same(a.double(), b, 1e-4) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare"])
def test_options(activation, bare, generator):
    v = values(generator)
    v = {n: t for n, t in v.items() if n in PLAIN} if bare else v
    options = {"activation": activation, "mask": None if bare else "ties"}
    want = with_gradients(composed(v, **options), v)
    assert identical(with_gradients(whole(v, **options), v), want)
    if bare:
        names = ("curvature", "bias", "base_bias", "bias_curvature")
        for none in (None, (None, None)):
            given = dict.fromkeys(names, none)
            assert identical(with_gradients(whole(v, **options, **given), v), want)


def test_what_stands_in_one_layer_alone(generator):
    """A base's bias without experts', a curvature above: each entry of a pair may be None."""
    v = values(generator)
    kinds = ("down.bias", "up.bias_", "down.bias_", "up.out", "up.in", "down.base_bias")
    v = {n: t for n, t in v.items() if not n.startswith(kinds)}
    assert pairs(v)["curvature"][0] is None
    assert pairs(v)["base_bias"][1] is None
    assert identical(with_gradients(whole(v), v), with_gradients(composed(v), v))


@pytest.mark.parametrize(
    "sizes", [{"S": 0}, {"T": 0}, {"experts": 1}], ids=["no segment", "no token", "one expert"]
)
@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "triton"])
def test_few_of_something(sizes, impl, generator):
    v = values(generator, torch.float32, **sizes)
    options = {"mask": "ties", "impl": impl}
    want = with_gradients(composed(v, **options), v)
    assert identical(with_gradients(whole(v, **options), v), want)
    deltas = kept(v, "ties", impl)
    assert identical(with_gradients(whole(v, deltas=deltas, **options), v), want)


def test_the_layers_may_have_gates_of_their_own(generator):
    v = values(generator)
    other = draw(generator, S, E).requires_grad_()
    hidden = F.gelu(mk.camex_linear(v["x"], gates=v["gates"], **layer(v, "up")))
    want = mk.camex_linear(hidden, gates=other, **layer(v, "down"))
    got = mk.camex_experts(v["x"], gates=(v["gates"], other), **pairs(v))
    leaves = {**v, "other": other}
    assert identical(with_gradients(got, leaves), with_gradients(want, leaves))


def test_another_number_of_experts_needs_gates_of_its_own(generator):
    few, many = values(generator, experts=2), values(generator, experts=3)
    v = {n: (many if n.startswith("down.") else few)[n] for n in few}
    given = {n: p for n, p in pairs(v).items() if n in ("base", "experts")}
    y = mk.camex_experts(v["x"], gates=(few["gates"], many["gates"]), **given)
    assert y.shape == v["x"].shape
    with pytest.raises(ValueError, match=r"experts\.down: expected shape .* with E=2.* got \[3"):
        mk.camex_experts(v["x"], gates=few["gates"], **given)


def test_each_layer_drops_experts_for_itself(generator):
    v = values(generator)
    torch.manual_seed(7)
    want = with_gradients(composed(v, expert_dropout=0.5), v)
    torch.manual_seed(7)
    assert identical(with_gradients(whole(v, expert_dropout=0.5), v), want)
    assert not identical(with_gradients(whole(v, expert_dropout=0.5), v), want)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_module_is_this_bit_for_bit(activation, generator):
    module = mk.CAMExMLP(D, I, E, activation=activation, bias=True, alpha=0.7, device=DEVICE).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * draw(generator, *p.shape).to(p.dtype))
    x = draw(generator, S, T, D, dtype=torch.float32).requires_grad_()
    hidden = ACTIVATIONS[activation](module.up(x)[0])
    gates = tuple(
        one.gates(h)[0].flatten(0, 1) for one, h in ((module.up, x), (module.down, hidden))
    )
    own = {
        name: (getattr(module.up, name), getattr(module.down, name))
        for name in ("base", "experts", "bias", "base_bias")
    }
    got = mk.camex_experts(
        x,
        gates=gates,
        activation=activation,
        curvature=(module.up.curvature(), module.down.curvature()),
        bias_curvature=tuple((m.bias_out1, m.bias_out2) for m in (module.up, module.down)),
        mask="ties",
        alpha=0.7,
        **own,
    )
    leaves = {"x": x, **dict(module.named_parameters())}
    want = with_gradients(module(x)[0], leaves)
    # By the second layer's gates it comes through another `hidden` here: another order of the sum.
    found = with_gradients(got, leaves)
    assert torch.equal(found[0], want[0])
    assert all(same(a, b, 1e-5) for a, b in zip(found, want, strict=True))


def test_autocast_is_that_of_two_layers(generator):
    v = values(generator, torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        want = with_gradients(composed(v, mask="ties"), v)
        assert identical(with_gradients(whole(v, mask="ties"), v), want)
        deltas = kept(v, "ties")
        assert identical(with_gradients(whole(v, mask="ties", deltas=deltas), v), want)
    assert want[0].dtype == torch.bfloat16
    assert deltas.up.dtype == torch.float32


def test_its_flops_are_those_of_two_layers(generator):
    v = values(generator, torch.float32)
    counts = []
    for function in (composed, whole):
        with FlopCounterMode(display=False) as counter:
            function(v, mask="ties").sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with FlopCounterMode(display=False) as counter:
        deltas = kept(v, "ties")
    made = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        whole(v, mask="ties", deltas=deltas)
    used = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        composed(v, mask="ties")
    assert made + used == counter.get_total_flops()


def test_without_memory(generator):
    v = {n: t.detach().float().to("meta") for n, t in values(generator).items()}
    assert whole(v, deltas=kept(v, "ties"), mask="ties").shape == (S, T, D)
    assert whole(v, mask="ties").device.type == "meta"


def test_the_transforms_agree_with_autograd(generator):
    v = values(generator, torch.float32)
    names = [*v]

    def loss(*tensors: Tensor) -> Tensor:
        return whole(dict(zip(names, tensors, strict=True)), mask="ties").square().sum()

    def loss_of_kept(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return whole(given, mask="ties", deltas=kept(given, "ties")).square().sum()

    leaves = [t.detach() for t in v.values()]
    want = torch.autograd.grad(loss(*v.values()), list(v.values()))
    for function in (loss, loss_of_kept):
        got = torch.func.grad(function, tuple(range(len(names))))(*leaves)
        assert all(same(a, b, 1e-5) for a, b in zip(got, want, strict=True))
    xs = torch.stack([leaves[0], leaves[0] + 1])
    got = torch.func.vmap(lambda x: loss(x, *leaves[1:]))(xs)
    assert same(got, torch.stack([loss(x, *leaves[1:]) for x in xs]), 1e-5)


class Net(torch.nn.Module):
    """For `torch.export`."""

    def __init__(self, v: Values) -> None:
        super().__init__()
        self.names = [n for n in v if n not in ("x", "gates")]
        self.own = torch.nn.ParameterList([v[n].detach() for n in self.names])

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        v = dict(zip(self.names, self.own, strict=True))
        return whole({**v, "x": x, "gates": gates}, mask="ties")


def test_exported(generator):
    v = values(generator, torch.float32)
    net, given = Net(v), (v["x"].detach(), v["gates"].detach())
    with torch.no_grad():
        program = torch.export.export(net, given)
        assert torch.equal(program.module()(*given), net(*given))


def test_compiled_whole(generator):
    v = {n: t for n, t in values(generator, torch.float32).items() if n in PLAIN}
    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    want = with_gradients(whole(v, mask="ties"), v)
    got = with_gradients(compiled(v, mask="ties"), v)
    assert all(same(a, b, 1e-6) for a, b in zip(got, want, strict=True))
