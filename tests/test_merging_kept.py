"""Deltas that are kept: they serve while the parameters stay, and say which one has not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from merging import same
from test_merging_experts import (
    PLAIN,
    Values,
    identical,
    kept,
    pairs,
    values,
    whole,
    with_gradients,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import molex_kernels as mk

PARAMETERS = [
    f"{part}.{name}"
    for part in ("up", "down")
    for name in ("base", "experts", "out1", "out2", "in1", "in2")
]


def named(parameter: str) -> str:
    """What a message calls it."""
    part, name = parameter.split(".")
    return f"{name}.{part}" if name in ("base", "experts") else f"curvature.{part}.{name}"


@pytest.fixture
def v(generator: torch.Generator) -> Values:
    return values(generator, torch.float32)


@pytest.fixture
def bare(v: Values) -> Values:
    """Without curvature and biases, for what takes long."""
    return {n: t for n, t in v.items() if n in PLAIN}


def use(v: Values, deltas: Any, **options: Any) -> Tensor:
    return whole(v, **{"mask": "ties", "deltas": deltas, **options})


def in_place(v: Values, name: str) -> None:
    with torch.no_grad():
        v[name].mul_(1)


def in_inference_mode(v: Values, name: str) -> None:
    with torch.inference_mode():
        v[name].add_(1)


def replaced(v: Values, name: str) -> None:
    v[name] = v[name].detach().clone().requires_grad_()


def swapped(v: Values, name: str) -> None:
    v[name].data = v[name].detach().clone()


def stepped(v: Values, name: str) -> None:
    v[name].grad = torch.ones_like(v[name])
    torch.optim.SGD([v[name]], lr=0.1, foreach=True).step()


def stepped_fused(v: Values, name: str) -> None:
    """Which PyTorch does not count."""
    v[name].grad = torch.ones_like(v[name])
    torch.optim.AdamW([v[name]], lr=0.1, fused=True).step()


CHANGES = (in_place, in_inference_mode, replaced, swapped, stepped, stepped_fused)


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_parameter_is_named(change: Callable[..., None], parameter: str, v: Values):
    with torch.no_grad():
        deltas = kept(v, "ties")
        want = use(v, deltas)
    change(v, parameter)
    with torch.no_grad():
        expected = "tensor" if change in (replaced, swapped) else "values"
        with pytest.raises(ValueError, match=rf"^{named(parameter)}: expected the {expected} of"):
            use(v, deltas)
        again = use(v, kept(v, "ties"))
    assert torch.equal(again, whole(v, mask="ties").detach())
    # None of these values would do: the refusal is of something.
    assert (change in (in_place, replaced, swapped)) == torch.equal(again, want)


def test_what_changes_elsewhere_is_no_reason(v: Values, generator):
    """Inputs, biases and other models' parameters, by whatever optimizer."""
    others = values(generator, torch.float32)
    with torch.no_grad():
        deltas = kept(v, "ties")
        want = use(v, deltas)
    for name, parameter in others.items():
        stepped_fused(others, name)
        parameter.grad = None
    assert torch.equal(use(v, kept(v, "ties")), want)
    assert torch.equal(use(v, (deltas.up, deltas.down), experts=None, curvature=None), want)
    for name in ("up.bias", "down.base_bias", "up.bias_out1"):
        stepped_fused(v, name)
    with torch.no_grad():
        v["x"].add_(1)
        assert torch.equal(use(v, deltas), whole(v, mask="ties"))


def test_a_step_that_is_compiled_is_seen(v: Values):
    with torch.no_grad():
        deltas = kept(v, "ties")
    v["up.base"].grad = torch.ones_like(v["up.base"])
    optimizer = torch.optim.AdamW([v["up.base"]], fused=True)
    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(2):
        step()
        with torch.no_grad():
            with pytest.raises(ValueError, match=r"(base\.up|deltas): expected .* has \w+"):
                use(v, deltas)
            deltas = kept(v, "ties")
            assert torch.equal(use(v, deltas), whole(v, mask="ties"))


def test_a_view_of_what_an_optimizer_holds(v: Values):
    """GPT-2 keeps its weights transposed."""
    stored = v["up.base"].detach().mT.contiguous().requires_grad_()
    v["up.base"] = stored.mT
    with torch.no_grad():
        deltas = kept(v, "ties")
    stepped_fused({"stored": stored}, "stored")
    with torch.no_grad(), pytest.raises(ValueError, match=r"^base\.up: expected the values"):
        use(v, deltas)


def test_others_than_they_were_made_of(v: Values, generator):
    with torch.no_grad():
        deltas, plain = kept(v, "ties"), kept(v, None)
        bare = mk.camex_experts_deltas(pairs(v)["base"], pairs(v)["experts"])
        other = values(generator, torch.float32)
        for message, call in {
            r"base\.up: expected the tensor": lambda: use(other, deltas),
            "mask: expected that of the deltas, None, got 'ties'": lambda: use(v, plain),
            r"curvature\.up\.out1: expected that of": lambda: use(v, deltas, curvature=None),
            r"curvature\.up\.out1: expected None": lambda: use(v, bare, mask=None),
        }.items():
            with pytest.raises(ValueError, match=rf"^{message}"):
                call()
        for message, call in {
            r"experts: expected a pair \(up, down\), got None": lambda: use(
                v, deltas, experts=None
            ),
            r"base\.up: expected dtype float16": lambda: use({**v, "x": v["x"].half()}, deltas),
        }.items():
            with pytest.raises(TypeError, match=rf"^{message}"):
                call()


def test_another_dtype(v: Values):
    """As `module.to()` changes it, the parameter staying the same object."""
    moved = {n: t.detach().clone() for n, t in v.items()}
    deltas = kept(moved, "ties")
    for parameter in moved.values():
        parameter.data = parameter.data.double()
    with pytest.raises(ValueError, match=r"^base\.up: expected the tensor .* got another"):
        use(moved, deltas)


def test_parameters_without_a_count(v: Values):
    with torch.inference_mode():
        v["down.experts"] = v["down.experts"] + 1
        with pytest.raises(ValueError, match=r"^experts\.down: expected a tensor whose changes"):
            kept(v, "ties")


def test_made_and_used_in_inference_mode(v: Values):
    with torch.inference_mode():
        deltas = kept(v, "ties")
        assert torch.equal(use(v, deltas), whole(v, mask="ties"))
    in_place(v, "up.in2")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"^curvature\.up\.in2: "):
        use(v, deltas)


def test_a_copy_is_of_its_own_parameters(v: Values):
    with torch.no_grad():
        fresh = {n: t.clone() for n, t in v.items()}
        both = {"v": fresh, "deltas": kept(fresh, "ties")}
        copied = copy.deepcopy(both)
        assert torch.equal(use(**copied), use(**both))
        with pytest.raises(ValueError, match=r"^base\.up: expected the tensor"):
            use(fresh, copied["deltas"])
        stepped_fused(copied["v"], "down.in1")
        with pytest.raises(ValueError, match=r"^curvature\.down\.in1: expected the values"):
            use(**copied)
        use(**both)


def test_gradients_that_would_be_lost(v: Values):
    """Made without, used where they are wanted: an error, not a part of the gradient."""
    with torch.no_grad():
        deltas = kept(v, "ties")
    with pytest.raises(ValueError, match=r"^deltas\.up: expected deltas made with gradients"):
        use(v, deltas)
    for name, t in v.items():
        t.requires_grad_(name in ("x", "down.in2"))
    with pytest.raises(ValueError, match=r"^deltas\.down: .* for curvature\.down\.in2 requires"):
        use(v, deltas)
    v["down.in2"].requires_grad_(False)
    given = {"x": v["x"]}
    want = with_gradients(whole(v, mask="ties"), given)
    assert identical(with_gradients(use(v, deltas), given), want)


def test_gradients_of_what_was_frozen(v: Values):
    """A gradient that the deltas have beside is no gradient of it."""
    for name, t in v.items():
        t.requires_grad_(name in ("x", "up.base", "down.base"))
    deltas = kept(v, "ties")
    assert identical(
        with_gradients(use(v, deltas), {"up.base": v["up.base"]}),
        with_gradients(whole(v, mask="ties"), {"up.base": v["up.base"]}),
    )
    v["down.experts"].requires_grad_()
    with pytest.raises(ValueError, match=r"^deltas\.down: .* for experts\.down requires"):
        use(v, deltas)
    with torch.no_grad():
        use(v, deltas)


def test_a_copy_has_no_graph(bare: Values):
    both: dict[str, Any] = {"v": {n: t.detach().requires_grad_() for n, t in bare.items()}}
    both["deltas"] = kept(both["v"], "ties")
    copied = pickle.loads(pickle.dumps(both))
    with torch.no_grad():
        assert torch.equal(use(**copied), use(**both))
    with pytest.raises(ValueError, match=r"^deltas\.up: expected deltas made with gradients"):
        use(**copied)


def test_a_second_backward_pass(v: Values):
    """Of one graph: PyTorch's error, unless the first one retains it."""
    leaves = list(v.values())
    want = torch.autograd.grad(whole(v, mask="ties").square().sum(), leaves)
    deltas = kept(v, "ties")
    torch.autograd.grad(use(v, deltas).square().sum(), leaves)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(use(v, deltas).square().sum(), leaves)

    deltas = kept(v, "ties")
    for retain in (True, True, False):
        use(v, deltas).square().sum().backward(retain_graph=retain)
    for leaf, gradient in zip(leaves, want, strict=True):
        assert same(leaf.grad, 3 * gradient, 1e-5)


def test_micro_batches_of_one_loss(v: Values):
    leaves = list(v.values())
    want = torch.autograd.grad(2 * whole(v, mask="ties").square().sum(), leaves)
    deltas = kept(v, "ties")
    loss = sum(use(v, deltas).square().sum() for _ in range(2))
    got = torch.autograd.grad(loss, leaves)
    assert all(same(a, b, 1e-5) for a, b in zip(got, want, strict=True))


def test_micro_batches_by_leaves(v: Values):
    """As the docstring has it: what stands behind the deltas is walked once."""
    parameters = list(v.values())
    want = torch.autograd.grad(3 * whole(v, mask="ties").square().sum(), parameters)
    deltas = kept(v, "ties")
    leaves = [d.detach().requires_grad_() for d in (deltas.up, deltas.down)]
    for _ in range(3):
        use(v, leaves, experts=None, curvature=None).square().sum().backward()
    torch.autograd.backward((deltas.up, deltas.down), [leaf.grad for leaf in leaves])
    for parameter, gradient in zip(parameters, want, strict=True):
        assert same(parameter.grad, gradient, 1e-5)


def test_checkpointing_computes_them_once(v: Values, monkeypatch):
    from molex_kernels.ops.merging import experts

    made = []
    monkeypatch.setattr(experts, "deltas_of", lambda *args: made.append(1) or mk_deltas_of(*args))
    want = with_gradients(whole(v, mask="ties"), v)
    deltas = kept(v, "ties")
    y = checkpoint(lambda x: use({**v, "x": x}, deltas), v["x"], use_reentrant=False)
    assert identical(with_gradients(y, v), want)
    assert len(made) == 2


def mk_deltas_of(*args: Any) -> Tensor:
    from molex_kernels.ops.merging import api

    return api.deltas_of(*args)


def test_in_a_graph_a_pair_of_tensors_stands_for_them(bare: Values):
    torch._dynamo.reset()
    with torch.no_grad():
        deltas, given = kept(bare, "ties"), pairs(bare)
        deltas.check(given["base"], given["experts"], mask="ties")
        compiled = torch.compile(use, fullgraph=True, backend="eager")
        y = compiled(bare, (deltas.up, deltas.down), experts=None)
        assert same(y, use(bare, deltas), 1e-6)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"deltas\.check before"):
            compiled(bare, deltas)


def test_a_graph_breaks_where_they_are_checked(bare: Values):
    torch._dynamo.reset()
    v = bare
    compiled = torch.compile(lambda v, deltas: use(v, deltas) + 1, backend="eager")
    with torch.no_grad():
        deltas = kept(v, "ties")
        for _ in range(2):
            assert same(compiled(v, deltas), use(v, deltas) + 1, 1e-6)
        in_place(v, "up.experts")
        with pytest.raises(ValueError, match=r"^experts\.up: expected the values"):
            compiled(v, deltas)
        assert same(compiled(v, kept(v, "ties")), use(v, None) + 1, 1e-6)


def test_transforms_see_other_tensors(v: Values):
    """Of the input alone they leave the parameters as they are."""
    x, frozen = v["x"].detach(), {n: t.detach() for n, t in v.items()}
    deltas = kept(frozen, "ties")

    def loss(x: Tensor) -> Tensor:
        return use({**frozen, "x": x}, deltas).square().sum()

    want = torch.func.grad(lambda x: whole({**frozen, "x": x}, mask="ties").square().sum())(x)
    assert same(torch.func.grad(loss)(x), want, 1e-5)
    with pytest.raises(ValueError, match=r"^base\.up: expected the tensor"):
        torch.func.grad(lambda base: use({**frozen, "up.base": base}, deltas).sum())(
            frozen["up.base"]
        )
