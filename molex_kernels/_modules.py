"""The package's modules among the tools that wrap, hook, shard, offload and trace modules.

A fused op takes the parameters of its module's children in place of their outputs. Whoever wraps or
hooks a child (PEFT, parametrizations, FSDP, offloading) counts on the child's call all the same. So
a module that fuses a child asks `is_plain` first, and calls a child that is not; a child that has
parameters and no computation of its own is called with what its parent does with them (`lend`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as _nn

from molex_kernels import _check, _dtypes

_Result = TypeVar("_Result")
_Forward = TypeVar("_Forward", bound=Callable[..., Any])

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of this module would run the forward of `kind` on its parameters, no more.

    A wrapper, a parametrization and FSDP change the class; offloading puts a forward of its own
    into the instance; compilation keeps another call beside it.
    """
    state = module.__dict__
    return (
        type(module) is kind
        and "forward" not in state
        and not any(state[name] for name in _HOOKS)
        and module._compiled_call_impl is None
        and not _nn._has_any_global_hook()
    )


def check_dtype(x: Tensor, weight: Tensor, name: str = "x") -> None:
    """An input of the dtype and on the device of the weight that it is multiplied by."""
    if weight.dtype not in _dtypes.parameter_dtypes(x):
        wanted, got = (str(t.dtype).removeprefix("torch.") for t in (weight, x))
        raise TypeError(f"{name}: expected dtype {wanted}, that of the parameters, got {got}")
    _check.device(name, x, weight)


def routing_pair(name: str, routing: Any) -> tuple[Tensor, Tensor]:
    """The ids and weights [..., K] of a `Routing`, or of a pair: tracing makes a tuple of it."""
    if not isinstance(routing, tuple | list) or len(routing) < 2:
        raise TypeError(
            f"{name}: expected a Routing or a pair (expert_index, expert_weight), "
            f"got {type(routing).__name__}"
        )
    for part, value, dtypes in zip(
        ("expert_index", "expert_weight"),
        routing,
        (_dtypes.INDEX_DTYPES, _dtypes.FLOAT_DTYPES),
        strict=False,
    ):
        _check.trailing(f"{name}.{part}", value, "..., K", dtypes=dtypes)
        if value.shape[-1] < 1:
            raise ValueError(f"{name}.{part}: expected shape [..., K] with K at least 1, got K=0")
    return routing[0], routing[1]


def pair_of_tensors(name: str, value: Any) -> tuple[Any, Any]:
    """Both entries of a pair; two Nones where there is none."""
    if value is None:
        return None, None
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair of tensors or None, got {type(value).__name__}")
    return value[0], value[1]


class Loan:
    """Stands in for a module's input: the module's call then returns `use(module)`."""

    def __init__(self, use: Callable[[Any], Any]) -> None:
        self.use = use


def lend(modules: Sequence[nn.Module], use: Callable[..., _Result]) -> _Result:
    """`use(*modules)` inside the calls of all of them, where their parameters are what they say.

    The forward of each has to answer a `Loan`. What `use` returns is the output of every call, so
    tensors that hooks look for (FSDP's, for the backward pass) stand in it.
    """
    if not modules:
        return use()
    first, rest = modules[0], modules[1:]
    borrow: Any = first
    result: _Result = borrow(Loan(lambda lent: lend(rest, functools.partial(use, lent))))
    return result


class Parameters(nn.ParameterDict):
    """Parameters that another module computes with, and that are lent to it."""

    __call__ = nn.Module.__call__  # a ParameterDict refuses

    def forward(self, loan: Loan) -> Any:
        """What the borrower makes of this module."""
        return loan.use(self)


class Module(nn.Module):
    """Base of the package's modules."""

    def __prepare_scriptable__(self) -> NoReturn:
        # torch.jit.script asks every module inside of what it is given.
        raise NotImplementedError(
            f"torch.jit.script: {type(self).__name__} cannot be scripted. "
            "Use torch.compile, torch.export or torch.jit.trace"
        )


def fx_leaf(forward: _Forward) -> _Forward:
    """Makes a call of the module one node of what `torch.fx.symbolic_trace` records.

    The forward of a fused op looks at sizes and dtypes, which symbolic values do not have.
    """

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                return _record(self, forward, value.tracer, args, kwargs)
        return forward(self, *args, **kwargs)

    return call  # type: ignore[return-value]


def _record(module: nn.Module, forward: Any, tracer: Any, args: Any, kwargs: Any) -> Any:
    if module is tracer.root:
        raise NotImplementedError(
            f"torch.fx: {type(module).__name__} is one node of a graph and cannot be taken apart. "
            "Trace a module that contains it"
        )
    if is_plain(module, type(module)):
        path = tracer.path_of_module(module)
        return tracer.create_proxy("call_module", path, args, kwargs)
    # Hooks have been recorded beside this call, and may not run inside of it as well.
    return tracer.create_proxy("call_function", forward, (module, *args), kwargs)
