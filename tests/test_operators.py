"""How an op is stated: a toy op by two schemas, and what follows from them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import DEVICE

import molex_kernels as mk
from molex_kernels import _extension, _operators

# The gradients of `weights`, a list of [D], come stacked.
TOY = {
    "forward": "(Tensor x, Tensor[] weights, int power, bool keeps_product)"
    " -> (Tensor y, Tensor product)",
    "backward": "(Tensor dy, Tensor x, Tensor product, Tensor[] weights, int power, bool[] needs)"
    " -> (Tensor dx, Tensor dweights)",
    "fake": lambda a: (
        a.x.new_empty(a.x.shape),
        a.x.new_empty(a.x.shape if a.keeps_product else (0,)),
    ),
    "fake_backward": lambda a: (
        a.x.new_empty(a.x.shape if a.needs[0] else (0,)),
        a.x.new_empty((len(a.weights), a.x.shape[1]) if a.needs[1] else (0,)),
    ),
    "cpu": "toy_op",
    "native": (),
    "reference": lambda a: (
        torch.stack([a.x, *(w.expand_as(a.x) for w in a.weights)]).prod(0) ** a.power
    ),
}
toy = _operators.Pass("toy", **TOY)


def _inputs(generator, requires_grad=True):
    x, *weights = (torch.rand(size, generator=generator) + 0.5 for size in ((5, 3), (3,), (3,)))
    return x.requires_grad_(requires_grad), [w.requires_grad_(requires_grad) for w in weights]


def _plain(x, weights, power):
    return (x * weights[0] * weights[1]) ** power


def test_its_gradients_follow_from_the_schemas(generator):
    x, weights = _inputs(generator)
    got, want = toy(None, x, weights, 3), _plain(x, weights, 3)
    torch.testing.assert_close(got, want)
    leaves = [x, *weights]
    upstream = torch.rand(got.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(want, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_what_needs_no_gradient_is_neither_kept_nor_computed(generator):
    x, weights = _inputs(generator, requires_grad=False)
    assert toy(None, x, weights, 2).grad_fn is None
    x.requires_grad_()
    with torch.no_grad():
        assert toy(None, x, weights, 2).grad_fn is None
    y = toy(None, x, weights, 2)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape
    _, product = toy.forward(x, weights, 2, False)
    assert product.shape == (0,)


def test_the_operators_pass_opcheck(generator):
    x, weights = _inputs(generator, requires_grad=False)
    torch.library.opcheck(toy.forward, (x, weights, 2, True))
    y, product = toy.forward(x, weights, 2, True)
    torch.library.opcheck(toy.backward, (y, x, product, weights, 2, [True, False]))


def test_it_compiles_without_a_graph_break(generator):
    x, weights = _inputs(generator)
    compiled = torch.compile(
        lambda x, weights: toy(None, x, weights, 2), fullgraph=True, backend="aot_eager"
    )
    got, want = compiled(x, weights), _plain(x, weights, 2)
    torch.testing.assert_close(got, want)
    leaves = [x, *weights]
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_functorch_transforms_see_through_it(generator):
    """Per-sample gradients, a Jacobian and vmap over one argument of several."""
    x, weights = _inputs(generator, requires_grad=False)
    samples = torch.rand(4, 5, 3, generator=generator) + 0.5

    def ours(x, w):
        return toy(None, x, [w, weights[1]], 2).sum()

    def plain(x, w):
        return _plain(x, [w, weights[1]], 2).sum()

    for transform, batch in (
        (lambda f: torch.func.vmap(f, (0, None)), samples),
        (lambda f: torch.func.grad(f, (0, 1)), x),
        (lambda f: torch.func.vmap(torch.func.grad(f, (0, 1)), (0, None)), samples),
        (lambda f: torch.func.jacrev(f, (0, 1)), x),
    ):
        got, want = transform(ours)(batch, weights[0]), transform(plain)(batch, weights[0])
        for a, b in zip(_tuple(got), _tuple(want), strict=True):
            torch.testing.assert_close(a, b)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"backward": TOY["backward"].replace("Tensor product", "Tensor produkt")}, "produkt"),
        ({"backward": TOY["backward"].replace("Tensor dweights", "Tensor dweight")}, "weight"),
        ({"backward": TOY["backward"].replace("int power", "int exponent")}, "exponent"),
    ],
)
def test_a_name_that_nothing_has_fails_at_import(changes, missing):
    with pytest.raises(ValueError, match=missing):
        _operators.Pass(f"toy_{missing}", **{**TOY, **changes})


def test_an_implementation_that_is_not_there_is_named(generator):
    x, weights = _inputs(generator, requires_grad=False)
    torch.testing.assert_close(toy("cpu", x, weights, 2), toy(None, x, weights, 2))
    torch.testing.assert_close(toy("reference", x, weights, 2), toy(None, x, weights, 2))
    with pytest.raises(
        NotImplementedError, match=r"molex::toy_fwd: there is no impl='tritn' on cpu"
    ):
        toy("tritn", x, weights, 2)


def test_every_operator_ends_in_impl():
    assert len(_operators.OPERATORS) > 20
    for operator in _operators.OPERATORS:
        last = operator.overload._schema.arguments[-1]
        assert (last.name, str(last.type), last.default_value) == ("impl", "str", ""), operator.name
        device = ("cpu", "cuda", "triton", "gpu")
        assert not operator.name.endswith(device), operator.name


def _model():
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = mk.TopKRouter(16, 4, 2)
            self.next = mk.ACRouter(16, 4, 2)
            self.experts = mk.MoEMLP(16, 24, 4)

        def forward(self, x):
            routing = self.router(x)
            x = x + self.experts(x, routing)
            return x + self.experts(x, self.next(x, routing))

    return Block().to(DEVICE)


def test_an_exported_graph_names_no_device(tmp_path):
    x = torch.randn(9, 16, device=DEVICE)
    model = _model()
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
    calls = [n for n in exported.graph.nodes if "molex" in str(n.target)]
    assert calls
    for node in calls:
        assert "impl" not in node.kwargs, node.format_node()
        assert not any(a in ("cpu", "cuda", "triton") for a in node.args), node.format_node()
        for word in ("cpu", "cuda", "triton"):
            assert word not in str(node.target)
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.skipif(_extension.why_not() is not None, reason="compares with the extension")
def test_an_exported_graph_runs_where_the_extension_is_missing(tmp_path):
    torch.manual_seed(0)
    model, x = _model().cpu(), torch.randn(9, 16)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
        torch.save((x, model(x)), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['molex_kernels._C'] = None\n"
        "import molex_kernels\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "got = torch.export.load(sys.argv[1]).module()(x)\n"
        "torch.testing.assert_close(got, expected)\n"
        "print(molex_kernels._extension.why_not())"
    )
    files = [str(tmp_path / name) for name in ("model.pt2", "expected.pt")]
    run = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "is not built" in run.stdout


# What an operator computes by the reference where a device has nothing else, beside the extension.
def _calls(generator):
    def normal(*sizes):
        return torch.randn(sizes, generator=generator)

    x, index = normal(6, 8), torch.randint(-1, 4, (6, 2), generator=generator)
    weight, w_up, w_down = normal(6, 2), normal(4, 10, 8), normal(4, 8, 5)
    k = normal(1, 2, 7, 8)
    base, experts, outputs = normal(6, 8), normal(3, 6, 8), normal(2, 7, 8)
    norm = (normal(8), normal(8), 1e-5)
    options = {"activation": "swiglu", "b_up": normal(4, 10), "b_down": normal(4, 8)}
    rule, state = mk.Adam(0.7), (normal(6, 8), normal(6, 8).abs())
    samples = normal(5, 2, 3, 8).abs().unbind()  # of x, f, and the state of Mars
    routing = mk.topk_route(x, normal(4, 8), top_k=2)
    factors = [normal(1, 3, n, n) for n in (2, 3, 2, 4)]
    lora = mk.LoRA(normal(3, 2, 8), normal(3, 6, 2), 0.5)
    return {
        "topk_route": lambda: mk.topk_route(x, w_down[:, :, 0], top_k=2, score="sigmoid"),
        "ac_route": lambda: mk.ac_route(x, w_down[:, :, 0], index, top_k=2),
        "ac_weights": lambda: mk.ac_weights(x, index[:, 0], 4, stat="pairwise"),
        "route_plan": lambda: mk.route_plan(index, 4),
        "losses": lambda: (mk.load_balance_loss(routing), mk.router_z_loss(routing.logits)),
        "grouped_gemm": lambda: mk.grouped_gemm(x, w_up, torch.tensor([1, 3, 3, 5]).int()),
        "moe_mlp": lambda: mk.moe_mlp(x, index, weight, w_up, w_down, **options),
        "momentum": lambda: mk.momentum_update(x, x.flip(0), state, rule, norm=norm)[0],
        "mars": lambda: mk.momentum_update(*samples[:2], samples[2:], mk.Mars(0.7))[0],
        "moe_momentum": lambda: mk.moe_mlp_momentum(
            x, index, weight, w_up, w_down, state, rule, **options
        )[0],
        "camex": lambda: mk.camex_linear(
            outputs, base, experts, normal(2, 3).new_ones(2, 3), mask="ties",
            curvature=mk.KroneckerCurvature(*factors),
        ),
        "layer_vote": lambda: mk.layer_vote(outputs, mode="mean_softmax"),
        "layer_linear": lambda: mk.layer_linear(
            x, experts, torch.tensor([2, 0]), lora=lora, shared=True
        ),
        "layer_mix": lambda: mk.layer_mix(outputs, torch.tensor([0.3, 0.7]), norm=norm),
        "rpc_attention": lambda: mk.rpc_attention(
            k, k.flip(2), num_iters=2, lam=0.1, return_sparse=True
        ),
    }  # fmt: skip


NAMES = list(_calls(torch.Generator().manual_seed(0)))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of a CPU")
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_stands_in_for_every_operator(name, generator, monkeypatch):
    call = _calls(generator)[name]
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(call())
        stand_ins = {o.overload: _by_reference(o) for o in _operators.OPERATORS}
        for operator in _operators.OPERATORS:
            monkeypatch.setattr(operator, "overload", stand_ins[operator.overload])
        for module in list(sys.modules.values()):
            names = dict(vars(module)) if module.__name__.endswith(".op") else {}
            for attribute, op in names.items():
                if isinstance(op, torch._ops.OpOverload):  # of a module that has no pass
                    monkeypatch.setattr(module, attribute, stand_ins[op])
                if isinstance(op, _operators.Pass):
                    inner = next(
                        o for o in _operators.OPERATORS if o.name in (op.name, f"{op.name}_fwd")
                    )
                    monkeypatch.setattr(op, "forward", inner.overload)
        got = torch.utils._pytree.tree_leaves(call())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _by_reference(operator):
    return lambda *arguments: operator.run(*arguments, "reference")
