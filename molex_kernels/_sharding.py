"""How the operators take a `DTensor`: which dimensions may lie on several ranks, a part on each.

Tokens (or segments, or a batch) go over the ranks where each is computed by itself; a gradient that
sums over them is then a part of the sum on every rank. Otherwise, and for everything else, all
ranks have the whole: DTensor brings it there. Experts are not sharded here, since a plan is of all
tokens: an expert-parallel layer calls the ops with its own experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from molex_kernels import _operators
from molex_kernels._imports import when_imported

SUM = "sum"  # a result of which each rank has a part

# Of a call's arguments, which have shapes alone: the dimension of each tensor that is sharded, and
# that of each result. None: not this call.
Rule = Callable[[Any], "tuple[dict[str, int], Sequence[int | str | None]] | None"]


def _all(names: str, dim: int = 0) -> dict[str, int]:
    return dict.fromkeys(names.split(), dim)


def _cuts_samples(a: Any, like: Any) -> bool:
    """Whether shards of the tokens part what an update takes the norm of."""
    if a.kind != "mars":
        return False
    tokens = like.shape[0]
    return tokens == 0 or (tokens // a.sample_tokens) % like.mesh.size() != 0


def _momentum(a: Any) -> Any:
    if a.expert_weight is not None or a.seed is not None or _cuts_samples(a, a.x):
        return None  # rows by expert; dropout counts elements from the first
    # States that a rule does not have are empty, and so is what is kept.
    squares = 0 if a.kind == "mars" else None
    found = [0 if i <= a.num_states else None for i in range(5)]
    return _all("x f f_prev s0 s1 s2"), [*found, squares]


def _momentum_backward(a: Any) -> Any:
    if a.seed is not None or _cuts_samples(a, a.like):
        return None
    wanted = [0 if need else None for need in a.needs[:5]]
    sums = [SUM if need else None for need in a.needs[5:]]
    inputs = _all("like dy g0 g1 g2 x f f_prev s0 s1 s2")
    if a.squares is not None:
        inputs["squares"] = 0
    return inputs, [*wanted, *sums]


def _is_half(x: Any) -> bool:
    return x.tensor_meta.dtype != torch.float32


def _attention(a: Any) -> Any:
    if a.seed is not None:
        return None
    kept = 1 if a.keeps_state else None
    sparse = 0 if a.returns_sparse else None
    rest = 0 if a.keeps_state and _is_half(a.k) else None
    stats = 2 if a.keeps_state else None
    return _all("k v q threshold key_mask"), [0, sparse, rest, kept, stats]


def _attention_backward(a: Any) -> Any:
    if a.seed is not None:
        return None
    inputs = _all("dout dsparse k v q threshold key_mask out")
    if _is_half(a.k):
        inputs["out_rest"] = 0
    return {**inputs, "low_ranks": 1, "stats": 2}, [0 if need else None for need in a.needs]


def _sums(places: Sequence[int | str], needs: Sequence[bool]) -> list[int | str | None]:
    return [place if need else None for place, need in zip(places, needs, strict=True)]


RULES: dict[str, Rule] = {
    "router_fwd": lambda a: (_all("x labels mix"), [0, 0, 0]),
    "router_bwd": lambda a: (
        _all("dweight dlogits x logits index weight labels mix"),
        _sums([0, SUM, SUM], a.needs),
    ),
    "choice_fwd": lambda a: (_all("logits given"), [0, 0]),
    "choice_bwd": lambda a: (_all("dweight logits index weight"), [0]),
    "momentum_fwd": _momentum,
    "momentum_bwd": _momentum_backward,
    "layer_mix_fwd": lambda a: (
        {"outputs": 1, "residual": 0},
        [0, None if a.eps is None else 0],
    ),
    "layer_mix_bwd": lambda a: (
        {"outputs": 1, **_all("dy dnormed residual")},
        _sums([1, SUM, SUM], a.needs),
    ),
    "camex_linear_fwd": lambda a: (_all("x gates bias"), [0]),
    "camex_linear_bwd": lambda a: (_all("dy x gates"), _sums([0, SUM, SUM, 0, 0], a.needs)),
    "rpc_attention_fwd": _attention,
    "rpc_attention_bwd": _attention_backward,
}


def _register(module: ModuleType) -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for operator in _operators.OPERATORS:
        register_sharding(operator.overload)(_strategies(operator, module))


def _strategies(operator: Any, module: ModuleType) -> Callable[..., Any]:
    def placement(dim: int | str | None) -> Any:
        if dim is None:
            return module.Replicate()
        return module.Partial() if dim == SUM else module.Shard(int(dim))

    def leaves(name: str, value: Any, dims: dict[str, int]) -> list[Any]:
        """The placement of a tensor, of each of a list, or None for what is no tensor."""
        if isinstance(value, (list, tuple)):
            return [leaf for v in value for leaf in leaves(name, v, dims)]
        return [placement(dims.get(name)) if hasattr(value, "placements") else None]

    def strategies(*given: Any, **named: Any) -> list[tuple[list[Any], list[Any]]]:
        values = dict(zip(operator.arguments, given, strict=False))
        values.update({n: v for n, v in named.items() if n in operator.arguments})
        choices: list[Any] = [({}, [None] * len(operator.results))]
        rule = RULES.get(operator.name)
        if rule and (sharded := rule(operator.named(**values))):
            choices.append(sharded)
        return [
            (
                [placement(dim) for dim in results],
                [leaf for name, value in values.items() for leaf in leaves(name, value, dims)],
            )
            for dims, results in choices
        ]

    return strategies


def install() -> None:
    """Registers them when DTensor is imported."""
    when_imported("torch.distributed.tensor", _register)
