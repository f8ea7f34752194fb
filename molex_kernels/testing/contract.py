"""The contract: what every op keeps, whatever it computes.

Each check takes an op, a case and an implementation, and raises AssertionError with what is wrong.
The op's own plain-PyTorch code, `impl="reference"`, is what it is held against, in fp64 and in the
dtype under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, repeat
from typing import Any

import torch
from torch import Tensor
from torch.library import opcheck

from molex_kernels.testing import budget
from molex_kernels.testing.budget import DRAWS, Errors, measure
from molex_kernels.testing.calls import (
    Outcome,
    cast,
    misaligned,
    recorded,
    run,
    strided,
    upstream_for,
)
from molex_kernels.testing.opinfo import Case, Inputs, OpInfo

Device = torch.device | str
Layout = Callable[[Inputs], Inputs]


def _as_made(tensors: Inputs) -> Inputs:
    return tensors


# What opcheck asks of an operator, and what it asks of its kernel alone.
OPCHECKS = (
    *("test_schema", "test_autograd_registration"),
    *("test_faketensor", "test_aot_dispatch_dynamic"),
)
OPCHECKS_OF_A_KERNEL = ("test_schema", "test_faketensor")
COMPOSED = ("reference", "sdpa")  # implementations without an operator of their own


@dataclass(frozen=True)
class Sampler:
    """Draws inputs of one case and measures what an implementation makes of them.

    Attributes:
        info: The op.
        case: Sizes and options.
        dtype: Of the inputs.
        impl: Name of the implementation.
        device: Where the inputs are.
        generator: Draws inputs and upstream gradients, one after the other.
        layout: Moves inputs into other memory.
        upstream_layout: The same for upstream gradients.
        expanded: Whether one row of an upstream gradient stands for all, at stride 0.
        function: Stands in for the op's function, such as a compiled one.
    """

    info: OpInfo
    case: Case
    dtype: torch.dtype
    impl: str
    device: Device
    generator: torch.Generator
    layout: Layout = _as_made
    upstream_layout: Layout = _as_made
    expanded: bool = False
    function: Callable[..., Any] | None = None

    def inputs(self) -> tuple[Inputs, dict[str, Tensor]]:
        """Fresh inputs, and gradients of the results."""
        made = self.info.make(self.case, self.dtype, torch.device(self.device), self.generator)
        inputs = self.layout(made)
        results = run(self.info, inputs, "reference", None).results
        upstream = upstream_for(results, self.generator, expanded=self.expanded)
        return inputs, self.upstream_layout(upstream)

    def run(self, inputs: Inputs, upstream: dict[str, Tensor]) -> Outcome:
        """Calls the implementation, forward and backward."""
        return run(self.info, inputs, self.impl, upstream, self.function)

    def errors(
        self, inputs: Inputs, upstream: dict[str, Tensor], outcome: Outcome | None = None
    ) -> dict[str, Errors]:
        """Errors of every floating result and gradient; integer results have to be equal.

        Without an outcome, those of the reference alone.
        """
        doubles = {name: gradient.double() for name, gradient in upstream.items()}
        fp64 = run(self.info, cast(inputs, torch.float64), "reference", doubles)
        reference = run(self.info, inputs, "reference", upstream)
        got = outcome or fp64
        errors = {}
        for name, result in got.results.items():
            want, own = fp64.results[name], reference.results[name]
            if result.is_floating_point():
                errors[name] = measure(name, result, want, own, self.dtype)
            else:
                assert torch.equal(result, want), f"{name}: differs from the reference's"
        unmatched = got.gradients.keys() ^ fp64.gradients.keys()
        assert not unmatched, f"gradients of op or reference alone: {sorted(unmatched)}"
        for name, gradient in got.gradients.items():
            own, shown = reference.gradients[name], f"gradient of {name}"
            same = outcome is None or gradient.dtype == own.dtype
            assert same, f"{shown}: expected {own.dtype}, got {gradient.dtype}"
            errors[shown] = measure(shown, gradient, fp64.gradients[name], own, self.dtype)
        return errors

    def draw(self) -> dict[str, Errors]:
        """One draw of the inputs, measured."""
        inputs, upstream = self.inputs()
        return self.errors(inputs, upstream, self.run(inputs, upstream))

    def reference_alone(self) -> dict[str, Errors]:
        """One draw, measured without the implementation."""
        return self.errors(*self.inputs())

    def draw_twice(self) -> dict[str, Errors]:
        """One draw, whose call is made twice: it changes no input and gives the same bits."""
        inputs, upstream = self.inputs()
        before = {name: t.clone() for name, t in inputs.items() if isinstance(t, Tensor)}
        got = self.run(inputs, upstream)
        for name, value in before.items():
            assert torch.equal(inputs[name], value), f"{name} was modified"
        again = self.run(inputs, upstream)
        for name, result in got.results.items():
            assert torch.equal(result, again.results[name]), f"{name} differs when repeated"
        for name, gradient in got.gradients.items():
            same = torch.equal(gradient, again.gradients[name])
            assert same, f"gradient of {name} differs when repeated"
        return self.errors(inputs, upstream, got)

    def judge(self, calls: int, first: budget.Draw | None = None) -> None:
        """Fails unless all draws together are inside the budget."""
        if self.impl == "reference" and self.function is None:
            # Its errors are the reference's own: nothing is left to luck.
            budget.check((first or self.draw)())
            return
        in_turn = chain([first or self.draw], repeat(self.draw))
        alone = _alone(self)
        budget.judge(lambda: next(in_turn)(), reference_alone=lambda: next(alone), calls=calls)


_drawn: dict[tuple[Any, ...], tuple[Sampler, list[dict[str, Errors]]]] = {}


def _alone(sampler: Sampler) -> Iterator[dict[str, Errors]]:
    """Draws of the reference alone, which every check of an op, case and dtype shares.

    They come from a generator of their own, so that none depends on which check asks first.
    """
    device = torch.device(sampler.device)
    key = id(sampler.info), sampler.case.id, sampler.dtype, device
    if key not in _drawn:
        alone = (sampler.info, sampler.case, sampler.dtype, "reference", device, _generator(0))
        _drawn[key] = Sampler(*alone), []
    reference, drawn = _drawn[key]
    for index in count():
        if index == len(drawn):
            drawn.append(reference.reference_alone())
        yield drawn[index]


def check_budget(
    info: OpInfo,
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: Device = "cpu",
    seed: int = 0,
    *,
    calls: int = DRAWS,
) -> None:
    """Results and gradients are inside the error budget, and the same bits when repeated.

    Args:
        info: The op.
        case: Sizes and options.
        dtype: Of the inputs.
        impl: Name of the implementation.
        device: Where the inputs are.
        seed: Of the generator that draws inputs and upstream gradients.
        calls: How many draws call the implementation; where a result has few elements, further
            draws are of the reference alone.

    Raises:
        AssertionError: with the result's name, its error and the budget.
    """
    sampler = Sampler(info, case, dtype, impl, device, _generator(seed))
    sampler.judge(calls, first=sampler.draw_twice)


def check_strided(
    info: OpInfo,
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: Device = "cpu",
    seed: int = 0,
    *,
    calls: int = DRAWS,
) -> None:
    """Inputs with gaps between their elements and upstream gradients of stride 0 change nothing.

    What lies in the gaps is NaN. Arguments as `check_budget`.
    """
    Sampler(
        *(info, case, dtype, impl, device, _generator(seed)), layout=strided, expanded=True
    ).judge(calls)


def check_misaligned(
    info: OpInfo,
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: Device = "cpu",
    seed: int = 0,
    *,
    calls: int = DRAWS,
) -> None:
    """Inputs and upstream gradients one element off any alignment change nothing.

    Arguments as `check_budget`.
    """
    Sampler(
        *(info, case, dtype, impl, device, _generator(seed)),
        layout=misaligned,
        upstream_layout=misaligned,
    ).judge(calls)


def check_left_out(
    info: OpInfo,
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: Device = "cpu",
    seed: int = 0,
    *,
    function: Callable[..., Any] | None = None,
) -> None:
    """What is left out may hold anything: no other bit changes, and its gradient is 0.

    `OpInfo.left_out` says where: experts that nobody chose, rows of no expert, masked tokens. There
    stand NaN, infinities and the largest number, whose products overflow; in integers valid ids and
    others. The same holds of the gradients of results that are left out. Arguments as
    `check_budget`; `function` stands in for the op's, such as a baseline.
    """
    assert info.left_out is not None
    sampler = Sampler(info, case, dtype, impl, device, _generator(seed), function=function)
    inputs, upstream = sampler.inputs()
    left = info.left_out(inputs)
    assert any(mask.any() for mask in left.values()), "the case leaves nothing out"
    clean = sampler.run(inputs, upstream)
    large = torch.finfo(dtype).max
    for poison in ((torch.nan,), (torch.inf, -torch.inf, large)):
        got = sampler.run(_poisoned(inputs, left, poison), _poisoned(upstream, left, poison))
        for name, result in clean.results.items():
            same = torch.equal(got.results[name], result)
            assert same, f"{name}: {poison} in what is left out changes it"
        assert got.gradients.keys() == clean.gradients.keys()
        for name, gradient in clean.gradients.items():
            same = torch.equal(got.gradients[name], gradient)
            assert same, f"gradient of {name}: {poison} in what is left out changes it"
            if name in left:
                idle = torch.where(left[name], gradient, 0)
                assert not idle.any(), f"gradient of {name}: expected 0 where it is left out"


def check_opcheck(
    info: OpInfo,
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: Device = "cpu",
    seed: int = 0,
    *,
    namespace: str = "molex",
    tests: Sequence[str] = OPCHECKS,
) -> None:
    """Every operator that a call reaches passes PyTorch's `opcheck`, strided inputs included.

    Arguments as `check_budget`; `namespace` is the one that the operators are registered in;
    `tests` are those of `opcheck`.
    """
    for layout in (_as_made, strided):
        sampler = Sampler(info, case, dtype, impl, device, _generator(seed), layout=layout)
        inputs, upstream = sampler.inputs()
        with recorded(namespace) as calls:
            sampler.run(inputs, upstream)
        assert calls or impl in COMPOSED, "no operator was called"
        for operator, args, kwargs in {call[0]: call for call in calls}.values():
            # Autograd stands outside the operators, so they are never given a tensor that wants it.
            opcheck(operator, tuple(map(_detached, args)), kwargs, test_utils=tests)


def check_traces(
    info: OpInfo,
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: Device = "cpu",
    seed: int = 0,
    *,
    calls: int = 1,
    backend: str = "aot_eager",
) -> None:
    """The call compiles as one graph, forward and backward, and stays inside the budget.

    Arguments as `check_budget`; `backend` is that of `torch.compile`. One call shows whether the
    kernels are called rightly.
    """
    torch._dynamo.reset()
    function = torch.compile(info.function, fullgraph=True, backend=backend)
    generator = _generator(seed)
    Sampler(info, case, dtype, impl, device, generator, function=function).judge(calls)


def check_reference_gradients(
    info: OpInfo, case: Case, device: Device = "cpu", seed: int = 0
) -> None:
    """Autograd through the fp64 reference agrees with central differences.

    Each gradient is held against differences along one random direction; arguments as
    `check_budget`.
    """
    generator = _generator(seed)
    sampler = Sampler(info, case, torch.float64, "reference", device, generator, layout=_double)
    inputs, upstream = sampler.inputs()
    for name, gradient in sampler.run(inputs, upstream).gradients.items():
        if not gradient.numel():
            continue
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        direction = direction.to(gradient.device)
        step = 1e-6
        ends = []
        for sign in (1, -1):
            moved = {**inputs, name: inputs[name] + sign * step * direction}
            results = run(info, moved, "reference", None).results
            ends.append(sum((results[n] * g).sum() for n, g in upstream.items()))
        slope = torch.as_tensor((ends[0] - ends[1]) / (2 * step))
        along = (gradient * direction).sum()
        assert (slope - along).abs() <= 1e-6 * (1 + slope.abs()), (
            f"gradient of {name}: {along.item():.9g} along a direction, differences give "
            f"{slope.item():.9g}"
        )


def _poisoned(
    tensors: Inputs, left: Mapping[str, Tensor], poison: tuple[float, ...]
) -> dict[str, Any]:
    """The tensors with these numbers, in turn, where they are left out; ids are 0, -1 and large."""
    found = dict(tensors)
    for name in left.keys() & tensors.keys():
        value = tensors[name]
        numbers = poison if value.is_floating_point() else (0, -1, 2**31 - 1)
        cycle = torch.tensor(numbers, dtype=value.dtype, device=value.device)
        places = torch.arange(value.numel(), device=value.device) % len(numbers)
        found[name] = torch.where(left[name], cycle[places].view(value.shape), value)
    return found


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _double(inputs: Inputs) -> Inputs:
    return cast(inputs, torch.float64)


def _detached(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_detached(v) for v in value]
    return value.detach() if isinstance(value, Tensor) else value
